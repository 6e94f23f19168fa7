"""Convergence to limits that nobody tells, against model providers in virtual time."""

import statistics

import pytest

from tests.support.providers import Provider, Simulation

BEGIN_S, END_S = 120.0, 720.0
"""The ten minutes after the first two."""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("retry_after", [False, True], ids=["bare", "retry-after"])
@pytest.mark.parametrize(
    ("per_minute", "bucket", "latency_s", "slots"),
    [
        (600, 5, 2.0, 50),  # half a second's worth
        (600, 10, 0.3, 50),
        (600, 600, 2.0, 50),  # a minute's worth
        (1200, 200, 2.0, 80),
        (1200, 20, 0.3, 50),
    ],
)
def test_a_hidden_rate_is_found_and_kept_to(
    per_minute: int, bucket: int, latency_s: float, slots: int, retry_after: bool, seed: int
) -> None:
    """At least 0.95 of it with under 2 % of the calls refused, without any header."""
    provider = Provider(per_minute, bucket, latency_s=latency_s, sigma=0.7, retry_after=retry_after)
    simulation = Simulation(provider, seed, slots=slots)
    simulation.run(END_S)
    [worker] = simulation.workers
    taken, refused = worker.taken(BEGIN_S, END_S), worker.refused(BEGIN_S, END_S)
    assert taken >= 0.95 * per_minute * (END_S - BEGIN_S) / 60
    assert refused < 0.02 * (taken + refused)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("places", [5, 20])
def test_a_hidden_number_of_places_is_found_without_swinging(places: int, seed: int) -> None:
    """Calls in flight settle at what the provider bears: nine tenths of its places are in use,
    hardly a call is refused, and the number does not swing by more than a tenth and one."""
    simulation = Simulation(Provider(places=places, latency_s=1.0), seed, slots=50)
    simulation.run(END_S)
    [worker] = simulation.workers
    taken, refused = worker.taken(BEGIN_S, END_S), worker.refused(BEGIN_S, END_S)
    assert refused < 0.02 * (taken + refused)
    in_flight = [many for at_s, many in worker.in_flight if at_s >= BEGIN_S]
    assert statistics.mean(in_flight) >= 0.9 * places
    assert max(in_flight) <= places + 2
    assert statistics.pstdev(in_flight) <= 0.1 * places + 1


def test_a_limit_that_is_raised_is_found() -> None:
    """Twice the rate: used within three minutes."""
    provider = Provider(600, 10, latency_s=0.3)
    simulation = Simulation(provider, seed=3)
    simulation.run(300)
    provider.per_minute = 1200
    simulation.run(600)
    [worker] = simulation.workers
    assert worker.taken(480, 600) >= 0.9 * 1200 * 2


def test_a_limit_that_is_lowered_is_kept_to() -> None:
    """A third of the rate: within a minute few calls are refused."""
    provider = Provider(1800, 30, latency_s=0.3)
    simulation = Simulation(provider, seed=4)
    simulation.run(300)
    provider.per_minute = 600
    simulation.run(660)
    [worker] = simulation.workers
    taken, refused = worker.taken(360, 660), worker.refused(360, 660)
    assert refused < 0.02 * (taken + refused)
    assert taken >= 0.9 * 600 * 5


def test_workers_that_know_nothing_of_each_other_share_a_hidden_rate() -> None:
    """Three of them together use nine tenths of it, with few calls refused."""
    simulation = Simulation(Provider(1200, 100, latency_s=0.5), seed=5, workers=3)
    simulation.run(END_S)
    taken = sum(worker.taken(BEGIN_S, END_S) for worker in simulation.workers)
    refused = sum(worker.refused(BEGIN_S, END_S) for worker in simulation.workers)
    assert taken >= 0.9 * 1200 * 10
    assert refused < 0.05 * (taken + refused)


def test_without_a_limit_all_slots_are_used() -> None:
    """A provider that refuses nobody sees them all, always."""
    simulation = Simulation(Provider(latency_s=0.5), seed=6)
    simulation.run(60)
    assert min(many for at_s, many in simulation.workers[0].in_flight if at_s > 1) == 50
