"""What failed goes first: later messages of its lane are refused until then."""

import pytest

from service.core.errors import PublishFailed
from service.core.messages import Message, Partition
from service.kafka.sending.lane_failures import LaneFailures


def message(offset: int, key: bytes | None = b"a", partition: int = 0, epoch: int = 1) -> Message:
    return Message(Partition("in", partition), offset, epoch, key, b"", (), 0)


def refused(failures: LaneFailures, which: Message) -> bool:
    try:
        failures.let_pass(which)
    except PublishFailed:
        return True
    return False


def test_later_ones_wait_until_the_failed_are_handed_over_again() -> None:
    """Three failed: they pass in order only, and then everything passes again."""
    failures = LaneFailures("key")
    for offset in (4, 5, 7):
        failures.add(message(offset))
    assert refused(failures, message(9))
    assert refused(failures, message(5))
    for offset in (4, 5, 7, 9):
        assert not refused(failures, message(offset))


@pytest.mark.parametrize(
    ("ordering", "which", "held"),
    [
        ("key", message(9), True),
        ("key", message(9, b"b"), False),
        ("key", message(9, partition=1), False),
        ("key", message(9, epoch=2), False),
        ("key", message(3), False),
        ("partition", message(9, b"b"), True),
        ("partition", message(9, None), True),
        ("partition", message(9, partition=1), False),
        ("none", message(9), False),
    ],
)
def test_only_the_same_lane_is_held(ordering: str, which: Message, held: bool) -> None:
    """A lane is a key of a partition, or a partition, or nothing, of one epoch."""
    failures = LaneFailures(ordering)  # type: ignore[arg-type]
    failures.add(message(4))
    assert held == refused(failures, which)


def test_a_message_without_a_key_holds_nobody() -> None:
    """In key order such a message has a lane of its own."""
    failures = LaneFailures("key")
    failures.add(message(4, None))
    assert not refused(failures, message(9, None))


def test_an_older_epoch_is_forgotten() -> None:
    """A failure in a newer epoch clears what the partition's older ones left, not the reverse."""
    failures = LaneFailures("key")
    failures.add(message(4, epoch=1))
    failures.add(message(6, epoch=2))
    assert not refused(failures, message(9, epoch=1))
    failures.add(message(8, epoch=1))
    assert refused(failures, message(9, epoch=2))
