"""What a message that is sent again (redrive, retry) carries of what happened to it before.

Rules of this file: pure. The block stands behind the message's own headers, complete and in one
order, so that taking it off gives these back byte for byte, even where they hold headers of these
names. Whatever is not exactly such a block is the message's own.
"""

import re
from dataclasses import dataclass
from typing import Self

from service.core.messages import Headers, Message

ID_HEADER = "sluice.id"
"""On an output `topic:partition:offset:index`, on a message sent again `topic:partition:offset`."""

_ORIGIN = re.compile(rb"[a-zA-Z0-9._-]{1,249}:[0-9]{1,10}:[0-9]{1,19}")

_NUMBER = re.compile(rb"-?[0-9]{1,19}")

_NUMBERS = (
    "sluice.source.timestamp",
    "sluice.attempts",
    "sluice.first.failed.at",
    "sluice.redrive.count",
    "sluice.retry.count",
    "sluice.retry.due.at",
)
"""The rest of the block, in the order of the fields below."""

_NAMES = (ID_HEADER, *_NUMBERS)


@dataclass(frozen=True, slots=True)
class History:
    """Where a message first came in and what it has been through; times in epoch milliseconds.

    `timestamp_ms` is the one it first had. `attempts` and `first_failed_at_ms` are of all its
    lives. `due_ms`: not before this; 0: at once.
    """

    origin: bytes
    timestamp_ms: int
    attempts: int
    first_failed_at_ms: int
    redrives: int = 0
    retries: int = 0
    due_ms: int = 0

    @property
    def headers(self) -> Headers:
        """The block."""
        numbers = (
            *(self.timestamp_ms, self.attempts, self.first_failed_at_ms),
            *(self.redrives, self.retries, self.due_ms),
        )
        written = zip(_NUMBERS, numbers, strict=True)
        return ((ID_HEADER, self.origin), *((name, b"%d" % number) for name, number in written))

    @classmethod
    def of(cls, headers: Headers) -> Self | None:
        """What the block at the end says; None where there is none."""
        block = headers[-len(_NAMES) :]
        if tuple(name for name, _ in block) != _NAMES:
            return None
        origin, *numbers = (value or b"" for _, value in block)
        if not is_origin(origin) or not all(map(_NUMBER.fullmatch, numbers)):
            return None
        return cls(origin, *map(int, numbers))


def own_part(headers: Headers) -> Headers:
    """The headers that the message first came in with."""
    return headers if History.of(headers) is None else headers[: -len(_NAMES)]


def is_origin(value: bytes | None) -> bool:
    """Whether it has the form `topic:partition:offset`."""
    return value is not None and _ORIGIN.fullmatch(value) is not None


def origin(message: Message) -> bytes:
    """`topic:partition:offset` under which a message first came in.

    A message that is sent again carries it as `sluice.id`, so that its outputs keep their ids.
    Only that well-formed shape is taken over: an output of another Sluice has four parts, and two
    records of one message there must not end under one id here. Whoever may write the input topic
    can claim an origin; that is no more than they can do anyway.
    """
    for name, value in reversed(message.headers):
        if name == ID_HEADER:
            if value is not None and is_origin(value):
                return value
            break
    at = message.coordinates
    return f"{at.topic}:{at.partition}:{at.offset}".encode()


def first_timestamp_ms(message: Message) -> int:
    """The timestamp that it first came in with."""
    before = History.of(message.headers)
    return message.timestamp_ms if before is None else before.timestamp_ms


def lived_on(message: Message, attempts: int, first_failed_at_ms: int) -> History:
    """Its history with these attempts, failed ones, added."""
    before = History.of(message.headers)
    if before is None:
        return History(origin(message), message.timestamp_ms, attempts, first_failed_at_ms)
    return History(
        before.origin,
        before.timestamp_ms,
        before.attempts + attempts,
        before.first_failed_at_ms,
        before.redrives,
        before.retries,
    )
