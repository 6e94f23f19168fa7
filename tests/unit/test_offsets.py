"""The tracker, against a model that is slow and obviously right."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.completed import finished_ranges
from service.core.tracker import Delivery, PartitionTracker

NEW, KNOWN, FINISHED = Delivery.NEW, Delivery.KNOWN, Delivery.FINISHED


def ahead(tracker: PartitionTracker, finishing: frozenset[int] = frozenset()) -> set[int]:
    """The offsets that the completed map of a tracker holds."""
    return {offset for each in finished_ranges(*tracker.progress(finishing)) for offset in each}


@given(st.data())
def test_next_offset_is_the_smallest_unfinished_delivered_one(data: st.DataObject) -> None:
    """In whatever order messages are delivered, finished and passed over by the position; and
    the completed map holds what is finished beyond it and no unfinished one."""
    offset = position = data.draw(st.integers(0, 5))
    tracker = PartitionTracker(offset)
    delivered: list[int] = []
    finished: set[int] = set()
    for _ in range(data.draw(st.integers(0, 40))):
        unfinished = [o for o in delivered if o not in finished]
        match data.draw(st.sampled_from(["deliver", "finish", "advance"])):
            case "deliver":
                offset += data.draw(st.integers(0, 3))  # holes
                assert tracker.deliver(offset, timestamp_ms=offset * 10) is NEW
                delivered.append(offset)
                offset += 1
            case "finish" if unfinished:
                chosen = data.draw(st.sampled_from(unfinished))
                tracker.finish(chosen)
                finished.add(chosen)
            case "advance":
                offset += data.draw(st.integers(0, 3))  # markers
                tracker.advance(offset)
                position = offset
        unfinished = [o for o in delivered if o not in finished]
        if unfinished:
            expected = unfinished[0]
            assert tracker.oldest_unfinished_ms == expected * 10
        else:
            expected = max([position, *(o + 1 for o in delivered)])
        assert tracker.next_offset == tracker.progress()[0] == expected
        assert tracker.unfinished == len(unfinished)
        assert {o for o in finished if o > expected} <= ahead(tracker)
        assert not ahead(tracker) & set(unfinished)
        assert max(ahead(tracker), default=-1) < max([position, *(o + 1 for o in delivered)])


@given(st.data())
def test_the_next_holder_goes_on_with_what_is_not_finished(data: st.DataObject) -> None:
    """From holder to holder each message is new until one has finished it, and then never again;
    whatever finished before an end is in the map that the end left behind."""
    log = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1)))
    finished: set[int] = set()
    next_offset, runs = 0, ()
    for _ in range(data.draw(st.integers(1, 4))):
        tracker = PartitionTracker(next_offset, finished_ranges(next_offset, runs))
        readable = [offset for offset in log if offset >= next_offset]
        for offset in readable[: data.draw(st.integers(0, len(readable)))]:
            expected = FINISHED if offset in finished else NEW
            assert tracker.deliver(offset, 0) is expected
            if expected is NEW and data.draw(st.booleans()):
                tracker.finish(offset)
                finished.add(offset)
        next_offset, runs = tracker.progress()
        held = {o for o in log if o < next_offset} | (ahead(tracker) & set(log))
        assert held == finished


def test_what_is_about_to_finish_counts_only_where_it_is_asked_for() -> None:
    """A transaction stores the progress that holds once its own outcomes have finished."""
    tracker = PartitionTracker(0)
    for offset in range(4):
        tracker.deliver(offset, 0)
    assert tracker.progress(frozenset({0, 2})) == (1, (1, 1))
    assert tracker.progress() == (0, ())
    assert tracker.next_offset == 0


def test_the_position_steps_over_markers() -> None:
    """Behind three transactions of one message each the next offset is 6, not 5."""
    tracker = PartitionTracker(0)
    for offset in (0, 2, 4):
        tracker.deliver(offset, 0)
    tracker.advance(6)
    for offset in (4, 0, 2):
        tracker.finish(offset)
    assert tracker.next_offset == 6


def test_holes_count_as_finished_in_the_map() -> None:
    """Offsets that were never delivered between delivered ones make no runs of their own."""
    tracker = PartitionTracker(0)
    for offset in (0, 2, 5, 9):
        tracker.deliver(offset, 0)
    tracker.finish(5)
    tracker.advance(12)
    assert tracker.progress() == (0, (1, 1, 1, 3))


def test_the_map_ends_with_the_last_finished_offset() -> None:
    """Holes behind it say nothing to the next holder, and would make the map longer with each
    message that is taken."""
    tracker = PartitionTracker(0)
    for offset in (0, 2, 5, 9):
        tracker.deliver(offset, 0)
    assert tracker.progress() == (0, ())
    tracker.finish(2)
    tracker.advance(12)
    assert tracker.progress() == (0, (1, 2))
    tracker.deliver(20, 0)
    assert tracker.progress() == (0, (1, 2))


@given(st.data())
def test_what_the_map_may_grow_to_is_known_before(data: st.DataObject) -> None:
    """However many of the delivered finish, it reaches no further and has no more runs."""
    runs = tuple(data.draw(st.lists(st.integers(1, 4), max_size=6)))
    runs = runs[: len(runs) // 2 * 2]
    tracker = PartitionTracker(0, finished_ranges(0, runs))
    delivered = sorted(data.draw(st.sets(st.integers(0, 40))))
    new = [offset for offset in delivered if tracker.deliver(offset, 0) is NEW]
    span, runs_max = tracker.span, tracker.runs_max
    for offset in data.draw(st.permutations(new)):
        found = tracker.progress()[1]
        assert sum(found) <= span
        assert len(found) <= runs_max
        tracker.finish(offset)


def test_behind_one_message_any_number_may_finish() -> None:
    """Neither memory nor a look at the progress grows with them."""
    tracker = PartitionTracker(0)
    tracker.deliver(0, 0)
    tracemalloc.start()
    try:
        for offset in range(1, 50_000):
            tracker.deliver(offset, offset)
            tracker.finish(offset)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000
    assert tracker.progress() == (0, (1, 49_999))


def test_a_message_fetched_again_is_known() -> None:
    """After a rebalance a kept partition is fetched again from its committed offset."""
    tracker = PartitionTracker(3)
    assert tracker.deliver(3, 0) is NEW
    assert tracker.deliver(5, 0) is NEW
    assert tracker.deliver(3, 0) is KNOWN
    assert tracker.deliver(5, 0) is KNOWN
    assert tracker.deliver(6, 0) is NEW


def test_the_position_never_moves_back() -> None:
    """A kept partition's position starts again behind what is finished already."""
    tracker = PartitionTracker(0)
    tracker.deliver(0, 0)
    tracker.finish(0)
    tracker.advance(9)
    tracker.advance(1)
    assert tracker.next_offset == 9


def test_nothing_finishes_twice_or_undelivered() -> None:
    """Both are mistakes of ours, and are caught where they are made."""
    tracker = PartitionTracker(0)
    tracker.deliver(0, 0)
    tracker.deliver(1, 0)
    tracker.deliver(3, 0)
    tracker.finish(1)
    with pytest.raises(AssertionError, match="hole"):
        tracker.finish(2)
    with pytest.raises(AssertionError, match="twice"):
        tracker.finish(1)
    with pytest.raises(AssertionError, match="never delivered"):
        tracker.finish(4)
