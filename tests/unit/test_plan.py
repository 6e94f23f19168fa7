"""Capacity by arithmetic, against a simulation that knows no formula."""

from __future__ import annotations

import heapq
import random

import pytest

from service.commands.plan import UTILISATION, Demand, mean_latency_s, plan, sentences

MINUTE = 60.0


def simulated(demand: Demand, slots: int, messages: int, seed: int) -> tuple[float, float]:
    """Arrivals at random, slots that take the next one: share of slots busy, and the median wait
    for a slot of the last half of the messages, in seconds."""
    chance = random.Random(seed)
    free_at = [0.0] * slots
    now_s = busy_s = 0.0
    waits = []
    for _ in range(messages):
        now_s += chance.expovariate(demand.messages_per_s)
        began_s = max(now_s, heapq.heappop(free_at))
        took_s = demand.latency_median_s * chance.lognormvariate(0.0, demand.latency_sigma)
        busy_s += took_s
        waits.append(began_s - now_s)
        heapq.heappush(free_at, began_s + took_s)
    late = sorted(waits[messages // 2 :])
    return busy_s / slots / now_s, late[len(late) // 2]


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rate", [20.0, 400.0])
def test_the_slots_of_the_plan_bear_the_rate(rate: float, sigma: float) -> None:
    """Simulated they are as busy as was asked for, and half of the messages don't wait at all."""
    demand = Demand(rate, 0.3, sigma)
    found = plan(demand)
    busy, wait_s = simulated(demand, found.slots, 40_000, seed=7)
    assert busy == pytest.approx(demand.load_max, rel=0.12)
    assert wait_s == 0.0


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_fewer_slots_than_little_says_do_not(sigma: float) -> None:
    """With a tenth less than the calls in flight on average the backlog grows without end."""
    demand = Demand(200.0, 0.3, sigma)
    _, wait_s = simulated(demand, int(plan(demand).in_flight * 0.9), 40_000, seed=7)
    assert wait_s > 5.0


def test_what_it_bears_at_most_is_all_slots_busy() -> None:
    """The measured run (a): 200 slots, median 300 ms, sigma 1."""
    demand = Demand(messages_per_s=300.0, latency_median_s=0.3, load_max=0.742)
    found = plan(demand)
    assert found.slots == 200
    assert found.messages_per_s_max == pytest.approx(200 * UTILISATION / mean_latency_s(demand))


def test_a_million_messages_a_minute_on_paper() -> None:
    """Workers follow from slots where calls take seconds, from CPU where they don't."""
    slow = plan(Demand(1e6 / MINUTE, latency_median_s=1.0))
    assert slow.workers == -(-slow.slots // 1000)
    assert slow.bound_by == "slots"
    quick = plan(Demand(1e6 / MINUTE, latency_median_s=0.02, latency_sigma=0.0))
    assert quick.bound_by == "CPU"
    assert quick.workers == 17  # 16,667 x 0.7 ms = 11.7 cores at 70 % of each
    assert quick.partitions >= quick.workers


def test_money_is_tokens_times_prices_times_calls() -> None:
    """Re-asks are paid for as well."""
    demand = Demand(
        1.0,
        1.0,
        calls_per_message=1.5,
        tokens_input=1000,
        tokens_output=100,
        usd_per_million_input=0.15,
        usd_per_million_output=0.60,
    )
    found = plan(demand)
    assert found.usd_per_million_messages == pytest.approx(1.5 * (150 + 60))
    assert found.usd_per_month == pytest.approx(1.5 * 210 * 30 * 86400 / 1e6)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"requests_per_minute": 600.0}, 10.0),
        ({"tokens_per_minute": 60_000.0}, 2.0),
        ({"requests_per_minute": 600.0, "tokens_per_minute": 60_000.0}, 2.0),
    ],
)
def test_the_narrowest_limit_of_the_provider_counts(
    limits: dict[str, float], expected: float
) -> None:
    """More slots than it lets through have no use, which the plan says."""
    demand = Demand(20.0, 0.5, tokens_input=400, tokens_output=100, **limits)
    found = plan(demand)
    assert found.messages_per_s_max == pytest.approx(expected)
    assert any("too much for the provider's limits" in line for line in sentences(demand, found))


def test_nothing_to_do_still_takes_one_worker() -> None:
    """And one slot: the smallest that runs."""
    found = plan(Demand(0.0, 1.0))
    assert (found.workers, found.slots) == (1, 1)


def test_the_mean_says_where_it_comes_from() -> None:
    """A median of 2 s means 3.30 s on average, for the spread that the sentence names; without a
    spread there is nothing to explain."""

    def said(sigma: float) -> str:
        demand = Demand(1.0, 2.0, sigma)
        return " ".join(sentences(demand, plan(demand)))

    assert "(a call takes 3.30 s on average: " in said(1.0)
    assert "lognormal with sigma 1," in said(1.0)
    assert "the median of 2 s)" in said(1.0)
    assert "(a call takes 2.00 s on average)" in said(0.0)
    assert " 1 worker (by " in said(0.0)
