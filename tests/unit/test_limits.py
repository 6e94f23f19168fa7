"""Admission: all limits as one answer; the shared cooldown, the circuit, the slow start."""

import pytest

from service.core.admission.admission import Admission, Cause, Hold, Limits
from service.core.admission.budgets import NO_TOKENS, Allowance, Estimate, Quota
from service.core.admission.circuit import CIRCUIT_FAILURES, PROBE_CAP_S, Circuit, CircuitState
from service.core.admission.retry import RETRIES_SAVED
from service.core.admission.route import RESTART_SLOTS


def upper(low: float, high: float) -> float:
    return high


def of(slots: int = 2, **limits: float) -> Admission:
    return Admission(Limits(slots, **limits), upper)  # type: ignore[arg-type]


def held(admission: Admission, now_s: float, estimate: Estimate = NO_TOKENS) -> Hold:
    hold = admission.hold(now_s, estimate)
    assert hold is not None
    return hold


def test_slots_are_counted() -> None:
    """With all slots taken only a call's end changes something."""
    admission = of(slots=2)
    for _ in range(2):
        assert admission.hold(0) is None
        admission.admit(0)
    assert held(admission, 0) == Hold(None, None)
    admission.release()
    assert admission.hold(0) is None


def test_a_slot_is_given_back_once() -> None:
    """A second release is a mistake of ours, and is caught."""
    admission = of()
    admission.admit(0)
    admission.release()
    with pytest.raises(AssertionError, match="twice"):
        admission.release()


def test_the_cooldown_is_shared_and_never_shortened() -> None:
    """The longest Retry-After counts for everybody."""
    admission = of()
    admission.routes.cool_down(0, 10)
    admission.routes.cool_down(1, 2)
    assert held(admission, 4) == Hold(6, Cause.COOLDOWN)
    assert admission.hold(10) is None


def test_after_a_cooldown_it_starts_slowly_and_is_soon_at_full_speed() -> None:
    """A few calls more than are running; three rounds of answers give fifty slots back."""
    admission = of(slots=50)
    admission.routes.cool_down(0, 10)
    rounds, now_s = [], 10.0
    while admission.routes.limit < 50 or not rounds:
        turns = []
        while admission.hold(now_s) is None:
            turns.append(admission.admit(now_s))
        rounds.append(len(turns))
        now_s += 1
        for turn in turns:
            admission.release()
            admission.succeeded(now_s, turn)
    assert rounds[0] == RESTART_SLOTS
    assert len(rounds) <= 3


def test_a_row_of_failures_opens_the_circuit() -> None:
    """Ten in a row open it; one success between starts the count anew; a call never goes while
    it is open, only a probe."""
    admission = of()
    for _ in range(CIRCUIT_FAILURES - 1):
        admission.routes.failed(0, "down", service=False)
    admission.answered(0)
    for _ in range(CIRCUIT_FAILURES - 1):
        admission.routes.failed(0, "down", service=False)
    assert admission.hold(0) is None
    admission.routes.failed(0, "down", service=False)
    assert admission.routes.outages == ("down",)
    assert held(admission, 0) == Hold(4, Cause.CIRCUIT)
    assert held(admission, 4).cause is Cause.CIRCUIT
    admission.probing(4)
    assert held(admission, 4) == Hold(None, Cause.CIRCUIT)
    assert admission.answered(0)
    assert admission.hold(4) is None


def test_each_failed_probe_waits_longer_up_to_the_cap() -> None:
    """4, 8 and then 12 s with the whole jitter; at least half of it without."""
    for uniform, factor in ((upper, 1.0), (lambda low, _: low, 0.5)):
        circuit = Circuit(uniform)
        waits, now_s = [], 0.0
        for _ in range(5):
            circuit.failed(now_s, "down", service=True)
            waits.append(circuit.reopen_at_s - now_s)
            now_s = circuit.reopen_at_s
            circuit.probing()
        assert waits == [factor * s for s in (4, 8, PROBE_CAP_S, PROBE_CAP_S, PROBE_CAP_S)]


def test_a_probe_comes_soon_after_a_retry_after() -> None:
    """What the provider asked for is waited in full, and then no longer than two seconds."""
    circuit = Circuit(upper)
    for _ in range(9):
        circuit.failed(100, "down", service=True, retry_after_s=30)
        assert circuit.reopen_at_s == 132
        circuit.state = CircuitState.PROBING


def test_an_outage_takes_back_what_it_seemed_to_say() -> None:
    """Refusals that turn out to be an outage leave slots and pace as they were."""
    admission = of(slots=50)
    turns = [admission.admit(n / 100) for n in range(50)]
    for turn in turns:
        admission.routes.failed(1, "down", service=False)
        admission.overloaded(1, turn, "", "rate_limited", None)
    assert not admission.routes.closed()
    assert admission.routes.limit == 50
    assert admission.routes.pace_per_s is None


@pytest.mark.parametrize(
    ("limits", "cause"),
    [({"requests_per_minute": 60}, Cause.REQUESTS), ({"tokens_per_minute": 600}, Cause.TOKENS)],
)
def test_a_budget_holds_calls_up_and_says_so(limits: dict[str, float], cause: Cause) -> None:
    """Two seconds' worth goes at once, then one call a second."""
    admission, estimate = of(slots=50, **limits), Estimate(10, 100)
    for _ in range(2):
        assert admission.hold(0, estimate) is None
        admission.admit(0, estimate)
    hold = held(admission, 0, estimate)
    assert hold.cause is cause
    assert hold.wait_s == pytest.approx(1.0, rel=1e-4)
    assert admission.hold(1.0, estimate) is None


def test_a_reask_is_charged_and_waits_without_its_slot() -> None:
    """It takes from the same budget; where there is no room it is told so, unless messages are to
    come to their end."""
    admission = of(slots=50, requests_per_minute=60)
    admission.admit(0)
    assert admission.again(0, NO_TOKENS)
    assert not admission.again(0, NO_TOKENS)
    admission.finish(finishing=True)
    assert admission.again(0, NO_TOKENS)
    assert held(admission, 0).wait_s == pytest.approx(2.0, rel=1e-4), "charged as a debt"


def test_an_answer_from_the_cache_costs_no_budget() -> None:
    """What was charged in advance comes back."""
    admission, estimate = of(slots=50, requests_per_minute=60, tokens_per_minute=600), Estimate(20)
    admission.admit(0, estimate)
    admission.unused(0, estimate)
    admission.admit(0, estimate)
    admission.unused(0, estimate)
    admission.admit(0, estimate)
    assert held(admission, 0, estimate).cause is Cause.TOKENS


def test_what_the_provider_tells_holds_without_any_setting() -> None:
    """Its headers are a limit of their own."""
    admission = of(slots=50)
    admission.told(1.0, Allowance(0.0, requests=Quota(60, 0, 60.0)))
    assert held(admission, 1.0) == Hold(pytest.approx(1.0, rel=1e-3), Cause.REQUESTS)


def test_the_hours_money_stops_calls() -> None:
    """At the limit nothing starts, with the reason in words; an hour later it goes on."""
    admission = of(slots=50, spend_usd_per_hour=1.0)
    admission.spent(0, 1.0)
    assert held(admission, 1).cause is Cause.SPEND
    assert "limits.spend_usd_per_hour is reached" in str(admission.spend_exceeded(1))
    assert admission.hold(3661) is None
    assert admission.spend_exceeded(3661) is None


def test_retries_are_free_once_the_provider_is_back() -> None:
    """What an outage has used up of the retries does not slow the return."""
    admission = of()
    admission.took_retries(admission.retries_available(0))
    admission.routes.failed(0, "down", service=True)
    assert admission.retries_available(0) == 0
    admission.answered(0)
    assert admission.retries_available(0) == RETRIES_SAVED
