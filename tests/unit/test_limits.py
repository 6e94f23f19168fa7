"""Admission: slots, the shared cooldown and the circuit."""

import pytest

from service.core.limits import CIRCUIT_FAILURES, Admission, Circuit, CircuitState
from service.core.retry import RETRY_AFTER_MAX_S


def upper(low: float, high: float) -> float:
    return high


@pytest.fixture
def admission() -> Admission:
    return Admission(2, Circuit(upper))


def test_slots_are_counted(admission: Admission) -> None:
    """With all slots taken only a call's end changes something."""
    for _ in range(2):
        assert admission.wait_s(0) == 0
        admission.admit()
    assert admission.wait_s(0) is None
    admission.release()
    assert admission.wait_s(0) == 0


def test_a_slot_is_given_back_once(admission: Admission) -> None:
    """A second release is a mistake of ours, and is caught."""
    admission.admit()
    admission.release()
    with pytest.raises(AssertionError, match="twice"):
        admission.release()


def test_the_cooldown_is_shared_and_never_shortened(admission: Admission) -> None:
    """The longest Retry-After counts for everybody."""
    admission.overloaded(0, 0, retry_after_s=10)
    admission.overloaded(1, 0, retry_after_s=2)
    assert admission.wait_s(4) == 6
    assert admission.wait_s(10) == 0


def test_the_cooldown_is_bounded(admission: Admission) -> None:
    """A provider that asks for a year is asked again after a quarter of an hour."""
    admission.overloaded(0, 0, retry_after_s=3e7)
    assert admission.wait_s(0) == RETRY_AFTER_MAX_S


def test_overload_takes_slots_away_once_for_a_round_of_calls() -> None:
    """Fifty refusals of calls that ran together count once; the next round counts again."""
    admission = Admission(50, Circuit(upper))
    for _ in range(50):
        admission.overloaded(1.0, started_s=0.0, retry_after_s=None)
    assert admission.limit == 35
    admission.overloaded(2.0, started_s=1.5, retry_after_s=None)
    assert admission.limit == pytest.approx(24.5)
    for n in range(100):
        admission.overloaded(10.0 + n, started_s=10.0 + n, retry_after_s=None)
    assert admission.limit == 1
    assert admission.wait_s(1000) == 0


def test_slots_come_back_one_for_a_round_of_successes() -> None:
    """From one slot to fifty takes about 50 x 51 / 2 successes, and never more than all."""
    admission = Admission(50, Circuit(upper), busy=0)
    admission.limit = 1.0
    successes = 0
    while admission.limit < 50:
        admission.succeeded()
        successes += 1
    assert 1100 < successes < 1300
    admission.succeeded()
    assert admission.limit == 50


def test_a_row_of_failures_opens_the_circuit(admission: Admission) -> None:
    """Ten in a row open it; one success between starts the count anew."""
    circuit = admission.circuit
    for _ in range(CIRCUIT_FAILURES - 1):
        circuit.failed(0, "down", service=False)
    circuit.succeeded()
    for _ in range(CIRCUIT_FAILURES - 1):
        circuit.failed(0, "down", service=False)
    assert circuit.state is CircuitState.CLOSED
    circuit.failed(0, "down", service=False)
    assert circuit.state is CircuitState.OPEN
    assert circuit.reason == "down"
    assert admission.wait_s(0) == 4


def test_one_probe_at_a_time(admission: Admission) -> None:
    """When the wait is over one call goes out; the others wait for its answer."""
    circuit = admission.circuit
    circuit.failed(0, "refused", service=True)
    assert admission.wait_s(4) == 0
    admission.admit()
    assert circuit.state is CircuitState.PROBING
    assert admission.wait_s(4) is None
    circuit.succeeded()
    assert admission.wait_s(4) == 0


def test_each_failed_probe_waits_longer_up_to_the_cap() -> None:
    """4, 8, 16, 30, 30 s with the whole jitter; at least half of it without."""
    for uniform, factor in ((upper, 1.0), (lambda low, _: low, 0.5)):
        circuit = Circuit(uniform)
        waits, now_s = [], 0.0
        for _ in range(5):
            circuit.failed(now_s, "down", service=True)
            waits.append(circuit.reopen_at_s - now_s)
            now_s = circuit.reopen_at_s
            circuit.admitted()
        assert waits == [factor * s for s in (4, 8, 16, 30, 30)]


def test_a_probe_called_off_lets_another_go(admission: Admission) -> None:
    """A probe that is cancelled by a rebalance does not leave the circuit waiting for ever."""
    circuit = admission.circuit
    circuit.failed(0, "down", service=True)
    admission.admit()
    admission.release()
    circuit.cancelled()
    assert admission.wait_s(30) == 0
