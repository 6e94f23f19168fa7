"""The exactly-once hand-over, searched whole: see tests/support/hand_over_model.py."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tests.support.hand_over_model import (
    ALL,
    NONE,
    STORED,
    Broken,
    Guards,
    explore,
    finished_in,
    value_of,
)

TWICE = "visible twice"
LOST = "is not visible: it is lost"
BACK = "not finished any more"
HALF = "visible and does not count as finished"
STUCK = "nobody goes on"

WITHOUT = {
    "fence_before_read": BACK,
    "read_behind_the_markers": TWICE,
    "one_id_for_a_partition": HALF,
    "withdrawn_by_the_fence": TWICE,
    "doubt_is_read_back": TWICE,
    "new_epoch_before_reading_back": TWICE,
    "another_owner_is_seen": BACK,
    "offset_in_the_transaction": LOST,
    "no_answer_is_no_commit": LOST,
    "the_fenced_restore": STUCK,
    "a_topic_in_doubt_is_waited_for": STUCK,
}
"""What the shortest way without each guard leads to."""


def test_no_order_of_steps_breaks_the_hand_over() -> None:
    """Whatever dies, is lost or comes late: once and only once, and somebody always goes on."""
    assert explore() > 30_000, "the search has not gone far"


@pytest.mark.parametrize("guard", [each.name for each in fields(Guards)])
def test_the_search_finds_what_each_guard_keeps_out(guard: str) -> None:
    """A search that finds nothing could be blind."""
    with pytest.raises(Broken, match=WITHOUT[guard]):
        explore(replace(Guards(), **{guard: False}))


@pytest.mark.parametrize("finished", range(ALL + 1))
def test_what_is_finished_is_stored_and_read_as_the_service_does(finished: int) -> None:
    """The next offset is the first that is not finished; those beyond it are in the map."""
    value = value_of(finished, 0)
    stored = STORED[value]
    assert stored is not None
    assert stored.offset == {0: 0, 1: 1, 2: 0, 3: 2}[finished]
    assert finished_in(value) == finished
    assert finished_in(NONE) == 0
