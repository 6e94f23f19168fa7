"""From a Kafka record to a text, and from an outcome to an output's headers."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.history import origin
from service.core.messages import (
    Aborted,
    Extracted,
    Headers,
    Message,
    Partition,
    Passed,
    Provenance,
    Reason,
    Record,
    Rejected,
    Skipped,
    TextCut,
)
from service.kafka.decoding import decoder
from service.kafka.headers import (
    aborted_headers,
    provenance_headers,
    record_headers,
    tombstone_headers,
)
from service.settings import InputSettings

CANARY = "canary"


def message(
    value: bytes | None, headers: Headers = (), key: bytes | None = b"key", offset: int = 41
) -> Message:
    return Message(Partition("notes", 3), offset, 1, key, value, headers, 1_700_000_000_123)


def decode(value: bytes | None, **settings: object) -> str | Rejected | Passed | Skipped:
    return decoder(InputSettings.model_validate(settings))(message(value))


def rejection(value: bytes, **settings: object) -> Rejected:
    outcome = decode(value, **settings)
    assert isinstance(outcome, Rejected)
    assert CANARY not in outcome.detail
    return outcome


@given(st.text().filter(lambda text: text.strip()))
def test_text_arrives_unchanged(text: str) -> None:
    """Whatever is UTF-8 and not empty is the text, to the last character."""
    assert text == decode(text.encode())


@given(st.text().filter(lambda text: text.strip()))
def test_json_text_arrives_unchanged(text: str) -> None:
    """A JSON string's characters are the text, escaped or not."""
    for ascii_only in (True, False):
        value = json.dumps({"a": {"b": text}}, ensure_ascii=ascii_only).encode()
        assert text == decode(value, format="json", text_field="a.b")


@given(st.binary())
def test_no_bytes_break_the_decoder(value: bytes) -> None:
    """Any bytes are a text or a rejection, in both formats; never an exception."""
    for chosen in ("text", "json"):
        assert isinstance(decode(value, format=chosen), str | Rejected)


@pytest.mark.parametrize("value", [b"", b" \n\t", "\u00a0\u3000".encode()])
def test_an_empty_text_is_rejected_and_says_so(value: bytes) -> None:
    """An empty text costs no call and is not lost: it is rejected with a reason."""
    assert Rejected(Reason.UNDECODABLE, "the text is empty") == decode(value)
    in_json = json.dumps({"text": value.decode()}).encode()
    assert Rejected(Reason.UNDECODABLE, "the text is empty") == decode(in_json, format="json")


def test_invalid_utf8_names_the_position() -> None:
    """Invalid UTF-8 says where, without quoting."""
    assert "position 6" in rejection(CANARY.encode() + b"\xff").detail


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (b"canary", "not JSON"),
        (b'{"text": "canary', "not JSON"),
        (b'{"text": "canary\xff"}', "not JSON"),
        (b'{"text": "canary\\ud800"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["canary"]', "no field 'text'"),
        (b'{"other": "canary"}', "no field 'text'"),
        (b'{"text": {"canary": 1}}', "field 'text' is no text"),
        (b'{"text": null}', "field 'text' is no text"),
    ],
)
def test_json_without_the_text_is_undecodable(value: bytes, detail: str) -> None:
    """What is wrong is said without quoting the value."""
    rejected = rejection(value, format="json")
    assert rejected.reason is Reason.UNDECODABLE
    assert detail in rejected.detail


def test_a_dot_does_not_step_into_a_text() -> None:
    """A path that goes on below a string has no field there."""
    assert "no field 'a.b'" in rejection(b'{"a": "canary"}', format="json", text_field="a.b").detail


@pytest.mark.parametrize(
    ("text", "fits"), [("abcd", True), ("abcde", False), ("éé", True), ("ééx", False)]
)
def test_the_bound_counts_the_texts_bytes(text: str, fits: bool) -> None:
    """`text_max_bytes` bounds the text's UTF-8 bytes in both formats; JSON around it is free."""
    for chosen, value in (("text", text), ("json", json.dumps({"text": text, "more": "x" * 99}))):
        outcome = decode(value.encode(), format=chosen, text_max_bytes=4)
        if fits:
            assert text == outcome
        else:
            assert isinstance(outcome, Rejected)
            assert outcome.reason is Reason.TOO_LONG
            assert "text_max_bytes is 4" in outcome.detail


def test_a_tombstone_is_what_the_setting_says() -> None:
    """A message without a value is handed on or skipped, never rejected."""
    assert Passed() == decode(None, tombstones="pass")
    assert Skipped() == decode(None, tombstones="skip")


EXTRACTED = Extracted(
    records=(Record(b"{}"), Record(b"{}")),
    provenance=Provenance("small", "p1", "s1", calls=2, tokens_input=10, tokens_output=4),
    answer_id="answer-7",
)


def test_an_outputs_headers_stand_in_their_order() -> None:
    """The input's own headers first, then ours in the documented order, as UTF-8 text."""
    headers = record_headers(message(b"text", (("a", b"\xff"), ("a", None))), EXTRACTED, 1)
    assert headers == [
        ("a", b"\xff"),
        ("a", None),
        ("sluice.id", b"notes:3:41:1"),
        ("sluice.answer.id", b"answer-7"),
        ("sluice.source.topic", b"notes"),
        ("sluice.source.partition", b"3"),
        ("sluice.source.offset", b"41"),
        ("sluice.source.timestamp", b"1700000000123"),
        ("sluice.record.index", b"1"),
        ("sluice.record.count", b"2"),
        ("sluice.model", b"small"),
        ("sluice.prompt.version", b"p1"),
        ("sluice.schema.version", b"s1"),
        ("sluice.tokens.input", b"10"),
        ("sluice.tokens.output", b"4"),
        ("sluice.tokens.cached", b"0"),
        ("sluice.tokens.reasoning", b"0"),
        ("sluice.cached", b"false"),
        ("sluice.cost.usd", b"0"),
    ]


def test_outputs_name_the_topics_id_where_it_is_known() -> None:
    """Of every kind; of a message sent again that of the topic in its `sluice.id`."""
    known = replace(message(b"text"), topic_id="A" * 22)
    named = ("sluice.source.topic.id", b"A" * 22)
    assert record_headers(known, EXTRACTED, 1)[2] == named
    assert named in tombstone_headers(known)
    assert named in aborted_headers(known, Aborted("answer-7", 1, EXTRACTED.provenance))
    again = replace(message(b"text", (("sluice.id", b"notes:0:5"),)), topic_id="A" * 22)
    assert "sluice.source.topic.id" not in dict(record_headers(again, EXTRACTED, 1))


def test_headers_say_what_is_known_of_the_cost() -> None:
    """Dollars without an exponent; none where a call's price is not known; what was cut."""
    spent = replace(
        EXTRACTED.provenance,
        tokens_cached=3,
        tokens_reasoning=2,
        cost_usd=0.00000015,
        cached=True,
        text_cut=TextCut(4096, 10_000),
    )
    assert provenance_headers(spent)[5:] == [
        ("sluice.tokens.cached", b"3"),
        ("sluice.tokens.reasoning", b"2"),
        ("sluice.cached", b"true"),
        ("sluice.cost.usd", b"0.00000015"),
        ("sluice.text.cut", b"4096/10000"),
    ]
    assert "sluice.cost.usd" not in dict(provenance_headers(replace(spent, calls_unpriced=1)))


def test_headers_tell_what_each_model_of_a_cascade_has_cost() -> None:
    """Only where more than one was asked; re-asks of a model are in its sum."""
    spent = EXTRACTED.provenance.and_one_call(1, 1, 0, 0, 0.00011)
    spent = spent.and_one_call(1, 1, 0, 0, 0.00011)
    assert "sluice.cost.models" not in dict(provenance_headers(spent))
    both = replace(spent, model="large").and_one_call(1, 1, 0, 0, 0.0011)
    costs = dict(provenance_headers(both))["sluice.cost.models"]
    assert costs == f"{EXTRACTED.provenance.model}=0.00022, large=0.0011".encode()
    assert both.cost_usd == pytest.approx(0.00132)


def test_a_tombstones_headers_name_no_model() -> None:
    """A tombstone that is handed on says where it came from and nothing of a model."""
    names = [name for name, _ in tombstone_headers(message(None, (("a", b"1"),)))]
    assert names == [
        "a",
        "sluice.id",
        "sluice.source.topic",
        "sluice.source.partition",
        "sluice.source.offset",
        "sluice.source.timestamp",
    ]


def test_headers_of_an_earlier_pass_do_not_pile_up() -> None:
    """An input that is an output already keeps no header of ours from there."""
    first = record_headers(message(b"text", (("own", b"1"),)), EXTRACTED, 0)
    second = record_headers(message(b"text", tuple(first), offset=99), EXTRACTED, 0)
    assert len(first) == len(second)
    assert dict(second)["sluice.id"] == b"notes:3:99:0"


def test_a_message_sent_again_keeps_its_origin() -> None:
    """A well-formed `sluice.id` of three parts is the origin of the new outputs' ids."""
    again = message(b"text", (("sluice.id", b"notes:0:5"),), offset=99)
    headers = dict(record_headers(again, EXTRACTED, 1))
    assert headers["sluice.id"] == b"notes:0:5:1"
    assert headers["sluice.source.offset"] == b"99"


@pytest.mark.parametrize(
    "claimed",
    [
        None,
        b"",
        b"notes:0",
        b"notes:0:5:1",  # a record's id: two records of one message would end under one id
        b"no tes:0:5",
        b"notes:0:-5",
        b"notes:0:5\n",
        b"notes:0:" + b"9" * 20,
        "notes:0:\u0665".encode(),
        b"\xff:0:5",
    ],
)
def test_a_malformed_origin_is_not_taken_over(claimed: bytes | None) -> None:
    """Anything else under that name is ignored: ids stay the message's own coordinates."""
    assert origin(message(b"text", (("sluice.id", claimed),))) == b"notes:3:41"


def test_a_trace_takes_the_place_of_the_inputs() -> None:
    """Where the message is traced, outputs carry its trace alone; else the input's own."""
    own: Headers = (("traceparent", b"theirs"), ("a", b"1"), ("tracestate", b"theirs"))
    ours: Headers = (("traceparent", b"ours"),)
    untraced = message(b"x", own)
    assert tombstone_headers(untraced)[:3] == list(own)
    traced = tombstone_headers(replace(untraced, trace=ours))
    assert traced[:2] == [("a", b"1"), ("traceparent", b"ours")]
    assert "tracestate" not in dict(traced)
