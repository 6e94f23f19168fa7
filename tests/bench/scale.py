"""Whether a message costs the same, however many there are and over however many partitions.

    python -m tests.bench.scale [--messages 1000000] [--seconds 15] [--rounds 3]

One run through a long backlog, looked at in stretches: what is kept for each message that was ever
seen would show in the later ones. Then backlogs over more and more input partitions. The endpoint
answers at once, so that the process is always at work.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from tests.bench.__main__ import LOADS
from tests.bench.driver import (
    Figures,
    Place,
    at_work,
    cpu_s,
    fill,
    measure,
    memory_mb,
)
from tests.support.kafka import a_kafka

AT_ONCE = next(load for load in LOADS if load.letter == "b")
FIRST = 10_000
"""Messages before the first look: the process has started, and learned what it learns."""
STRETCHES = (FIRST, 50_000, 100_000, 300_000, 600_000, 1_000_000)
"""Where one stretch ends and the next one begins."""
STRETCH_S = 1800.0
"""The longest that one stretch may take: 400,000 messages at 220 a second."""
PARTITIONS = (1, 6, 50, 200)
WARM_UP_S = 5.0
SPREAD_MAX = 1.10
"""The dearest against the cheapest."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a process has done so far."""

    messages: int
    cpu_s: float
    memory_mb: float


async def long_run(servers: str, messages: int) -> list[Look]:
    """One process through all of them; a look at each end of a stretch."""
    seconds = messages / AT_ONCE.rate_max
    place = await fill(servers, AT_ONCE, seconds)
    looks = []
    async with at_work(place) as work:
        pid = work.process.pid
        for end in (each for each in STRETCHES if each <= messages):
            calls = await work.until_calls(end, within_s=STRETCH_S)
            looks.append(Look(calls, cpu_s(pid), memory_mb(pid)))
    return looks


async def over_partitions(servers: str, seconds: float, rounds: int) -> list[float]:
    """CPU in ms a message for each of `PARTITIONS`: medians; each has its turn in each round."""
    places: dict[int, Place] = {}
    for count in PARTITIONS:
        load = replace(AT_ONCE, letter=f"p{count}", partitions=count)
        places[count] = await fill(servers, load, seconds + 2 * WARM_UP_S)
    found: dict[int, list[Figures]] = {count: [] for count in PARTITIONS}
    for _ in range(rounds):
        for count, place in places.items():
            found[count].append(await measure(place, "sluice", seconds, WARM_UP_S))
    costs_ms = []
    for count, those in found.items():
        costs_ms.append(median(each.cpu_ms for each in those))
        print(f"{count:>12}{costs_ms[-1]:>12.3f}{max(each.memory_mb for each in those):>8.0f}")
    return costs_ms


def verdict(claim: str, costs_ms: list[float]) -> str:
    spread = max(costs_ms) / min(costs_ms)
    kept = "✓" if spread <= SPREAD_MAX else "✗"
    return f"{kept} {claim}, the dearest against the cheapest: {spread:.3f} (at most {SPREAD_MAX})"


async def run(servers: str, messages: int, seconds: float, rounds: int) -> None:
    print(f"{'messages':>22}{'CPU ms/msg':>12}{'MB':>8}", flush=True)
    costs_ms = []
    for before, after in pairwise(await long_run(servers, messages)):
        cost_ms = (after.cpu_s - before.cpu_s) * 1000 / (after.messages - before.messages)
        costs_ms.append(cost_ms)
        print(f"{before.messages:>10} - {after.messages:>9}{cost_ms:>12.3f}{after.memory_mb:>8.0f}")
    print(f"\n{'partitions':>12}{'CPU ms/msg':>12}{'MB':>8}", flush=True)
    partitions_ms = await over_partitions(servers, seconds, rounds)
    print("\n" + verdict("cost of a message in a long run", costs_ms))
    print(verdict("cost of a message over partitions", partitions_ms))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--messages", type=int, default=STRETCHES[-1])
    parser.add_argument("--seconds", type=float, default=15.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="over partitions: medians of so many")
    given = parser.parse_args()
    with a_kafka() as servers:
        asyncio.run(run(servers, given.messages, given.seconds, given.rounds))


if __name__ == "__main__":
    main()
