"""The reject guard."""

import pytest

from service.core.admission.guard import TRIES, TRY_EVERY_S, Guard, GuardBounds, GuardState
from service.core.messages import Reason

BOUNDS = GuardBounds(share_max=0.5, window=20, outcomes_min=10, in_a_row_max=15)
BAD, GOOD = Reason.INVALID, None


def told(*outcomes: Reason | None, bounds: GuardBounds = BOUNDS) -> Guard:
    guard = Guard(bounds)
    for each in outcomes:
        guard.finished(each, 0.0)
    return guard


def look(guard: Guard, now_s: float, *outcomes: Reason | None) -> None:
    """A look that lets its messages begin, and what becomes of them."""
    for each in outcomes:
        assert guard.wait_s(now_s) == 0.0
        guard.began(now_s)
        guard.finished(each, now_s)


def test_half_may_be_rejected() -> None:
    """At the share itself messages go on; one rejection above it intake stops."""
    guard = told(*[GOOD, BAD] * 10)
    assert not guard.tripped
    guard.finished(BAD, 0.0)  # a good one leaves the window for it: eleven of twenty
    assert guard.tripped


def test_a_few_outcomes_say_nothing() -> None:
    """Below `outcomes_min` no share is taken."""
    assert not told(*[BAD] * 9).tripped
    assert told(*[BAD] * 10).tripped


def test_only_the_last_outcomes_count() -> None:
    """A thousand good ones of before don't outweigh the window."""
    assert told(*[GOOD] * 1000, *[BAD] * 11).tripped


def test_a_row_counts_whatever_the_share() -> None:
    """So many in a row trip it without a share; anything good between starts the row anew."""
    bounds = GuardBounds(in_a_row_max=5)
    assert not told(*[BAD] * 4, GOOD, *[BAD] * 4, bounds=bounds).tripped
    assert told(*[BAD] * 5, bounds=bounds).tripped


def test_without_rules_it_never_trips() -> None:
    """null for both turns it off."""
    assert not told(*[BAD] * 1000, bounds=GuardBounds()).tripped


def test_the_sentence_names_the_top_reason() -> None:
    """It says how many were rejected and why most of them."""
    problem = told(*[Reason.REFUSED] * 3, *[BAD] * 7).problem
    assert problem is not None
    assert "10 of the last 10, most of them invalid" in problem
    assert told(GOOD).problem is None


def test_a_few_are_tried_each_minute() -> None:
    """Tripped, nothing begins for a minute; then `TRIES` may, and no more before the next."""
    guard = told(*[BAD] * 10)
    assert guard.wait_s(1.0) == TRY_EVERY_S - 1.0
    assert guard.room(0, 1.0) == 0
    assert guard.room(0, TRY_EVERY_S) == TRIES
    assert guard.room(2, TRY_EVERY_S) == TRIES - 2
    for _ in range(TRIES):
        assert guard.wait_s(TRY_EVERY_S) == 0.0
        guard.began(TRY_EVERY_S)
    assert guard.wait_s(TRY_EVERY_S) > 0.0
    assert guard.room(0, TRY_EVERY_S) == 0


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([BAD, GOOD, BAD, GOOD, GOOD], GuardState.CLOSED),
        ([GOOD, GOOD, GOOD], GuardState.CLOSED),
        ([BAD, BAD, BAD], GuardState.TRIPPED),
        ([BAD, GOOD, BAD, GOOD], GuardState.TRYING),
    ],
)
def test_it_goes_on_once_enough_are_well(outcomes: list[Reason | None], state: GuardState) -> None:
    """A look ends as soon as it is certain whether at most the share is rejected."""
    guard = told(*[BAD] * 10)
    look(guard, TRY_EVERY_S, *outcomes)
    assert guard.state is state


def test_after_a_bad_look_comes_another() -> None:
    """A look that ended badly is followed by one a minute later, for ever."""
    guard = told(*[BAD] * 10)
    for minute in range(1, 100):
        look(guard, minute * TRY_EVERY_S, *[BAD] * 3)
        assert guard.wait_s(minute * TRY_EVERY_S) == TRY_EVERY_S
    look(guard, 100 * TRY_EVERY_S, *[GOOD] * 3)
    assert not guard.tripped


def test_what_was_under_way_is_no_try() -> None:
    """Outcomes of calls that ran when it tripped don't end the wait."""
    guard = told(*[BAD] * 10)
    for _ in range(10):
        guard.finished(GOOD, 1.0)
    assert guard.tripped


def test_a_try_that_never_ends_is_not_waited_for() -> None:
    """Tries whose partition was lost have no outcome: a minute later others go."""
    guard = told(*[BAD] * 10)
    for _ in range(TRIES):
        assert guard.wait_s(TRY_EVERY_S) == 0.0
        guard.began(TRY_EVERY_S)
    assert guard.wait_s(2 * TRY_EVERY_S) == 0.0


def test_it_starts_anew_after_it_went_on() -> None:
    """What tripped it is forgotten: one more rejection does not trip it again."""
    guard = told(*[BAD] * 10)
    look(guard, TRY_EVERY_S, *[GOOD] * 3)
    guard.finished(BAD, TRY_EVERY_S)
    assert not guard.tripped
