"""The codec of the completed map, against sets of offsets, arbitrary text and frozen text."""

import random
import string
import time
import traceback
import tracemalloc
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import completed
from service.core.completed import (
    PACKED_BYTES_MAX,
    RUNS_MAX,
    SPAN_MAX,
    TEXT_CHARS_MAX,
    Damaged,
    Runs,
    decode,
    encode,
    finished_ranges,
    fits_for_sure,
    fullness,
    runs_of,
)

GOLDEN = Path(__file__).parents[1] / "data" / "completed_map_v1.txt"
ALPHABET = set(string.ascii_letters + string.digits + "-_")
ROOM = 100_000
"""Characters that hold every map of these tests."""

EACH_KIND: dict[str, Runs] = {
    "r": (3, 1, 200, 70_000),
    "R": (500, 1) * 30,
    "b": (1, 1, 1, 2, 2, 1, 1, 1, 3, 1, 1, 2),
    "B": (2, 1, 2, 3) * 40,
}

lengths = st.one_of(st.integers(1, 4), st.integers(1, 300), st.integers(1, 2**22))
some_runs = st.one_of(
    st.lists(st.tuples(lengths, lengths), max_size=60),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=300),
    st.lists(st.tuples(lengths, lengths), max_size=3).map(lambda pairs: pairs * 40),
).map(lambda pairs: tuple(length for pair in pairs for length in pair))


def packed_text(kind: str, body: bytes) -> str:
    return kind + urlsafe_b64encode(body).decode().rstrip("=")


def deflated(packed: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(packed) + stream.flush()


def random_runs(offsets: int, share_unfinished: float) -> Runs:
    rng = random.Random(4)
    later = (offset for offset in range(1, offsets) if rng.random() < share_unfinished)
    return runs_of(0, ranges_between((0, *later), offsets))


# --- writing and reading ---


@given(some_runs)
def test_what_is_written_is_read(runs: Runs) -> None:
    """decode(encode(runs)) is runs where they fit."""
    assert runs == decode(encode(runs, ROOM))


@given(some_runs, st.integers(0, 400))
def test_the_text_is_a_plain_field_within_its_limit(runs: Runs, chars_max: int) -> None:
    """Letters, digits, - and _, so no separator; never longer than allowed."""
    text = encode(runs, chars_max)
    assert len(text) <= chars_max
    assert set(text) <= ALPHABET


@given(some_runs, st.integers(0, 400))
def test_what_does_not_fit_is_cut_at_the_end(runs: Runs, chars_max: int) -> None:
    """The runs read are the first ones written, and one pair more would not have fitted."""
    kept = decode(encode(runs, chars_max))
    assert kept == runs[: len(kept)]
    if kept != runs:
        assert len(encode(runs[: len(kept) + 2], ROOM)) > chars_max


@pytest.mark.parametrize("kind", EACH_KIND)
def test_each_kind_is_the_shortest_for_some_runs(kind: str) -> None:
    """Run-lengths, bitmap, and each of them compressed: none is there for nothing."""
    text = encode(EACH_KIND[kind], ROOM)
    assert kind == text[0]
    assert decode(text) == EACH_KIND[kind]


def test_no_runs_are_no_text() -> None:
    """Nothing finished beyond the next offset costs nothing."""
    assert encode((), 100) == ""
    assert decode("") == ()


@pytest.mark.parametrize("runs", [(1,), (1, 2, 3), (0, 1), (1, 0), (2, 1, -1, 1)])
def test_runs_that_are_none_are_a_mistake_of_ours(runs: Runs) -> None:
    """An odd number of them, or an empty one, is caught where it is made."""
    with pytest.raises(AssertionError):
        encode(runs, 100)


# --- offsets ---


@given(st.data())
def test_finished_is_what_is_not_unfinished(data: st.DataObject) -> None:
    """Up to the last unfinished or finished offset, holes are finished; whatever is cut off
    counts as unfinished, so that no unfinished offset is ever said to be finished."""
    next_offset = data.draw(st.sampled_from([0, 7, 2**62]))
    later = data.draw(st.sets(st.integers(1, data.draw(st.sampled_from([12, 60, 900])))))
    unfinished = {next_offset, *(next_offset + distance for distance in later)}
    end = max(unfinished) + 1 + data.draw(st.integers(0, 40))
    truth = set(range(next_offset, end)) - unfinished

    runs = runs_of(next_offset, ranges_between(sorted(unfinished), end))
    chars_max = data.draw(st.one_of(st.just(ROOM), st.integers(0, 60)))
    ranges = finished_ranges(next_offset, decode(encode(runs, chars_max)))
    finished = {offset for one in ranges for offset in one}

    if chars_max == ROOM:
        assert truth == finished
    cut = max(finished, default=-1)
    assert finished == {offset for offset in truth if offset <= cut}
    assert all(one.stop < other.start for one, other in pairwise(ranges))


def ranges_between(unfinished: Iterable[int], end: int) -> list[range]:
    """What is finished: all that lies between two unfinished offsets, and up to the end."""
    borders = pairwise([*unfinished, end])
    return [range(left + 1, right) for left, right in borders if left + 1 < right]


@pytest.mark.parametrize(
    ("expected", "finished"),
    [
        ((), []),
        ((1, 1), [range(6, 7)]),
        ((2, 3, 1, 4), [range(7, 10), range(11, 15)]),
        ((2, 7), [range(7, 10), range(10, 14)]),
    ],
)
def test_runs_start_at_the_next_offset(expected: Runs, finished: list[range]) -> None:
    """With an unfinished run, and end with a finished one; ranges that touch are one."""
    assert expected == runs_of(5, finished)


@pytest.mark.parametrize(
    "finished", [[range(5, 6)], [range(4, 6)], [range(8, 9), range(6, 7)]], ids=str
)
def test_ranges_in_disorder_are_a_mistake_of_ours(finished: list[range]) -> None:
    """They lie beyond the next offset and ascend."""
    with pytest.raises(AssertionError):
        runs_of(5, finished)


def test_ranges_are_absolute() -> None:
    """Half open, from the next offset on."""
    assert finished_ranges(100, (2, 3, 1, 4)) == (range(102, 105), range(106, 110))
    assert finished_ranges(100, ()) == ()


# --- text of others ---


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """Damaged is all that a foreign text raises."""
    try:
        runs = decode(text)
    except Damaged:
        return
    assert runs == decode(encode(runs, ROOM))


@pytest.mark.parametrize("text", ["secret", "rsecret", "Rsecret", "bsecret", "rsecret\N{SNOWMAN}"])
def test_a_refusal_does_not_repeat_the_text(text: str) -> None:
    """Neither the message nor what it came from holds what a stranger wrote."""
    with pytest.raises(Damaged) as refused:
        decode(text)
    assert "secret" not in "".join(traceback.format_exception(refused.value, limit=0))


@given(st.sampled_from("rRbB"), st.binary(max_size=80), st.booleans())
def test_any_bytes_are_read_or_refused(kind: str, packed: bytes, deflate: bool) -> None:
    """What is read can be written, and is then read as the same."""
    try:
        runs = decode(packed_text(kind, deflated(packed) if deflate else packed))
    except Damaged:
        return
    assert runs == decode(encode(runs, ROOM))


@given(some_runs.filter(bool), st.data())
def test_a_changed_map_is_read_or_refused(runs: Runs, data: st.DataObject) -> None:
    """One character replaced, taken out, put in, or the end cut off."""
    text = encode(runs, ROOM)
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.sampled_from(["", *sorted(ALPHABET), "=", ":", "\n", "é"]))
    kept = data.draw(st.sampled_from([text[at:], text[at + 1 :], ""]))
    try:
        changed = decode(text[:at] + put + kept)
    except Damaged:
        return
    assert changed == decode(encode(changed, ROOM))


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("unknown", "q" + encode((1, 1), 9)[1:]),
        ("unknown", "2rAQE"),
        ("unknown", "é"),
        ("ASCII", "rAQÉ"),
        ("not base64$", "rAQEBA"),
        ("the form that we write", "rAQE="),
        ("the form that we write", "rAQ EA"),
        ("the form that we write", "rAQF"),  # bits behind the last byte
        ("the form that we write", "r+/+/"),
        ("empty run", "r"),
        ("empty run", packed_text("r", b"\x01")),
        ("empty run", packed_text("r", b"\x01\x00")),
        ("empty run", packed_text("r", b"\x00\x01")),
        ("empty run", packed_text("r", b"\x80\x01\x00")),
        ("too wide", packed_text("r", b"\x01\x81\x00")),
        ("too large", packed_text("r", b"\x01" + b"\xff" * 5 + b"\x01")),
        ("cut off", packed_text("r", b"\x01\x81")),
        ("too far", packed_text("r", b"\x01\x80\x80\x80\x80\x08")),  # SPAN_MAX + 1
        ("finished offset", "b"),
        ("finished offset", packed_text("b", b"\x03")),
        ("finished offset", packed_text("b", b"\x02\x00")),
        ("decompress", packed_text("R", b"\xff\xff")),
        ("cut off", packed_text("R", deflated(b"\x01\x01")[:-1])),
        ("has bytes behind its end", packed_text("R", deflated(b"\x01\x01") + b"\x00")),
        ("too large", packed_text("R", deflated(b"\x01" * (PACKED_BYTES_MAX + 1)))),
        ("too many runs", packed_text("B", deflated(b"\xaa" * (RUNS_MAX // 8 + 1)))),
        ("too far", packed_text("R", deflated(b"\x01" * (RUNS_MAX + 2)))),
        ("too long", "r" + "AQEB" * (TEXT_CHARS_MAX // 4)),
    ],
)
def test_a_text_that_is_no_map_is_refused(reason: str, text: str) -> None:
    """Whatever `encode` does not write, and whatever would grow beyond its bounds."""
    with pytest.raises(Damaged, match=reason):
        decode(text)


@pytest.mark.parametrize("kind", ["R", "B"])
@pytest.mark.parametrize("packed", [b"\x01", b"\xaa", b"\x00"])
def test_a_bomb_is_refused_before_it_grows(kind: str, packed: bytes) -> None:
    """300 kB of text that stand for 200 MB take a few megabytes and no time."""
    bomb = packed_text(kind, deflated(packed * 200_000_000))
    tracemalloc.start()
    started_s = time.perf_counter()
    with pytest.raises(Damaged):
        decode(bomb)
    took_s, (_, peak_bytes) = time.perf_counter() - started_s, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 2
    assert peak_bytes < 20_000_000


# --- limits ---


@pytest.mark.parametrize(
    "runs",
    [
        (1, SPAN_MAX - 1),
        (1, 1) * (RUNS_MAX // 2),
        (SPAN_MAX // RUNS_MAX,) * RUNS_MAX,
        (2**14,) * (RUNS_MAX - 400) + (2**21,) * 400,  # the most bytes that the limits allow
    ],
)
def test_maps_at_the_limits_are_written_whole(runs: Runs) -> None:
    """The limits of reading and writing are the same, and none is hidden behind another."""
    assert runs == decode(encode(runs, TEXT_CHARS_MAX))
    assert len(completed._varints(runs)) <= PACKED_BYTES_MAX


def test_a_bitmap_at_the_limit_is_read() -> None:
    """The limit of decompression is the largest bitmap that is written, not one byte less."""
    bitmap = (b"\x00" * 4 + b"\xff" * 4) * (PACKED_BYTES_MAX // 8)
    assert decode(packed_text("B", deflated(bitmap))) == (32,) * RUNS_MAX


@pytest.mark.parametrize(
    ("kept", "runs"),
    [
        (2, (1, 1, 1, SPAN_MAX - 2)),
        (4, (1, 1, 1, SPAN_MAX - 3, 1, 1)),
        (0, (1, SPAN_MAX)),
        (RUNS_MAX, (1, 1) * RUNS_MAX),
    ],
)
def test_beyond_the_limits_the_rest_is_left_out(kept: int, runs: Runs) -> None:
    """What can't be read is not written, and fullness says that something is missing."""
    text = encode(runs, 4096)
    assert decode(text) == runs[:kept]
    assert len(text) < 0.1 * 4096
    assert fullness(runs, text, 4096) >= 1


def test_fullness_is_the_share_of_the_nearest_limit() -> None:
    """Of the text's length, with room for nothing as well, and of nothing else in usual maps."""
    assert fullness((1, 1), "r" * 30, 40) == 0.75
    assert fullness((), "", 0) == 0
    assert fullness((1, 1), "", 0) < 0.01
    assert fullness((1, SPAN_MAX // 2), "rAA", 4096) > 0.5


def test_a_million_offsets_are_cut_in_bounded_time() -> None:
    """The search for the longest prefix that fits does not pack a million offsets each time."""
    runs = random_runs(1_000_000, share_unfinished=0.3)
    started_s = time.perf_counter()
    text = encode(runs, 3900)
    assert time.perf_counter() - started_s < 1
    assert 3890 < len(text) <= 3900
    assert sum(decode(text)) > 23_000


@pytest.mark.parametrize("runs", [(1, 100_000), (40, 40) * (RUNS_MAX // 2)])
def test_a_bitmap_is_tried_where_it_could_win(runs: Runs) -> None:
    """Not over the holes of a compacted topic, nor over more than can be read."""
    assert [kind for kind, _ in completed._candidates(runs)] == ["r", "R"]


def test_a_usual_window_is_short() -> None:
    """800 offsets take at most their bits, whatever is finished of them; fewer where few are."""
    assert len(encode(random_runs(5000, 0.1), 4096)) < 500
    for share in (0.02, 0.1, 0.5, 0.9):
        assert len(encode(random_runs(800, share), 4096)) <= 1 + -(-800 // 6)


# --- the format is frozen ---


def golden() -> list[tuple[str, Runs]]:
    rows = [line.split(" ", 1) for line in GOLDEN.read_text(encoding="ascii").splitlines()]
    return [(text, tuple(map(int, runs.split()))) for text, runs in rows]


@pytest.mark.parametrize(("text", "runs"), golden())
def test_maps_of_version_1_mean_what_they_meant(text: str, runs: Runs) -> None:
    """The lines of tests/data/completed_map_v1.txt are stored in brokers: never change one."""
    assert runs == decode(text)


def test_the_golden_file_has_each_kind() -> None:
    """And today's text of plain kinds is that of the file; zlib's may differ by its version."""
    assert {text[0] for text, _ in golden()} == set(EACH_KIND)
    for text, runs in golden():
        if text[0] in "rb":
            assert text == encode(runs, ROOM)


@given(
    st.lists(st.one_of(st.integers(1, 3), st.integers(1, 300)), max_size=60).map(
        lambda runs: tuple(runs[: len(runs) // 2 * 2])
    ),
    st.integers(2, 80),
)
def test_what_fits_for_sure_is_whole_and_stays_so_while_the_oldest_finish(
    runs: Runs, chars: int
) -> None:
    """The first unfinished offset goes, then the next; no such map is ever cut."""
    sure = fits_for_sure(runs, chars)
    while runs:
        assert not sure or decode(encode(runs, chars)) == runs
        runs = (runs[0] - 1, *runs[1:]) if runs[0] > 1 else runs[2:]
        assert not sure or fits_for_sure(runs, chars)
        sure = fits_for_sure(runs, chars)


def test_a_map_that_reaches_too_far_fits_nowhere() -> None:
    """However short its text is."""
    assert fits_for_sure((1, SPAN_MAX - 1), ROOM)
    assert not fits_for_sure((1, SPAN_MAX), ROOM)
