"""The rounds: which faults, how often, under which load, and what must hold in the end."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.core.completed import finished_ranges
from service.kafka.client.stored import Stored, read
from tests.chaos.checker import Decode, Limits, Report, examine
from tests.chaos.faults import schedule, strike
from tests.chaos.scene import Pace, Say, Scene, scene
from tests.support.cluster import Cluster


def completed_map(next_offset: int, metadata: str) -> Iterable[range]:
    """What the stored metadata says is finished beyond the next offset."""
    found = read(Stored(next_offset, metadata))
    return () if found is None else finished_ranges(next_offset, found[0].runs)


RECOVERY_MAX_S = 30.0
"""From a fault until every partition concerned is at work again; guarantee of the long round."""
WORKERS = 2
MEMORY_GROWTH_MAX = 1.08
"""Resident memory at the end over that after ten minutes."""
TASKS_GROWTH_MAX = 1.1
"""Tasks of the event loop, likewise; they follow the window, which is full all the while."""
MEMORY_EACH_S = 10.0
WARM_S = 600.0


@dataclass(frozen=True)
class Plan:
    """One round."""

    kinds: tuple[str, ...]
    times: int
    pause_s: tuple[float, float] = (2.0, 5.0)
    pace: Pace = field(default_factory=Pace)
    mode: str = "at_least_once"
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the workers, over the harness's own."""
    proxied: bool = False
    recovers: bool = True
    """After each fault, wait until every partition has stored progress."""
    no_repeats: bool = False
    """Not one call is made twice, not one record published twice."""
    bounded_repeats: bool = True
    """What each kill repeats is held against guarantee 2's bound."""
    minutes: float = 0.0
    """Load without faults for so long."""


PLANS: dict[str, Plan] = {
    "short": Plan(
        ("kill", "restart", "zombie", "broker", "cut", "storm"),
        6,
        pause_s=(0.5, 1.5),
        pace=Pace(median_s=0.2, sigma=0.8, longest_s=2.0, concurrency=20),
        proxied=True,
    ),
    "kills": Plan(("kill",), 50),
    "restarts": Plan(("rolling",), 20, no_repeats=True, recovers=False),
    "joins": Plan(("join",), 300, pause_s=(0.2, 2.0), recovers=False),
    "exactly_once": Plan(
        ("kill", "kill", "zombie", "broker", "coordinator", "evict"), 24, mode="exactly_once"
    ),
    "brokers": Plan(("broker", "controller", "coordinator", "handover", "hang", "too_few"), 24),
    "connections": Plan(
        ("cut", "cut", "cut", "cut", "cut", "slow", "half_open", "refused"), 80, proxied=True
    ),
    "provider": Plan(("down", "storm", "errors", "late"), 12),
    "commits": Plan(("evict", "evict", "intruder"), 21),
    "zombies": Plan(("zombie",), 20),
    "soak": Plan((), 0, minutes=60.0),
}


@dataclass
class Row:
    """One line of the table, and what was broken."""

    name: str
    plan: Plan
    seed: int
    report: Report
    broken: list[str]
    lasted_s: float
    folder: Path
    memory: list[str] = field(default_factory=list)
    """Lines for each worker: its memory, open files and tasks over time."""

    def __str__(self) -> str:
        return "| " + " | ".join(self.cells()) + " |"

    def cells(self) -> Iterator[str]:
        report = self.report
        what = f"{self.plan.times} faults" if self.plan.kinds else f"{self.plan.minutes:g} min"
        yield f"{self.name}, {what}"
        yield self.plan.mode
        yield f"{report.messages:,}"
        yield str(len(report.lost))
        yield str(report.duplicates)
        yield str(report.raw_duplicates)
        yield str(len(report.out_of_order))
        yield str(report.repeated_messages)
        yield str(report.repeated_calls)
        yield _most_repeated(report)
        yield str(len(report.outside))
        yield f"{report.recovery_s:.1f}"
        yield f"{report.stall_s:.1f}"
        yield f"{self.lasted_s:.0f}"


HEAD = (
    "| round | mode | messages | lost | duplicates after the reader | raw duplicates "
    "| out of order | repeated messages | repeated calls | most for one kill (bound) "
    "| repeated though stored | worst recovery s | longest stall s | duration s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def _most_repeated(report: Report) -> str:
    if not report.deaths:
        return "none"
    worst = max(report.deaths, key=lambda death: death.repeated / death.bound)
    return f"{worst.repeated} ({worst.bound:.0f})"


async def play(
    name: str,
    plan: Plan,
    cluster: Cluster,
    *,
    seed: int,
    say: Say,
    decode: Decode = completed_map,
) -> Row:
    """Play one round to its end and judge it."""
    began_s = time.time()
    settings = {"SLUICE_DELIVERY__MODE": plan.mode, **plan.settings}
    at = scene(cluster, plan.pace, seed=seed, settings=settings, proxied=plan.proxied, say=say)
    async with at as made:
        say(f"{name}: seed {seed}, {plan.times} faults, {plan.mode}; logs in {made.folder}")
        for _ in range(WORKERS):
            made.start_worker()
        if not await made.until_moved():
            say("! the workers did not begin")
        memory = await (_soak(made, plan) if plan.minutes else _strikes(made, plan, seed))
        say(f"the load ends after {time.time() - began_s:.0f} s")
        caught_up = await made.until_caught_up()
        for worker in tuple(made.workers.values()):
            await made.terminate(worker)
    evidence = await made.evidence()
    limits = Limits(window=4 * plan.pace.concurrency, commit_interval_s=plan.pace.commit_interval_s)
    report = await asyncio.to_thread(examine, evidence, limits, decode)
    broken = list(_broken(plan, report, made, caught_up))
    broken += [line for line in memory if line.startswith("!")]
    if not broken:
        shutil.rmtree(made.folder, ignore_errors=True)
    return Row(name, plan, seed, report, broken, time.time() - began_s, made.folder, memory)


async def _strikes(made: Scene, plan: Plan, seed: int) -> list[str]:
    faults = schedule(plan.kinds, plan.times, seed, plan.pause_s)
    for number, fault in enumerate(faults, 1):
        await asyncio.sleep(fault.pause_s)
        began_s = time.time()
        await strike(made, fault)
        struck_s = time.time() - began_s
        if plan.recovers:
            await made.until_moved()
        recovered_s = time.time() - began_s
        made.say(f"{number:>4} {fault}: {struck_s:.1f} s, all at work after {recovered_s:.1f} s")
    return []


@dataclass(frozen=True)
class Size:
    """What a worker holds at one moment of a soak."""

    at_s: float
    memory_mb: float
    open_files: int
    tasks: float


async def _soak(made: Scene, plan: Plan) -> list[str]:
    """Load alone; the workers' memory, open files and tasks over time."""
    workers = list(made.workers.values())
    series: dict[str, list[Size]] = {each.name: [] for each in workers}
    began_s = time.time()
    while (passed_s := time.time() - began_s) < plan.minutes * 60:
        for worker in workers:
            tasks = await worker.metric("sluice_tasks")
            if tasks is not None:
                size = Size(passed_s, worker.memory_mb(), worker.open_files(), tasks)
                series[worker.name].append(size)
        await asyncio.sleep(MEMORY_EACH_S)
    return [line for each in series.items() for line in _size_lines(*each)]


def _size_lines(name: str, series: list[Size]) -> Iterator[str]:
    """The series in a dozen figures, and what is wrong with it."""
    step = max(1, len(series) // 12)
    yield f"{name}: " + ", ".join(
        f"{each.at_s / 60:.0f} min {each.memory_mb:.0f} MB {each.open_files} fd {each.tasks:.0f}"
        for each in series[::step]
    )
    warm = [each for each in series if WARM_S <= each.at_s < WARM_S + 300]
    last = [each for each in series if each.at_s >= series[-1].at_s - 300]
    if not warm:
        return
    for what, most, figure in (
        ("memory", MEMORY_GROWTH_MAX, lambda each: each.memory_mb),
        ("tasks", TASKS_GROWTH_MAX, lambda each: each.tasks),
    ):
        growth = statistics.median(map(figure, last)) / statistics.median(map(figure, warm))
        mark = "! " if growth > most else ""
        yield f"{mark}{name}: {what} at the end: {growth:.3f} of what was there after ten minutes"


def _broken(plan: Plan, report: Report, made: Scene, caught_up: bool) -> Iterator[str]:
    """What does not hold, in words."""
    counts: dict[str, int] = {
        "lost": len(report.lost),
        "outcomes of no message": len(report.foreign),
        "duplicates after the reader": report.duplicates,
        "out of order": len(report.out_of_order),
        "mixed up": len(report.mixed_up),
        "called though stored as finished": len(report.outside),
        "stored offsets that went back": len(report.rewound),
        "dead letters that no text asked for": report.letters.total() - report.letters["refused"],
    }
    if plan.no_repeats:
        counts |= {"repeated calls": report.repeated_calls}
    if plan.no_repeats or plan.mode == "exactly_once":
        counts |= {"raw duplicates": report.raw_duplicates}
    yield from (f"{what}: {number}" for what, number in counts.items() if number)
    if plan.bounded_repeats:
        for death in report.over_the_bound:
            yield f"a kill repeated {death.repeated} messages, bound {death.bound:.0f}"
    for struck, seconds in report.recoveries:
        if seconds > RECOVERY_MAX_S:
            yield f"recovery from {struck.kind} took {seconds:.1f} s"
    if report.stall_s > RECOVERY_MAX_S:
        yield f"a partition stood still for {report.stall_s:.1f} s"
    if not caught_up:
        yield "lag 0 was not reached"
    yield from made.ended_alone
