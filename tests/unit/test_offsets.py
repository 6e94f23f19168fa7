"""The tracker, against a model that is slow and obviously right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.offsets import PartitionTracker


@given(st.data())
def test_next_offset_is_the_smallest_unfinished_delivered_one(data: st.DataObject) -> None:
    """In whatever order messages are delivered, finished and passed over by the position."""
    tracker = PartitionTracker()
    delivered: list[int] = []
    finished: set[int] = set()
    offset, position = data.draw(st.integers(0, 5)), None
    for _ in range(data.draw(st.integers(0, 40))):
        unfinished = [o for o in delivered if o not in finished]
        match data.draw(st.sampled_from(["deliver", "finish", "advance"])):
            case "deliver":
                offset += data.draw(st.integers(0, 3))  # holes
                assert tracker.deliver(offset, timestamp_ms=offset * 10)
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
        elif position is None:
            expected = delivered[-1] + 1 if delivered else None
            if expected is not None:
                assert tracker.next_offset in (None, expected)
                expected = tracker.next_offset
        else:
            expected = max([position, *(o + 1 for o in delivered)])
        assert tracker.next_offset == expected
        assert tracker.unfinished == len(unfinished)
        ahead = {o for o in finished if unfinished and o > unfinished[0]}
        assert tracker.finished_ahead == ahead


def test_the_position_steps_over_markers() -> None:
    """Behind three transactions of one message each the next offset is 6, not 5."""
    tracker = PartitionTracker()
    for offset in (0, 2, 4):
        tracker.deliver(offset, 0)
    tracker.advance(6)
    for offset in (4, 0, 2):
        tracker.finish(offset)
    assert tracker.next_offset == 6


def test_a_message_fetched_again_is_known() -> None:
    """After a rebalance a kept partition is fetched again from its committed offset."""
    tracker = PartitionTracker()
    assert tracker.deliver(3, 0)
    assert tracker.deliver(5, 0)
    assert not tracker.deliver(3, 0)
    assert not tracker.deliver(5, 0)
    assert tracker.deliver(6, 0)


def test_the_position_never_moves_back() -> None:
    """A kept partition's position starts again behind what is finished already."""
    tracker = PartitionTracker()
    tracker.deliver(0, 0)
    tracker.finish(0)
    tracker.advance(9)
    tracker.advance(1)
    assert tracker.next_offset == 9


def test_nothing_finishes_twice_or_undelivered() -> None:
    """Both are mistakes of ours, and are caught where they are made."""
    tracker = PartitionTracker()
    tracker.deliver(0, 0)
    tracker.deliver(1, 0)
    tracker.finish(1)
    with pytest.raises(AssertionError, match="twice"):
        tracker.finish(1)
    with pytest.raises(AssertionError, match="never delivered"):
        tracker.finish(2)
