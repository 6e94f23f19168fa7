"""Leader epochs: read from batches, remembered, and when they have to be verified."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.kafka.group.trail import TRAIL_MAX, Trail, epochs_in


def batch(base: int, epoch: int, version: int = 2, size: int = 40) -> bytes:
    return struct.pack(">qiib", base, 5 + size, epoch, version) + bytes(size)


def test_epochs_are_read_where_they_change() -> None:
    """With the base offset of the first batch under each; control batches count as others do."""
    batches = batch(0, 3) + batch(7, 3, size=0) + batch(9, 4) + batch(20, 4)
    assert [*epochs_in(batches)] == [(0, 3), (9, 4)]


@pytest.mark.parametrize("kept", range(16 + 40))
def test_the_last_batch_may_be_cut_off(kept: int) -> None:
    """As brokers send it at the end of a fetch: nothing is read behind it."""
    assert [*epochs_in(batch(0, 3) + batch(9, 4)[:kept])] == [(0, 3), (9, 4)][: 1 + (kept >= 17)]


def test_batches_without_an_epoch_say_nothing() -> None:
    """Those of old formats, which have a checksum there, and those that name none."""
    assert [*epochs_in(batch(0, 3, version=1) + batch(9, -1))] == []


@given(st.binary(max_size=200))
def test_any_bytes_come_to_an_end(batches: bytes) -> None:
    """Whatever lengths they claim."""
    assert len([*epochs_in(batches)]) <= len(batches)


def test_the_epoch_before_an_offset_is_that_of_the_message_before_it() -> None:
    """None where nothing is known of it; what is stored counts for what was read before."""
    trail = Trail(reached=10, epoch=2)
    trail.fetched(10, batch(10, 2) + batch(15, 3))
    assert [trail.before(offset) for offset in (9, 10, 15, 16, 99)] == [None, 2, 2, 3, 3]
    assert Trail().before(5) is None


def test_a_fetch_under_another_epoch_has_to_be_verified() -> None:
    """Up to where it begins, under the epoch of before; not where it begins under that one, for
    then its log is the one that was read, nor where none is known."""
    trail = Trail()
    assert not trail.fetched(0, batch(0, 3))
    assert not trail.fetched(5, batch(5, 3) + batch(9, 4))
    assert trail.fetched(20, batch(20, 6) + batch(30, 7))
    assert trail.unverified == (20, 4)
    trail.unverified = None
    assert not trail.fetched(40, batch(40, 7))
    assert trail.fetched(50, batch(50, 5)), "an earlier leader than has been read"


def test_what_an_earlier_leader_wrote_is_read_again_without_a_doubt() -> None:
    """The completed map reaches into a later epoch than the next offset, or a fetch was thrown
    away: each fetch would be verified, and fetched again, without end."""
    trail = Trail(reached=50, epoch=4)
    assert not trail.fetched(20, batch(20, 2) + batch(30, 3) + batch(40, 4))
    assert not trail.fetched(30, batch(30, 3))
    assert trail.before(50) == 4
    assert trail.fetched(50, batch(50, 5))
    assert trail.unverified == (50, 4)
    trail.unverified = None
    assert not trail.fetched(45, batch(45, 4) + batch(50, 5))


@pytest.mark.parametrize(("offset", "first"), [(20, batch(20, 4)), (30, b"")])
def test_a_later_leader_below_what_was_read_is_verified_up_to_there(
    offset: int, first: bytes
) -> None:
    """The log ends at 30 under the epoch of before, where 50 were finished: that is a cut. Up to
    the fetch alone nothing would be seen, without end where it begins at 30."""
    trail = Trail(reached=50, epoch=4)
    assert trail.fetched(offset, first + batch(30, 5))
    assert trail.unverified == (50, 4)


def test_the_first_doubt_stays_until_it_is_settled() -> None:
    """A later fetch does not take its place."""
    trail = Trail(reached=20, epoch=3)
    assert trail.fetched(20, batch(20, 4))
    assert trail.fetched(30, batch(30, 5))
    assert trail.unverified == (20, 3)


def test_it_is_bounded() -> None:
    """Of many changes the last are known."""
    trail = Trail()
    for offset in range(1000):
        trail.fetched(offset, batch(offset, offset))
    assert trail.before(1000 - TRAIL_MAX) is None
    assert trail.before(1000) == 999
