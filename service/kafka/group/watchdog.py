"""What a look from outside of the consumer says about it: go on, replace it, or end.

Rules of this file: pure. Times are seconds of one monotonic clock that the caller reads. Every
answer is None while all is well, else a few words for the log (a reason to replace the client) or
a sentence for a person (the reason why the process ends).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from service.core.messages import Partition
from service.core.words import how_many

SILENT_S = 30.0
"""A client is silent where messages are there, were asked for, and none has come for this long."""

GONE_S = 5.0
"""A topic that every look has missed for this long is deleted. What one broker says while its
metadata changes is not enough."""

REPLACED_MAX = 2
REPLACED_WITHIN_S = 600.0
"""A client may be replaced this often within ten minutes. If it needs to be replaced once more,
only a new process can help."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One held partition: `next` is the offset behind what was returned, `end` the log's end as
    a broker has just told it."""

    next: int
    end: int


@dataclass(slots=True)
class _Starving:
    next: int
    silent_s: float = 0.0


class SilenceWatch:
    """Finds a client that returns nothing although there is something and it was asked."""

    def __init__(self, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._starving: dict[Partition, _Starving] = {}
        self._looked_at_s: float | None = None

    def judge(
        self,
        now_s: float,
        every_s: float,
        seen: Mapping[Partition, Standing],
        asked: AbstractSet[Partition],
    ) -> str | None:
        """Why the client is to be replaced.

        `asked`: partitions that were polled for messages since the last look. Time counts only
        between two looks that found the same partition at the same offset, and no more than
        twice `every_s`, the usual time between looks: a process that was stopped did not wait.
        """
        elapsed_s = 0.0 if self._looked_at_s is None else now_s - self._looked_at_s
        self._looked_at_s = now_s
        before, self._starving = self._starving, {}
        for partition, at in seen.items():
            if at.next >= at.end:
                continue
            starving = before.get(partition)
            if starving is None or starving.next != at.next:
                starving = _Starving(at.next)
            elif partition in asked:
                starving.silent_s += min(elapsed_s, 2 * every_s)
            self._starving[partition] = starving
        return self._reason(seen)

    def forget(self) -> None:
        """Another client starts with no blame."""
        self._starving.clear()

    def _reason(self, seen: Mapping[Partition, Standing]) -> str | None:
        silent = [each for each, one in self._starving.items() if one.silent_s >= self._silent_s]
        if not silent:
            return None
        first = min(silent)
        behind = seen[first]
        return (
            f"silent: {how_many(len(silent), 'partition')} gave nothing for "
            f"{self._starving[first].silent_s:.0f} s, among them {first} at offset "
            f"{behind.next} of {behind.end}"
        )


@dataclass(frozen=True, slots=True)
class TopicSeen:
    """A topic: as brokers tell it, and how many of its partitions the client knows."""

    id: str | None
    partitions: int
    known: int


class TopicsWatch:
    """Finds topics that are gone or another, and a client that does not learn of new partitions.

    `ids` are those that the topics had when reading began, None where unknown.
    """

    def __init__(self, ids: Mapping[str, str | None], behind_s: float) -> None:
        self._ids = dict(ids)
        self._behind_s = behind_s
        self._gone_since_s: dict[str, float] = {}
        self._behind_since_s: dict[str, float] = {}
        self._other: dict[str, str] = {}  # topic -> the id it has now
        self._doubted: set[str] = set()

    @property
    def doubtful(self) -> AbstractSet[str]:
        """Topics of which it is not sure that they are those that were read."""
        return self._gone_since_s.keys() | self._other.keys() | self._doubted

    def doubt(self, topics: Iterable[str]) -> None:
        """Somebody was told that one of these is not there; the next look knows more."""
        self._doubted.update(topics)

    def judge(self, now_s: float, found: Mapping[str, TopicSeen | None]) -> str | None:
        """Why the process ends. `found` holds the topics that brokers told of; None: not there."""
        for topic, seen in found.items():
            if seen is None:
                self._gone_since_s.setdefault(topic, now_s)
                continue
            self._gone_since_s.pop(topic, None)
            self._doubted.discard(topic)
            known = self._ids.get(topic)
            if known is None:
                self._ids[topic] = seen.id
            elif seen.id is not None and seen.id != known:
                self._other[topic] = seen.id
        return self._made_again() or self._gone(now_s, found)

    def behind(self, now_s: float, found: Mapping[str, TopicSeen | None]) -> str | None:
        """Why the client is to be replaced: it does not know what brokers have long told."""
        for topic, seen in found.items():
            if seen is None or seen.known >= seen.partitions:
                self._behind_since_s.pop(topic, None)
                continue
            if now_s - self._behind_since_s.setdefault(topic, now_s) >= self._behind_s:
                return (
                    f"its metadata is stale: it knows {how_many(seen.known, 'partition')} of topic "
                    f"{topic}, which has {seen.partitions}"
                )
        return None

    def forget(self) -> None:
        """Another client starts with no blame."""
        self._behind_since_s.clear()

    def _made_again(self) -> str | None:
        for topic, other in self._other.items():
            return (
                f"Topic {topic} was deleted and made again while it was being read (its id was "
                f"{self._ids[topic]} and is {other}): the process ends, so that no offset of the "
                "old topic is stored for the new one. The next process decides anew where to start."
            )
        return None

    def _gone(self, now_s: float, found: Mapping[str, TopicSeen | None]) -> str | None:
        for topic, seen in found.items():
            if seen is None and now_s - self._gone_since_s[topic] >= GONE_S:
                return (
                    f"Topic {topic} was deleted while it was being read: make it again with "
                    "`sluice topics create`, or correct input.topics."
                )
        return None


class Replacements:
    """Bounds how often one client is replaced."""

    def __init__(self) -> None:
        self._at_s: deque[float] = deque(maxlen=REPLACED_MAX)

    def allow(self, now_s: float) -> bool:
        """Whether to replace once more; counted if so."""
        if len(self._at_s) == REPLACED_MAX and now_s - self._at_s[0] < REPLACED_WITHIN_S:
            return False
        self._at_s.append(now_s)
        return True
