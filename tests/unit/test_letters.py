"""A dead letter, read back and shown."""

import io
import json
import sys
from collections import Counter

import pytest
from aiokafka.structs import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from service.commands.dead_letters import (
    _confirmed,
    _row,
    as_json_line,
    as_object,
    counted,
    moment,
    plain,
    shown,
)
from service.core.errors import CannotRun
from service.core.history import History
from service.core.messages import Headers, Message, Partition, Provenance, Reason, Rejected
from service.kafka.group.due import DueTimes
from service.kafka.letters.reader import Letter, Redriven, Selection, mark, marked
from service.kafka.letters.redrive import Left, RedrivePlan
from service.kafka.letters.written import dead_letter

PROVENANCE = Provenance("small", "p1", "s1", tokens_input=10, tokens_output=4)
REJECTED = Rejected(Reason.INVALID, "age: old", PROVENANCE, 3, 77, '{"age": "old"}')


def record(headers: Headers, offset: int = 5, value: bytes | None = b"v") -> ConsumerRecord:
    return ConsumerRecord("dead", 2, offset, 1_700_000_000_999, 0, b"k", value, None, 1, 1, headers)


def letter(headers: Headers = (), *, connect: bool = False) -> Letter:
    message = Message(Partition("notes", 3), 41, 1, b"k", b"v", headers, 1_700_000_000_123)
    made = dead_letter(message, REJECTED, "group", 99, connect=connect)
    read = Letter.of(record(tuple(made.headers)))
    assert read is not None
    return read


def test_what_was_written_is_read() -> None:
    """Reason, origin, attempts, provenance; Kafka Connect's names besides change nothing."""
    for connect in (False, True):
        read = letter((("a", b"\xff"),), connect=connect)
        assert (read.reason, read.detail, read.attempts) == ("invalid", "age: old", 3)
        assert read.origin == ("notes", 3, 41)
        assert read.own_headers == (("a", b"\xff"),)
        assert (read.said("sluice.model"), read.number("sluice.tokens.input")) == ("small", 10)
        assert read.history == History(b"notes:3:41", 1_700_000_000_123, 3, 77, redrives=1)


def test_a_letter_of_a_redriven_message() -> None:
    """Its own headers are those of before the first redrive, and the count goes on."""
    before = History(b"notes:0:5", 17, attempts=8, first_failed_at_ms=23, redrives=2, retries=4)
    read = letter((("a", b"1"), *before.headers))
    assert read.own_headers == (("a", b"1"),)
    assert read.redrives == 2
    assert read.history == History(b"notes:0:5", 17, 11, 23, redrives=3)


@pytest.mark.parametrize(("written", "read"), [(b"A" * 22, b"A" * 22), (b"?", b"")])
def test_the_topics_id_goes_along_when_a_letter_is_sent_again(written: bytes, read: bytes) -> None:
    """It belongs to the origin; of a letter by others only where it has the form of one."""
    headers = (*letter().headers, ("sluice.source.topic.id", written))
    again = Letter.of(record(headers))
    assert again is not None
    assert again.history.topic_id == read


def test_a_letter_of_others() -> None:
    """What brokers write for share groups (KIP-1191) is enough to be shown and sent again."""
    read = Letter.of(
        record(
            (
                ("__dlq.errors.topic", b"notes"),
                ("__dlq.errors.partition", b"3"),
                ("__dlq.errors.offset", b"41"),
                ("__dlq.errors.message", b"too many deliveries"),
            )
        )
    )
    assert read is not None
    assert (read.origin, read.reason) == (("notes", 3, 41), "")
    assert read.detail == "too many deliveries"
    assert read.history == History(b"notes:3:41", -1, 0, 1_700_000_000_999, redrives=1)


def test_what_is_no_letter() -> None:
    """Marks and records of others are passed over."""
    assert Letter.of(record((mark([1, 2]),))) is None
    assert Letter.of(record((("a", b"1"),))) is None


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=9))
def test_marks_are_read_back(offsets: list[int]) -> None:
    """A mark names exactly the letters that it was written for."""
    assert marked(record((mark(offsets),))) == offsets


def test_no_other_record_is_a_mark() -> None:
    """A letter whose message had a header of this name marks nothing, nor does a damaged one."""
    assert marked(record((("a", b"1"), mark([1])))) == []
    assert marked(record((("sluice.redriven", b"1,,2"),))) == []
    assert marked(record((("sluice.redriven", None),))) == []


def test_a_mark_is_for_its_own_partition() -> None:
    """Offsets are those of the partition in which the mark stands."""
    redriven = Redriven()
    redriven.note(record((mark([5]),), offset=9))
    assert redriven.when_ms(letter()) == 1_700_000_000_999
    redriven = Redriven({0: {5: 1}})
    assert redriven.when_ms(letter()) is None


def test_selection() -> None:
    """Every filter that is set must hold."""
    read = letter()
    assert Selection().takes(read)
    assert Selection(frozenset({(2, 5)}), frozenset({"invalid"}), 0, 2**50, 3, "notes", "v").takes(
        read
    )
    assert not Selection(at=frozenset({(0, 5)})).takes(read)
    assert not Selection(reasons=frozenset({"refused"})).takes(read)
    assert not Selection(since_ms=1_700_000_001_000).takes(read)
    assert not Selection(until_ms=1_700_000_000_999).takes(read)
    assert not Selection(partition=2).takes(read)
    assert not Selection(topic="dead").takes(read)
    assert not Selection(text="w").takes(read)


def test_nothing_steers_the_terminal() -> None:
    """Escape sequences and marks that turn the reading order are shown, not sent; lines stay."""
    assert plain("a\x1b[2Jb\u202ec\nä") == "a\\x1b[2Jb\\u202ec\nä"
    assert shown(b"\xff\x1b") == "b'\\xff\\x1b'"
    assert shown(None) == "none"


def test_an_object_for_scripts() -> None:
    """Text where it is UTF-8, base64 where not; what is not known is null."""
    found = as_object(letter((("a", b"\xff"), ("b", b"x"))), Redriven())
    assert found["value"] == "v"
    assert found["headers"] == [
        {"name": "a", "value_base64": "/w=="},
        {"name": "b", "value": "x"},
    ]
    assert (found["tokens_input"], found["cost_usd"], found["redriven_ms"]) == (10, 0.0, None)


def test_odd_times_are_shown() -> None:
    """A time beyond all calendars is a number."""
    assert moment(0) == "1970-01-01T00:00:00Z"
    assert moment(2**62) == str(2**62)


def test_only_what_is_due_is_handed_on() -> None:
    """The first message of the retry topic that is not due closes its partition until it is."""
    now_ms = 1_000
    due = DueTimes("later", lambda: now_ms)
    where = Partition("later", 2)
    early, late = (
        record(History(b"notes:3:41", 1, 2, 3, retries=1, due_ms=each).headers)
        for each in (1_000, 1_001)
    )
    assert due.first_not_due(where, [early, record(())]) is None
    assert due.open(where)
    assert due.first_not_due(Partition("notes", 2), [late]) is None
    assert due.first_not_due(where, [early, late, early]) == 1
    assert not due.open(where)
    now_ms = 1_001
    assert due.open(where)


def test_without_anybody_to_ask_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a script a redrive needs --yes; what would be left is said first."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(CannotRun, match="add --yes"):
        _confirmed(RedrivePlan(sent=2, left={Left.ALREADY: [letter()]}))
    assert "1 were sent again before; --again sends them once more (2:5)" in capsys.readouterr().out


STEERING = "in\x1b[2Jvalid\x9b31m\u202e\n"


def test_no_part_of_the_list_steers_a_terminal() -> None:
    """A forged reason or topic is shown by its escapes: in the table, the last line and JSON."""
    names = {"sluice.error.reason", "__dlq.errors.topic", "sluice.model", "sluice.error.detail"}
    headers = ((n, STEERING.encode() if n in names else value) for n, value in letter().headers)
    forged = Letter.of(record(tuple(headers)))
    assert forged is not None
    cells = [*_row(forged, Redriven({}))]
    line = counted(Counter({STEERING: 2}), 0)
    json_line = as_json_line(as_object(forged, Redriven({})))
    assert all(each.isprintable() for each in (*cells, line, json_line))
    assert json.loads(json_line)["reason"] == STEERING
