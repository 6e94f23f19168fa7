"""Where reading starts, decided from what Kafka stores."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.messages import Partition
from service.core.offsets import Progress
from service.kafka.settling import SettlingClock
from service.kafka.starts import (
    Bounds,
    HeldOut,
    Mark,
    Stored,
    is_new,
    read,
    taken_over,
    to_store,
    where_to_start,
)

P, Q = Partition("in", 0), Partition("in", 1)
NONCE = "0123456789abcdef"
MARK = Mark(NONCE)
METADATA_MAX = 4096
"""What brokers take by default (offset.metadata.max.bytes)."""


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
    assert where_to_start(P, found, Bounds(5, 9), chosen) == expected


def test_beyond_the_end_nobody_starts() -> None:
    """The sentence names both offsets, what starting over costs, and how to."""
    held_out = where_to_start(P, Stored(10, ""), Bounds(5, 9), None)
    assert isinstance(held_out, HeldOut)
    for words in ("in[0] is 10", "ends at 9", "pay for", "--reset-offsets", "kafka.group_id"):
        assert words in held_out.problem


def test_an_offset_of_a_topic_made_again_is_not_believed() -> None:
    """Another topic id: held out, even where the offset would fit; unknown ids say nothing."""
    stored = to_store(Progress(7), replace(MARK, topic_id="AAAAAAAAAAAAAAAAAAAAAA"))
    bounds = Bounds(0, 9)
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
MARKS = st.builds(
    Mark,
    nonce=st.just(NONCE),
    began=st.none() | st.integers(0, 2**31 - 1),
    topic_id=st.none() | st.text("abcXYZ019_-", min_size=1, max_size=22),
)


@given(PROGRESS, MARKS)
def test_what_is_stored_is_read_as_it_was(progress: Progress, mark: Mark) -> None:
    """Whatever its fields are; it is ASCII and fits into what brokers take."""
    stored = to_store(progress, mark)
    assert read(stored) == (progress, mark)
    assert stored.metadata.isascii()
    assert len(stored.metadata) <= METADATA_MAX


def test_the_longest_map_leaves_room_for_the_rest() -> None:
    """With every field at its longest the metadata is still short enough for brokers."""
    random = Random(7)
    runs = tuple(random.randrange(1, 400) for _ in range(100_000))
    progress = Progress(2**63 - 1, runs, 10**9 - 1, 2**63 - 1)
    stored = to_store(progress, Mark(NONCE, 2**31 - 1, "A" * 22))
    assert 3800 < len(stored.metadata) <= METADATA_MAX


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "x",
        "sluice1:",
        "sluice1:xyz",
        "sluice2:" + NONCE,
        f"sluice1:{NONCE}x",
        f"sluice1:{NONCE}:z1",
        f"sluice1:{NONCE}:u1:g1",
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


def test_unsettled_time_counts_only_while_brokers_answer() -> None:
    """An outage in between is left out; settling starts it anew."""
    clock = SettlingClock()
    clock.heard(0.0)
    for now_s in (0.0, 2.0, 4.0):
        clock.tick(now_s, settled=False)
    assert clock.unsettled_s == 4.0

    clock.tick(60.0, settled=False)
    assert clock.unsettled_s == 4.0
    assert not clock.answers(60.0)

    clock.heard(60.0)
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
