"""A rejected message as a dead letter."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from service.core.history import History
from service.core.messages import Headers, Message, Partition, Provenance, Reason, Rejected
from service.kafka.letters.written import (
    ANSWER_MAX_BYTES,
    DETAIL_MAX_BYTES,
    SENTENCES,
    dead_letter,
    original_headers,
    smaller,
)
from service.kafka.provisioning import DEAD_LETTER_ROOM_BYTES
from service.kafka.sending.sizes import size_alone

NOW_MS = 1_700_000_009_000
PROVENANCE = Provenance("small", "p1", "s1", calls=3, tokens_input=10, tokens_output=4)
REJECTED = Rejected(
    Reason.INVALID,
    "age: not a number",
    provenance=PROVENANCE,
    attempts=3,
    first_failed_at_ms=1_700_000_001_000,
    answer='{"age": "old"}',
)


def message(headers: Headers = (), key: bytes | None = b"k", value: bytes | None = b"v") -> Message:
    return Message(Partition("notes", 3), 41, 1, key, value, headers, 1_700_000_000_123)


def test_a_topic_has_room_for_the_largest_dead_letter() -> None:
    """With answer and detail as long as they are kept, and each name as long as Kafka takes it."""
    rejected = replace(REJECTED, answer="a" * 2 * ANSWER_MAX_BYTES, detail="d" * ANSWER_MAX_BYTES)
    topic = "t" * 249
    of_it = Message(Partition(topic, 3), 41, 1, b"k", b"v", (), 1_700_000_000_123)
    letter = dead_letter(of_it, rejected, "g" * 249, NOW_MS, connect=True)
    alone = size_alone(b"k", b"v", [])
    assert size_alone(b"k", b"v", letter.headers) - alone < DEAD_LETTER_ROOM_BYTES


def test_headers_stand_in_their_order() -> None:
    """The message's own first, then the brokers' set, then ours."""
    letter = dead_letter(message((("a", b"\xff"), ("a", None))), REJECTED, "group", NOW_MS)
    assert letter.headers == [
        ("a", b"\xff"),
        ("a", None),
        ("__dlq.errors.topic", b"notes"),
        ("__dlq.errors.partition", b"3"),
        ("__dlq.errors.offset", b"41"),
        ("__dlq.errors.group", b"group"),
        ("__dlq.errors.delivery.count", b"3"),
        ("__dlq.errors.message", b"The model's answer did not validate, re-asks included."),
        ("sluice.id", b"notes:3:41"),
        ("sluice.source.timestamp", b"1700000000123"),
        ("sluice.error.reason", b"invalid"),
        ("sluice.error.detail", b"age: not a number"),
        ("sluice.attempts", b"3"),
        ("sluice.first.failed.at", b"1700000001000"),
        ("sluice.model", b"small"),
        ("sluice.prompt.version", b"p1"),
        ("sluice.schema.version", b"s1"),
        ("sluice.tokens.input", b"10"),
        ("sluice.tokens.output", b"4"),
        ("sluice.tokens.cached", b"0"),
        ("sluice.tokens.reasoning", b"0"),
        ("sluice.cached", b"false"),
        ("sluice.cost.usd", b"0"),
        ("sluice.answer", b'{"age": "old"}'),
    ]


NAMES = st.text(max_size=5) | st.sampled_from(["__dlq.errors.topic", "sluice.id", "sluice.answer"])
HEADERS = st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=5)), max_size=6).map(tuple)


@given(HEADERS, st.none() | st.binary(), st.none() | st.binary())
def test_the_message_can_be_had_back_byte_for_byte(
    headers: Headers, key: bytes | None, value: bytes | None
) -> None:
    """Key, value and headers are the message's own, even where it carried names of ours."""
    for letter in smaller(message(headers, key, value), REJECTED, "group", NOW_MS):
        assert (key, value) == (letter.key, letter.value)
        assert headers == original_headers(tuple(letter.headers))


def test_what_was_never_rejected_has_only_original_headers() -> None:
    """A message that is no dead letter keeps all its headers."""
    assert original_headers((("a", b"1"), ("sluice.id", b"x"))) == (
        ("a", b"1"),
        ("sluice.id", b"x"),
    )


def test_without_a_call_nothing_is_claimed_of_a_model() -> None:
    """A message rejected before any call names no model, no tokens, no answer, and fails now."""
    early = Rejected(Reason.UNDECODABLE, "the text is empty")
    headers = dict(dead_letter(message(), early, "group", NOW_MS).headers)
    assert headers["sluice.first.failed.at"] == str(NOW_MS).encode()
    assert headers["sluice.attempts"] == b"0"
    assert headers["__dlq.errors.delivery.count"] == b"1"
    assert not {"sluice.model", "sluice.tokens.input", "sluice.answer"} & set(headers)


def test_a_message_sent_again_keeps_its_origin() -> None:
    """A dead letter of a message that was sent again still names where it first came in."""
    again = message((("sluice.id", b"notes:0:5"),))
    headers = dict(dead_letter(again, REJECTED, "group", NOW_MS).headers)
    assert headers["sluice.id"] == b"notes:0:5"
    assert headers["__dlq.errors.offset"] == b"41"


def test_a_dead_letter_names_the_topics_id() -> None:
    """Behind the id that it belongs to; that of its origin where the message was sent again."""
    known = replace(message(), topic_id="A" * 22)
    headers = dead_letter(known, REJECTED, "group", NOW_MS).headers
    at = [name for name, _ in headers].index("sluice.id")
    assert headers[at + 1] == ("sluice.source.topic.id", b"A" * 22)
    history = History(b"notes:0:5", 17, attempts=8, first_failed_at_ms=23, topic_id=b"B" * 22)
    again = replace(message(history.headers), topic_id="A" * 22)
    assert (
        dict(dead_letter(again, REJECTED, "group", NOW_MS).headers)["sluice.source.topic.id"]
        == b"B" * 22
    )


def test_every_reason_has_its_sentence() -> None:
    """`__dlq.errors.message` is one fixed sentence a reason: it can't quote anything."""
    assert set(Reason) == set(SENTENCES)


@given(st.text(alphabet=st.characters(), min_size=1))
def test_long_answers_are_cut_between_characters(text: str) -> None:
    """Answer and detail are valid UTF-8 within their bounds, lone surrogates included."""
    long = text * (ANSWER_MAX_BYTES // len(text) + 1)
    wordy = Rejected(Reason.INVALID, long, answer=long)
    headers = dict(dead_letter(message(), wordy, "group", NOW_MS).headers)
    for name, size_max in (
        ("sluice.answer", ANSWER_MAX_BYTES),
        ("sluice.error.detail", DETAIL_MAX_BYTES),
    ):
        value = headers[name]
        assert value is not None
        value.decode()
        assert size_max - 4 < len(value) <= size_max


def test_it_shrinks_in_three_steps() -> None:
    """First the answer goes, then the detail; the reason and what it cost always stay."""
    whole, without_answer, least = smaller(message(), REJECTED, "group", NOW_MS)
    assert dict(whole.headers)["sluice.answer"] == b'{"age": "old"}'
    assert "sluice.answer" not in dict(without_answer.headers)
    assert dict(without_answer.headers)["sluice.error.detail"] == b"age: not a number"
    assert dict(least.headers)["sluice.error.detail"] == b""
    assert dict(least.headers)["sluice.error.reason"] == b"invalid"
    assert dict(least.headers)["sluice.tokens.input"] == b"10"


def test_lives_before_a_redrive_count() -> None:
    """Attempts go on from those before it was sent again, and the first failure stays the first."""
    history = History(b"notes:0:5", 17, attempts=8, first_failed_at_ms=23, redrives=1)
    again = message((("a", b"\xff"), *history.headers))
    headers = dict(dead_letter(again, REJECTED, "group", NOW_MS).headers)
    assert headers["sluice.id"] == b"notes:0:5"
    assert headers["sluice.source.timestamp"] == b"17"
    assert headers["sluice.attempts"] == b"11"
    assert headers["sluice.first.failed.at"] == b"23"
    assert headers["sluice.redrive.count"] == b"1"


def test_kafka_connects_names_by_choice() -> None:
    """`connect` adds what Kafka Connect's own reporter writes, behind the message's own headers."""
    plain = dead_letter(message((("a", b"1"),)), REJECTED, "group", NOW_MS).headers
    letter = dead_letter(message((("a", b"1"),)), REJECTED, "group", NOW_MS, connect=True)
    added = [header for header in letter.headers if header not in plain]
    assert added == [
        ("__connect.errors.topic", b"notes"),
        ("__connect.errors.partition", b"3"),
        ("__connect.errors.offset", b"41"),
        ("__connect.errors.connector.name", b"group"),
        ("__connect.errors.task.id", b"0"),
        ("__connect.errors.stage", b"TRANSFORMATION"),
        ("__connect.errors.class.name", b"sluice"),
        ("__connect.errors.exception.class.name", b"sluice.invalid"),
        (
            "__connect.errors.exception.message",
            b"The model's answer did not validate, re-asks included.",
        ),
    ]
    assert original_headers(tuple(letter.headers)) == (("a", b"1"),)


def test_a_trace_stands_behind_the_message() -> None:
    """Readers, who take the last header of a name, go on from our span; what is sent again is
    the message with the trace that it came with."""
    own: Headers = (("traceparent", b"theirs"),)
    traced = replace(message(own), trace=(("traceparent", b"ours"),))
    letter = dead_letter(traced, REJECTED, "group", NOW_MS)
    assert dict(letter.headers)["traceparent"] == b"ours"
    assert original_headers(tuple(letter.headers)) == own
