"""A rejected message as a dead letter: the message byte for byte, and why it was rejected.

Pure functions. The message's own headers come first; ours begin at the last
`__dlq.errors.topic`, so that `original_headers` gives the message back exactly as it was, even
where it carried headers of these names itself. Readers take the last header of a name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from service.core.history import ID_HEADER, TOPIC_ID_HEADER, lived_on
from service.core.messages import Headers, Message, Reason, Rejected
from service.kafka.headers import HeaderList, provenance_headers

ANSWER_MAX_BYTES = 32_768
"""The answer is cut to this size: enough to see what the model did, far below a topic's limit."""
DETAIL_MAX_BYTES = 4_096
"""The detail is cut to this size: validation errors of a large record can be long."""
MARKER = "__dlq.errors.topic"
"""This is the first of our headers; its last occurrence separates the original ones from ours."""

SENTENCES: dict[Reason, str] = {
    Reason.INVALID: "The model's answer did not validate, re-asks included.",
    Reason.REFUSED: "The model declined to answer.",
    Reason.FILTERED: "The provider's content filter cut the answer.",
    Reason.TRUNCATED: "The answer reached the output token limit.",
    Reason.TOO_LONG: "The text is longer than the settings or the model allow.",
    Reason.UNDECODABLE: "The value could not be read as a text.",
    Reason.BAD_REQUEST: "The provider refused this request.",
    Reason.USER_CODE: "The user's own code raised an exception.",
    Reason.EXHAUSTED: "The message kept failing while others succeeded.",
    Reason.PROCESS_DIED: "The process died while it worked on this message alone.",
    Reason.OUTPUT_TOO_LARGE: "The output topic does not take a value of this size.",
}
"""These are generic on purpose: tools show `__dlq.errors.message` anywhere, so it quotes
nothing."""

STAGES: dict[Reason, str] = {
    Reason.UNDECODABLE: "VALUE_CONVERTER",
    Reason.OUTPUT_TOO_LARGE: "TASK_PUT",
}
"""Kafka Connect has these words for where it went wrong; all other reasons are `TRANSFORMATION`."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What is published: key and value are the message's own bytes."""

    key: bytes | None
    value: bytes | None
    headers: HeaderList


def dead_letter(
    message: Message, rejected: Rejected, group: str, now_ms: int, *, connect: bool = False
) -> DeadLetter:
    """The message and why it was rejected; `now_ms` stands in where no earlier failure is known.

    Attempts and the first failure are those of all its lives, also before a redrive or a retry.
    With `connect` there are the headers besides that Kafka Connect's own reporter writes.

    `sluice.answer` and `sluice.error.detail` may quote the message or the model: they belong to
    whoever may read the dead letter topic.
    """
    headers = [
        *message.headers,
        *_broker_headers(message, rejected, group),
        *(_connect_headers(message, rejected, group) if connect else ()),
        *_our_headers(message, rejected, now_ms),
        *message.trace,  # behind the marker: the message's own stay what they were
    ]
    return DeadLetter(message.key, message.value, headers)


def smaller(
    message: Message, rejected: Rejected, group: str, now_ms: int, *, connect: bool = False
) -> Iterator[DeadLetter]:
    """The same dead letter, from whole to smallest: without the answer, without the detail too.

    Key, value and original headers are never cut: where the last one is too large as well, the
    topic has to take larger messages.
    """
    yield dead_letter(message, rejected, group, now_ms, connect=connect)
    if rejected.answer is not None:
        rejected = replace(rejected, answer=None)
        yield dead_letter(message, rejected, group, now_ms, connect=connect)
    if rejected.detail:
        yield dead_letter(message, replace(rejected, detail=""), group, now_ms, connect=connect)


def redacted(rejected: Rejected) -> Rejected:
    """Without what can repeat the text: the answer, and the detail, which can quote both."""
    return replace(rejected, answer=None, detail="")


def original_headers(headers: Headers) -> Headers:
    """The headers that the message had when it was read: all before the last marker."""
    for index in range(len(headers) - 1, -1, -1):
        if headers[index][0] == MARKER:
            return headers[:index]
    return headers


def _broker_headers(message: Message, rejected: Rejected, group: str) -> HeaderList:
    """The set that brokers write for share groups (KIP-1191), so that its tools work here too."""
    at = message.coordinates
    return [
        (MARKER, at.topic.encode()),
        ("__dlq.errors.partition", b"%d" % at.partition),
        ("__dlq.errors.offset", b"%d" % at.offset),
        ("__dlq.errors.group", group.encode()),
        ("__dlq.errors.delivery.count", b"%d" % max(1, rejected.attempts)),
        ("__dlq.errors.message", SENTENCES[rejected.reason].encode()),
    ]


def _connect_headers(message: Message, rejected: Rejected, group: str) -> HeaderList:
    """As Kafka Connect's dead letter queue writes its context, numbers as text. No stack trace:
    nothing was thrown."""
    at = message.coordinates
    context = {
        "topic": at.topic,
        "partition": str(at.partition),
        "offset": str(at.offset),
        "connector.name": group,
        "task.id": "0",
        "stage": STAGES.get(rejected.reason, "TRANSFORMATION"),
        "class.name": "sluice",
        "exception.class.name": f"sluice.{rejected.reason.value}",
        "exception.message": SENTENCES[rejected.reason],
    }
    return [(f"__connect.errors.{name}", text.encode()) for name, text in context.items()]


def _our_headers(message: Message, rejected: Rejected, now_ms: int) -> HeaderList:
    failed_ms = now_ms if rejected.first_failed_at_ms is None else rejected.first_failed_at_ms
    history = lived_on(message, rejected.attempts, failed_ms)
    headers: HeaderList = [
        (ID_HEADER, history.origin),
        *(((TOPIC_ID_HEADER, history.topic_id),) if history.topic_id else ()),
        ("sluice.source.timestamp", b"%d" % history.timestamp_ms),
        ("sluice.error.reason", rejected.reason.value.encode()),
        ("sluice.error.detail", _capped(rejected.detail, DETAIL_MAX_BYTES)),
        ("sluice.attempts", b"%d" % history.attempts),
        ("sluice.first.failed.at", b"%d" % history.first_failed_at_ms),
    ]
    if (provenance := rejected.provenance) is not None:
        headers += provenance_headers(provenance)
    if rejected.records_out:
        headers.append(("sluice.records.out", b"%d" % rejected.records_out))
    if rejected.answer is not None:
        headers.append(("sluice.answer", _capped(rejected.answer, ANSWER_MAX_BYTES)))
    return headers


def _capped(text: str, size_max: int) -> bytes:
    """UTF-8, at most `size_max` bytes, cut between characters; lone surrogates become `?`."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= size_max:
        return encoded
    return encoded[:size_max].decode("utf-8", "ignore").encode()
