"""Under which leaders the fetched messages were written (KIP-320), so that a cut is found.

A log's leaders are numbered (leader epochs), and each batch names the one that wrote it. Where a
log was cut and has grown again, what stands there was written under a later one: the last offset
of the epoch that we have read is then smaller than what we have read. Pure.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

TRAIL_MAX = 64
"""This many changes of leader between the next offset and the last message are remembered. Of more
than these the last ones are kept, and the others are not verified."""

_BATCH = struct.Struct(">qiib")
"""A batch starts with these: base offset, length behind these two, leader epoch, version."""

_BEFORE_LENGTH = 12
"""A batch's length does not count these bytes: its base offset and the length itself."""

_VERSION = 2
"""Batches of this version name an epoch; earlier ones have a checksum in its place."""


def epochs_in(batches: bytes) -> Iterator[tuple[int, int]]:
    """(base offset, epoch) of the first batch, and of each whose epoch is another than before.

    The last batch of a fetch may be cut off; nothing is read behind it.
    """
    at, before = 0, None
    while at + _BATCH.size <= len(batches):
        base, length, epoch, version = _BATCH.unpack_from(batches, at)
        if version == _VERSION and epoch >= 0 and epoch != before:
            yield base, epoch
            before = epoch
        if length <= 0:
            return
        at += _BEFORE_LENGTH + length


class Trail:
    """The epochs of what has been fetched of one partition.

    `unverified` is set from a fetch under another epoch than before until somebody has asked
    whether the log was cut in between: (offset, epoch), all before the offset having been read
    under at most this epoch.
    """

    __slots__ = ("_begins", "unverified")

    def __init__(self, reached: int = 0, epoch: int | None = None) -> None:
        """The message before `reached` was written under `epoch`, where that is known."""
        self._begins: deque[tuple[int, int]] = deque(maxlen=TRAIL_MAX)
        self.unverified: tuple[int, int] | None = None
        if epoch is not None:
            self._begins.append((reached - 1, epoch))

    def fetched(self, offset: int, batches: bytes) -> bool:
        """A fetch at this offset has brought these; whether it has to be verified first.

        What an earlier leader wrote is fetched again where the completed map, or a fetch that was
        thrown away, reached further. What a later leader wrote there means a cut.
        """
        for index, (base, epoch) in enumerate(epochs_in(batches)):
            if not self._begins:
                self._begins.append((base, epoch))
                continue
            last_begin, last = self._begins[-1]
            known = base <= last_begin
            if epoch == last or (known and epoch < last):
                continue  # fetched again, from before where the last leader began
            if self.unverified is None and (index == 0 or known):
                self.unverified = max(offset, last_begin + 1), last
            if not known:
                self._begins.append((base, epoch))
        return self.unverified is not None

    def before(self, offset: int) -> int | None:
        """The epoch of the last message before this offset; None where it is not known."""
        for begin, epoch in reversed(self._begins):
            if begin < offset:
                return epoch
        return None
