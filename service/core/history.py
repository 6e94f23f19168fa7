"""A message that is sent again (redrive, retry) carries its history in a block of headers.

Rules of this file: pure. The block stands behind the message's own headers, complete and always in
the same order. Taking it off therefore gives the own headers back byte for byte, even where some
of them have the block's names. Anything that is not exactly such a block belongs to the message.
"""

import re
from dataclasses import dataclass, field
from typing import Self

from service.core.messages import Headers, Message

ID_HEADER = "sluice.id"
"""The header is `topic:partition:offset:index` on an output, `topic:partition:offset` on a message
that is sent again."""

TOPIC_ID_HEADER = "sluice.source.topic.id"
"""The header holds the id of the topic that `sluice.id` names. It is needed because a topic that is
deleted and made again repeats its offsets."""

_ORIGIN = re.compile(rb"[a-zA-Z0-9._-]{1,249}:[0-9]{1,10}:[0-9]{1,19}")

_TOPIC_ID = re.compile(rb"[A-Za-z0-9_-]{22}")

_NUMBER = re.compile(rb"-?[0-9]{1,19}")

_NUMBERS = (
    "sluice.source.timestamp",
    "sluice.attempts",
    "sluice.first.failed.at",
    "sluice.redrive.count",
    "sluice.retry.count",
    "sluice.retry.due.at",
)
"""The block's other headers, in the order of the fields of `History`."""

_BLOCKS = ((ID_HEADER, TOPIC_ID_HEADER, *_NUMBERS), (ID_HEADER, *_NUMBERS))
"""The names in a block, with and without a known topic id."""


@dataclass(frozen=True, slots=True)
class History:
    """Where a message was first read and what happened to it since; times in epoch milliseconds.

    `timestamp_ms` is its first timestamp. `attempts` and `first_failed_at_ms` count from its first
    call, over all the times that it was sent again. `due_ms` is the earliest time for its next
    attempt; 0: at once. `topic_id` is the id of the topic in `origin`, empty where it is not known.
    """

    origin: bytes
    timestamp_ms: int
    attempts: int
    first_failed_at_ms: int
    redrives: int = 0
    retries: int = 0
    due_ms: int = 0
    topic_id: bytes = field(default=b"", kw_only=True)

    @property
    def headers(self) -> Headers:
        """The history as a block of headers."""
        numbers = (
            *(self.timestamp_ms, self.attempts, self.first_failed_at_ms),
            *(self.redrives, self.retries, self.due_ms),
        )
        written = zip(_NUMBERS, numbers, strict=True)
        return (
            (ID_HEADER, self.origin),
            *(((TOPIC_ID_HEADER, self.topic_id),) if self.topic_id else ()),
            *((name, b"%d" % number) for name, number in written),
        )

    @classmethod
    def of(cls, headers: Headers) -> Self | None:
        """Reads the block at the end of the headers; None where there is none."""
        block = dict(_block(headers))
        origin, numbers = block.get(ID_HEADER), [block.get(name) or b"" for name in _NUMBERS]
        if origin is None or not is_origin(origin) or not all(map(_NUMBER.fullmatch, numbers)):
            return None
        if TOPIC_ID_HEADER in block and not is_topic_id(block[TOPIC_ID_HEADER]):
            return None
        topic_id = block.get(TOPIC_ID_HEADER) or b""
        return cls(origin, *map(int, numbers), topic_id=topic_id)


def own_part(headers: Headers) -> Headers:
    """The headers that the message had when it was first read."""
    return headers if History.of(headers) is None else headers[: -len(_block(headers))]


def _block(headers: Headers) -> Headers:
    """The last headers where their names are exactly those of a block; else empty."""
    for names in _BLOCKS:
        block = headers[-len(names) :]
        if tuple(name for name, _ in block) == names:
            return block
    return ()


def is_topic_id(value: bytes | None) -> bool:
    """Whether `value` has the form in which Kafka's tools print a topic's id."""
    return value is not None and _TOPIC_ID.fullmatch(value) is not None


def is_origin(value: bytes | None) -> bool:
    """Whether `value` has the form `topic:partition:offset`."""
    return value is not None and _ORIGIN.fullmatch(value) is not None


def origin(message: Message) -> bytes:
    """The `topic:partition:offset` at which a message was first read.

    A message that is sent again carries it as `sluice.id`, so that its outputs keep their ids.
    Only a value of exactly this form is taken over. The outputs of another Sluice, read as input
    here, have a fourth part (the index): without this rule two records of one message there would
    get the same id here. Anyone who may write to the input topic can claim an origin, which gives
    them no more power than they have anyway.
    """
    if (claimed := _claimed_origin(message)) is not None:
        return claimed
    at = message.coordinates
    return f"{at.topic}:{at.partition}:{at.offset}".encode()


def _claimed_origin(message: Message) -> bytes | None:
    claimed = _last(message, ID_HEADER)
    return claimed if is_origin(claimed) else None


def origin_topic_id(message: Message) -> bytes:
    """The id of the topic that `origin` names, from the headers in the same way; empty: not
    known."""
    if _claimed_origin(message) is None:
        return message.topic_id.encode()
    claimed = _last(message, TOPIC_ID_HEADER)
    return claimed if claimed is not None and is_topic_id(claimed) else b""


def _last(message: Message, wanted: str) -> bytes | None:
    return next((value for name, value in reversed(message.headers) if name == wanted), None)


def first_timestamp_ms(message: Message) -> int:
    """The timestamp that the message had when it was first read."""
    before = History.of(message.headers)
    return message.timestamp_ms if before is None else before.timestamp_ms


def lived_on(message: Message, attempts: int, first_failed_at_ms: int) -> History:
    """The message's history with `attempts` more failed attempts."""
    before = History.of(message.headers)
    if before is None:
        return History(
            origin(message),
            message.timestamp_ms,
            attempts,
            first_failed_at_ms,
            topic_id=origin_topic_id(message),
        )
    return History(
        before.origin,
        before.timestamp_ms,
        before.attempts + attempts,
        before.first_failed_at_ms,
        before.redrives,
        before.retries,
        topic_id=before.topic_id,
    )
