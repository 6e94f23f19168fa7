"""Whether a message fails for its own sake: the bound holds, and evidence is what came later."""

from random import Random

from service.core.admission.circuit import Circuit
from service.core.admission.route import Route
from service.core.admission.slots import Slots
from service.core.admission.suspicion import Suspicion, Tally


def failing(own: int, answered: int, failed: int) -> Suspicion:
    """A message that fails `own` times, with so many calls of others between each two."""
    found = Suspicion("", Tally(0, 0), Tally(0, 0))
    now = Tally(0, 0)
    for _ in range(own - 1):
        now = Tally(now.answered + answered, now.failed + failed)
        found = found.again(now, now)
    return found


def test_a_first_failure_says_nothing() -> None:
    """Whatever others were told before."""
    assert failing(1, 1000, 0).chance == 1.0


def test_others_that_are_answered_make_it_its_own() -> None:
    """Twice between a hundred that were answered: it waits alone; four times: it is certain."""
    assert failing(2, 100, 0).its_own
    assert not failing(3, 100, 0).certain
    assert failing(4, 100, 0).certain


def test_others_that_fail_too_excuse_it() -> None:
    """In an outage nothing is the message's, however often it fails."""
    assert not failing(1000, 0, 50).its_own
    assert not failing(5, 10, 90).its_own


def test_others_go_through_where_they_are_answered_and_none_fails() -> None:
    """One that was answered is enough; where nobody else was asked, the wait is everybody's."""
    assert failing(2, 1, 0).others_go_through
    assert not failing(1, 1, 0).others_go_through
    assert not failing(5, 0, 0).others_go_through
    assert not failing(2, 100, 1).others_go_through


def test_calls_that_began_after_its_first_failure_go_through_however_long_they_last() -> None:
    """They are under way at its second failure, and answered before its third."""
    route = Route(Slots(50), Circuit(lambda low, high: low))
    route.busy = 2
    found = route.suspicion("", None, shared=False)
    for _ in range(2):
        route.answers(0)
    route.busy = 1
    found = route.suspicion("", found, shared=False)
    assert not found.others_go_through, "what is answered was under way at its first failure"
    route.answers(1)
    found = route.suspicion("", found, shared=False)
    assert found.others_go_through
    assert found.chance == 1.0


def test_an_innocent_message_is_hardly_ever_certain() -> None:
    """20,000 messages at providers that refuse any share of the calls at random: Ville's bound, one
    in a million, lets none of them be rejected, and few wait alone."""
    chance = Random(7)
    alone = 0
    for _ in range(20_000):
        share, found = chance.uniform(0.05, 0.95), Suspicion("", Tally(0, 0), Tally(0, 0))
        now = Tally(0, 0)
        while chance.random() < share:
            others = [chance.random() < share for _ in range(chance.choice([0, 1, 2, 30]))]
            now = Tally(now.answered + others.count(False), now.failed + others.count(True))
            found = found.again(now, now)
            assert not found.certain
            if found.its_own:
                alone += 1
                break
    assert alone <= 0.05 * 20_000


def test_calls_in_flight_at_its_failure_are_no_evidence() -> None:
    """They had begun before: only what began later counts as answered."""
    route = Route(Slots(50), Circuit(lambda low, high: low))
    route.busy = 10
    found = route.suspicion("", None, shared=False)
    for _ in range(10):
        route.answers(0)
    assert route.suspicion("", found, shared=False).chance == 1.0


def test_a_shared_failure_counts_once() -> None:
    """Messages that waited for one call are told of it together; the route has failed once."""
    route = Route(Slots(50), Circuit(lambda low, high: low))
    route.suspicion("", None, shared=False)
    for _ in range(9):
        route.suspicion("", None, shared=True)
    assert route.failed == 1
