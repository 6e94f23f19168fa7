"""Where reading starts, decided from what Kafka stores."""

import os
import string
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.messages import Partition
from service.core.tracker import Progress
from service.core.window import MAP_CHARS_MAX
from service.kafka.client import stored as module
from service.kafka.client.instances import Bearer, began, this_process
from service.kafka.client.stored import (
    FIELDS_CHARS_MAX,
    METADATA_CHARS_MAX,
    NO_OTHERS,
    Mark,
    Others,
    Stored,
    held_out_for_good,
    read,
    to_store,
)
from service.kafka.group.settling import SettlingClock
from service.kafka.group.starts import (
    HeldOut,
    LogRange,
    is_new,
    leader_epochs,
    others_to_keep,
    started_over,
    starts,
    taken_over,
    where_to_start,
)

P, Q = Partition("in", 0), Partition("in", 1)
NONCE = "0123456789abcdef"
MARK = Mark(NONCE)
OTHER_LETTERS = sorted(set(string.ascii_letters) - module._KNOWN.keys())
"""Those of fields that a later version may write."""


@pytest.mark.parametrize(
    ("stored", "chosen", "expected"),
    [
        (None, 7, 7),
        (None, 0, 0),
        (None, None, 5),
        (5, None, 5),
        (9, None, 9),
        (3, None, 3),
        (9, 7, 9),
    ],
)
def test_a_start_is_what_is_stored_else_what_is_chosen_else_the_logs(
    stored: int | None, chosen: int | None, expected: int
) -> None:
    """The settings choose only where nothing is stored."""
    found = None if stored is None else Stored(stored, "")
    assert where_to_start(P, found, LogRange(5, 9), chosen) == expected


def test_beyond_the_end_nobody_starts() -> None:
    """The sentence names the partition, both offsets and the ways out."""
    held_out = where_to_start(P, Stored(10, ""), LogRange(5, 9), None)
    assert isinstance(held_out, HeldOut)
    assert held_out.cut_at == 9
    for words in (
        *("in[0]", "up to offset 10", "ends at 9:", "--start-over", "from 9"),
        *("--reset-offsets", "kafka.group_id"),
    ):
        assert words in held_out.problem


CUT = to_store(Progress(90, (2, 3, 1, 4)), replace(MARK, cut_at=60))
"""100 was read, and then the log ended at 60."""


@pytest.mark.parametrize("end", [50, 60, 90, 95, 100, 101, 10_000])
@pytest.mark.parametrize("stored", [CUT, held_out_for_good(Stored(100, "x"), 60, NONCE)])
def test_a_log_that_was_cut_stays_held_out(stored: Stored, end: int) -> None:
    """However far it has grown since: new messages stand under the offsets of lost ones."""
    held_out = where_to_start(P, stored, LogRange(0, end), None)
    assert isinstance(held_out, HeldOut)
    assert held_out.cut_at == min(60, end)
    assert ("has grown since" in held_out.problem) == (end > 60)


def test_a_map_beyond_the_end_shows_a_cut_too() -> None:
    """The offset may still be in the log; what is finished beyond it must not hide new messages."""
    stored = to_store(Progress(50, (1, 49)), MARK)
    assert where_to_start(P, stored, LogRange(0, 100), None) == 50
    held_out = where_to_start(P, stored, LogRange(0, 99), None)
    assert isinstance(held_out, HeldOut)
    assert held_out.cut_at == 99


def test_a_cut_is_found_where_the_last_leader_has_written_less_than_was_read() -> None:
    """Whatever new messages stand there by now; a log that is whole or says nothing is read."""
    stored = to_store(Progress(90, (2, 8)), replace(MARK, leader_epoch=3))
    assert leader_epochs({P, Q}, {P: stored, Q: None}) == {P: 3}
    for epoch_end in (None, 100, 120):
        assert where_to_start(P, stored, LogRange(0, 200), None, None, epoch_end) == 90
    held_out = where_to_start(P, stored, LogRange(0, 200), None, None, 99)
    assert isinstance(held_out, HeldOut)
    assert held_out.cut_at == 99
    assert "has grown since" in held_out.problem


def test_the_trace_of_a_cut_leaves_the_rest_as_it_was() -> None:
    """Offset, map, counts and whose they are; also where others have stored."""
    before = to_store(Progress(90, (2, 3), 1, 91), replace(MARK, topic_id="A"))
    assert read(held_out_for_good(before, 60, "f" * 16)) == (
        Progress(90, (2, 3), 1, 91),
        replace(MARK, topic_id="A", cut_at=60),
    )
    assert held_out_for_good(Stored(9, "x"), 6, NONCE) == Stored(9, f"sluice1:{NONCE}:H6")


@pytest.mark.parametrize(
    ("stored", "cut_at", "expected"),
    [
        (Stored(100, ""), 60, Progress(60)),
        (to_store(Progress(60, (2, 3)), MARK), 60, Progress(60)),
        (to_store(Progress(50, (2, 3, 1, 20, 5, 5)), MARK), 60, Progress(50, (2, 3, 1, 4))),
        (to_store(Progress(50, (2, 3, 5, 5)), MARK), 60, Progress(50, (2, 3))),
        (to_store(Progress(50, (20, 3)), MARK), 60, Progress(50)),
    ],
)
def test_starting_over_behind_a_cut_loses_nothing_and_repeats_nothing(
    stored: Stored, cut_at: int, expected: Progress
) -> None:
    """From the cut, or from what is unfinished before it; what was finished before it stays so."""
    assert started_over(stored, HeldOut("", cut_at), chosen=7) == expected


def test_starting_over_is_as_in_a_new_group_where_the_topic_is_another() -> None:
    """Nothing that is stored says anything of it."""
    assert started_over(Stored(100, ""), HeldOut(""), chosen=7) == Progress(7)
    assert started_over(None, HeldOut(""), chosen=7) == Progress(7)


def test_no_partition_of_a_topic_made_again_is_started() -> None:
    """Not even one without an offset; until somebody has started the new topic. Others are."""
    old, new = (to_store(Progress(4), replace(MARK, topic_id=each)) for each in "AB")
    other = Partition("other", 0)
    bounds, ids = {each: LogRange(0, 9) for each in (P, Q, other)}, {"in": "B", "other": "C"}

    def started(stored: dict[Partition, Stored | None]) -> set[Partition]:
        found = starts(stored.keys(), stored, bounds, {}, ids, {})
        return {each for each, at in found.items() if isinstance(at, int)}

    assert started({P: old, Q: None, other: None}) == {other}
    assert started({P: old, Q: new, other: None}) == {Q, other}
    assert started({P: None, Q: new, other: None}) == {P, Q, other}
    assert started({P: None, Q: None, other: None}) == {P, Q, other}


def test_an_offset_of_a_topic_made_again_is_not_believed() -> None:
    """Another topic id: held out, even where the offset would fit; unknown ids say nothing."""
    stored = to_store(Progress(7), replace(MARK, topic_id="AAAAAAAAAAAAAAAAAAAAAA"))
    bounds = LogRange(0, 9)
    held_out = where_to_start(P, stored, bounds, None, "BBBBBBBBBBBBBBBBBBBBBB")
    assert isinstance(held_out, HeldOut)
    for words in ("in[0], 7", "deleted", "pay for", "--reset-offsets"):
        assert words in held_out.problem
    assert where_to_start(P, stored, bounds, None, "AAAAAAAAAAAAAAAAAAAAAA") == 7
    assert where_to_start(P, stored, bounds, None, None) == 7
    assert where_to_start(P, to_store(Progress(7), MARK), bounds, None, "any") == 7


@pytest.mark.parametrize(
    ("stored", "new"),
    [
        ({}, True),
        ({P: None, Q: None}, True),
        ({P: None, Q: Stored(1, "")}, False),
        ({P: None, Q: to_store(Progress(1), MARK)}, False),
        ({P: None, Q: to_store(Progress(1), replace(MARK, began=3))}, True),
        ({P: None, Q: to_store(Progress(1), replace(MARK, began=2))}, False),
        ({P: None, Q: to_store(Progress(1), replace(MARK, began=33))}, False),
    ],
)
def test_a_group_is_new_in_the_generation_that_found_it_new(
    stored: dict[Partition, Stored | None], new: bool
) -> None:
    """Its members store their starts one after the other, and each must see the group as new."""
    assert is_new(stored, generation=3) is new


PROGRESS = st.builds(
    Progress,
    next_offset=st.integers(0, 2**63 - 1),
    runs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=200).map(
        lambda pairs: tuple(length for pair in pairs for length in pair)
    ),
    unclean_ends=st.integers(0, 999),
    alone=st.none() | st.integers(0, 2**63 - 1),
)
LONGEST = Bearer("f" * 8, "f" * 8, 10**7 - 1, 10**12 - 1)
MARKS = st.builds(
    Mark,
    bearer=st.none() | st.just(LONGEST) | st.just(Bearer("0a1b2c3d", "4e5f6071", 1, 0)),
    nonce=st.just(NONCE),
    began=st.none() | st.integers(0, 2**31 - 1),
    topic_id=st.none() | st.text("abcXYZ019_-", min_size=1, max_size=22),
    cut_at=st.none() | st.integers(0, 2**63 - 1),
    leader_epoch=st.none() | st.integers(0, 2**31 - 1),
)


@given(PROGRESS, MARKS)
def test_what_is_stored_is_read_as_it_was(progress: Progress, mark: Mark) -> None:
    """Whatever its fields are; it is ASCII and fits into what brokers take."""
    stored = to_store(progress, mark)
    assert read(stored) == (progress, mark)
    assert stored.metadata.isascii()
    assert len(stored.metadata) <= METADATA_CHARS_MAX


VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"))
FIELDS = st.dictionaries(st.sampled_from(OTHER_LETTERS), VALUES.filter(bool), max_size=9).map(
    lambda values: tuple(letter + value for letter, value in values.items())
)


def with_fields(stored: Stored, fields: tuple[str, ...]) -> Stored:
    """As a later version writes it: more fields, before the map."""
    head, colon, encoded = stored.metadata.partition(":m")
    return replace(stored, metadata=":".join((head, *fields)) + colon + encoded)


@given(PROGRESS, MARKS, FIELDS)
def test_fields_of_a_later_version_are_passed_over_and_kept(
    progress: Progress, mark: Mark, fields: tuple[str, ...]
) -> None:
    """The map beside them counts, and they are written back as they stood."""
    later = with_fields(to_store(progress, mark), fields)
    found = read(later)
    assert found is not None
    assert found[0] == progress
    assert found[1].others.fields == fields
    if len(later.metadata) < FIELDS_CHARS_MAX:
        assert to_store(*found) == later


@given(PROGRESS, MARKS, FIELDS, st.integers(0, 2**63 - 1))
def test_only_what_stays_true_is_kept_at_another_offset(
    progress: Progress, mark: Mark, fields: tuple[str, ...], next_offset: int
) -> None:
    """A field with a capital letter says something of the offset beside which it stood."""
    found = read(with_fields(to_store(progress, mark), fields))
    assert found is not None
    moved = replace(progress, next_offset=next_offset)
    again = read(to_store(moved, found[1]))
    assert again is not None
    assert again[0] == moved
    kept = again[1].others.fields
    if next_offset != progress.next_offset:
        assert not any(each[0].isupper() for each in kept)
    assert set(kept) <= set(fields)


def test_the_map_keeps_its_part_whatever_others_store() -> None:
    """What would take more than fields may have is dropped; the rest of it is still there."""
    random, fields = Random(7), ("x1", "y" * FIELDS_CHARS_MAX, "Z2")
    runs = tuple(random.randrange(1, 400) for _ in range(10_000))
    alone = to_store(Progress(5, runs), MARK)
    stored = to_store(Progress(5, runs), replace(MARK, others=Others(fields, 5)))
    head, _, encoded = stored.metadata.partition(":m")
    assert head.endswith(f"{NONCE}:x1:Z2")
    assert len(encoded) > MAP_CHARS_MAX - 10
    assert len(stored.metadata) <= METADATA_CHARS_MAX
    assert len(alone.metadata) > METADATA_CHARS_MAX - 10, "room that nobody uses is the map's"


def test_fields_go_no_further_than_the_offset_that_is_read_on() -> None:
    """Where reading starts elsewhere than at what is stored, nothing of it is believed."""
    stored = with_fields(to_store(Progress(5), MARK), ("x1", "Y2"))
    assert others_to_keep(5, stored) == Others(("x1", "Y2"), 5)
    assert others_to_keep(6, stored) == NO_OTHERS
    assert others_to_keep(5, Stored(5, "foreign")) == NO_OTHERS
    assert others_to_keep(5, None) == NO_OTHERS


def test_the_longest_map_leaves_room_for_the_rest() -> None:
    """With every field at its longest the metadata is still short enough for brokers, and half of
    what fields may have is left for those to come."""
    random = Random(7)
    runs = tuple(random.randrange(1, 400) for _ in range(100_000))
    progress = Progress(2**63 - 1, runs, 10**9 - 1, 2**63 - 1)
    last = 2**63 - 1
    mark = Mark(NONCE, 2**31 - 1, "A" * 22, NO_OTHERS, last, LONGEST, leader_epoch=2**31 - 1)
    stored = to_store(progress, mark)
    assert METADATA_CHARS_MAX - 10 < len(stored.metadata) <= METADATA_CHARS_MAX
    assert len(stored.metadata.partition(":m")[0]) < FIELDS_CHARS_MAX / 2


@given(st.text() | st.from_regex(r"sluice1:[0-9a-f]{16}(:[a-zA-Z].{0,9}){0,6}", fullmatch=True))
def test_any_metadata_is_read_or_foreign(metadata: str) -> None:
    """Nothing is raised, and what is read is written again within the bounds."""
    found = read(Stored(7, metadata))
    if found is not None:
        assert len(to_store(*found).metadata) <= METADATA_CHARS_MAX
        assert read(to_store(*found)) == found


def test_metadata_of_versions_before_is_read() -> None:
    """These texts stand in brokers: never change one."""
    mark = Mark(NONCE, 3, "AAAAAAAAAAAAAAAAAAAAAA")
    text = f"sluice1:{NONCE}:g3:tAAAAAAAAAAAAAAAAAAAAAA:u2:a9:mbHA"
    assert read(Stored(5, text)) == (Progress(5, (2, 3), 2, 9), mark)
    assert to_store(Progress(5, (2, 3), 2, 9), mark) == Stored(5, text)
    assert read(Stored(5, f"sluice1:{NONCE}")) == (Progress(5), MARK)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "x",
        "sluice1:",
        "sluice1:xyz",
        "sluice2:" + NONCE,
        f"sluice1:{NONCE}x",
        f"sluice1:{NONCE}:",
        f"sluice1:{NONCE}:z",
        f"sluice1:{NONCE}:21",
        f"sluice1:{NONCE}:z1::y1",
        f"sluice1:{NONCE}:z1:y 1",
        f"sluice1:{NONCE}:z1:z2",
        f"sluice1:{NONCE}:u1:u1",
        f"sluice1:{NONCE}:ux",
        f"sluice1:{NONCE}:mrAQE:z1",
        f"sluice1:{NONCE}:m\x00?",
        f"sluice1:{NONCE}:m",
        f"sluice1:{NONCE}\n",
        f"sluice1:{NONCE}:u\u0661",
    ],
)
def test_other_metadata_is_foreign(metadata: str) -> None:
    """Somebody else's, or damaged: nothing of it is believed."""
    assert read(Stored(0, metadata)) is None


def test_whoever_takes_a_partition_over_counts_his_own_end_in_advance() -> None:
    """From our own metadata with map and count; from anything else as if for the first time."""
    before, own = Progress(5, (2, 3), unclean_ends=2, alone=6), "fedcba9876543210"
    assert taken_over(5, to_store(before, MARK), own) == replace(before, unclean_ends=3)
    assert taken_over(6, to_store(before, MARK), own) == Progress(6, unclean_ends=1)
    assert taken_over(5, Stored(5, "foreign"), own) == Progress(5, unclean_ends=1)
    assert taken_over(5, None, own) == Progress(5, unclean_ends=1)


def test_a_restore_that_is_tried_again_is_no_death() -> None:
    """The same process finds its own count; where it had let go in order, it counts again."""
    before = Progress(5, (2, 3), unclean_ends=2)
    assert taken_over(5, to_store(before, MARK), NONCE) == before
    let_go = replace(before, unclean_ends=0)
    assert taken_over(5, to_store(let_go, MARK), NONCE) == replace(before, unclean_ends=1)


def test_being_put_out_by_another_of_the_same_name_is_no_death() -> None:
    """On another machine it cannot be seen, but the dead come back on their own; and a message that
    ran alone meanwhile is not to blame. On this machine it counts where nobody runs any more."""
    before, process = Progress(5, (2, 3), unclean_ends=2, alone=6), this_process("worker-0")
    counted, put_out = replace(before, unclean_ends=3), replace(before, alone=None)

    def after(by: Bearer | None, own: Bearer | None = process) -> Progress:
        stored = to_store(before, replace(MARK, bearer=by))
        return taken_over(5, stored, "fedcba9876543210", own)

    assert after(replace(process, host="0" * 8)) == put_out
    assert after(replace(process, host="0" * 8, name="0" * 8)) == counted
    parent = replace(process, pid=os.getppid(), began=began(os.getppid()) or 0)
    assert after(parent) == put_out
    assert after(replace(parent, began=parent.began + 1)) == counted  # another with its number
    assert after(replace(parent, name="0" * 8)) == counted
    assert after(process) == counted
    assert after(None) == counted
    assert after(parent, None) == counted


def test_unsettled_time_counts_only_while_brokers_answer() -> None:
    """An outage in between is left out; settling starts it anew."""
    clock = SettlingClock()
    clock.broker_answered(0.0)
    for now_s in (0.0, 2.0, 4.0):
        clock.tick(now_s, settled=False)
    assert clock.unsettled_s == 4.0

    clock.tick(60.0, settled=False)
    assert clock.unsettled_s == 4.0
    assert not clock.answers(60.0)

    clock.broker_answered(60.0)
    clock.tick(61.0, settled=False)
    assert clock.unsettled_s == 5.0

    clock.tick(62.0, settled=True)
    assert clock.unsettled_s == 0.0


def test_an_old_fetch_is_no_news() -> None:
    """The same answered fetch, seen again, does not mean that a broker answers."""
    clock = SettlingClock()
    clock.fetched(1000, now_s=1.0)
    clock.fetched(1000, now_s=30.0)
    assert not clock.answers(30.0)

    clock.fetched(1001, now_s=31.0)
    assert clock.answers(31.0)
