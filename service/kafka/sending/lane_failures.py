"""Messages that failed to be published, so that later ones of their lane cannot overtake them.

Between a failure and the moment the lane hears of it, the event loop may run the lane once more.
Whatever comes then is refused here, until the failed messages have been handed over again.
"""

from typing import Literal, TypeAlias

from service.core.errors import PublishFailed
from service.core.messages import Message, Partition

Lane: TypeAlias = tuple[Partition, int, bytes | None]


class LaneFailures:
    """Offsets, by lane, that have failed and were not handed over again yet."""

    def __init__(self, ordering: Literal["key", "partition", "none"]) -> None:
        self._ordering = ordering
        self._offsets: dict[Lane, set[int]] = {}

    def add(self, message: Message) -> None:
        """This one failed: it goes before all later ones of its lane and epoch."""
        lane = self.lane(message)
        if lane is None:
            return
        for known in list(self._offsets):
            if known[0] == lane[0] and known[1] < lane[1]:
                del self._offsets[known]  # an older epoch: nobody will send those again
        self._offsets.setdefault(lane, set()).add(message.offset)

    def let_pass(self, message: Message) -> None:
        """Raises `PublishFailed` where an earlier one has to go first; else it is settled."""
        if not self._offsets or (lane := self.lane(message)) is None:
            return
        offsets = self._offsets.get(lane)
        if offsets is None:
            return
        if min(offsets) < message.offset:
            raise PublishFailed("an earlier message of its lane failed and goes first")
        offsets.discard(message.offset)
        if not offsets:
            del self._offsets[lane]

    def lane(self, message: Message) -> Lane | None:
        """None: nothing else is in its lane."""
        match self._ordering:
            case "key":
                alone = message.key is None
                return None if alone else (message.partition, message.epoch, message.key)
            case "partition":
                return message.partition, message.epoch, None
            case "none":
                return None
