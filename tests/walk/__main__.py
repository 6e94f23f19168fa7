"""The walks of many seeds, or one of them again: see the package's first lines."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.walk.plan import Plan, draw, shrink
from tests.walk.play import play

CHUNK = 50

COLLECT_EACH = 5
"""Walks between two looks for garbage: looking all the time takes a tenth of the CPU."""


def main(words: list[str] | None = None) -> int:
    """The exit code: 1 where a walk has found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=__doc__)
    parser.add_argument("--seed", type=int, help="this walk, cut down where it fails")
    parser.add_argument("--seeds", type=int, default=2_000, help="so many walks")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--whole", action="store_true", help="do not cut a failing walk down")
    chosen = parser.parse_args(words)
    if chosen.seed is not None:
        return _one(chosen.seed, whole=chosen.whole)
    return _many(chosen.first, chosen.seeds, chosen.jobs)


def _one(seed: int, *, whole: bool) -> int:
    plan = draw(seed)
    report = play(plan)
    if report.problem is None:
        print(f"seed {seed}: well, {report.outcomes} outcomes in {report.now_s:.1f} s")
        return 0
    print(report.problem)
    kind = _kind(report.problem)
    if not whole:
        plan = shrink(plan, lambda each: _fails_alike(each, kind))
        print(play(plan).problem)
    print(plan)
    return 1


def _fails_alike(plan: Plan, kind: str) -> bool:
    problem = play(plan).problem
    return problem is not None and _kind(problem) == kind


def _kind(problem: str) -> str:
    """Without what differs from walk to walk: one fault is not cut down to another."""
    return "".join(each for each in problem if not each.isdigit())[:45]


def _many(first: int, seeds: int, jobs: int) -> int:
    started_s = time.monotonic()
    chunks = [
        range(at, min(at + CHUNK, first + seeds)) for at in range(first, first + seeds, CHUNK)
    ]
    kinds: Counter[str] = Counter()
    examples: dict[str, tuple[int, str]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(_chunk, chunks):
            for seed, problem in found:
                kind = _kind(problem)
                kinds[kind] += 1
                examples.setdefault(kind, (seed, problem))
    took_s = time.monotonic() - started_s
    for kind, count in kinds.most_common():
        seed, problem = examples[kind]
        print(f"{count:5d} x  seed {seed}: {problem[:400]}")
    failed = kinds.total()
    print(f"{seeds - failed} of {seeds} walks well, {took_s:.0f} s, {seeds / took_s:.0f} a second")
    return 1 if failed else 0


def _chunk(seeds: range) -> list[tuple[int, str]]:
    found = []
    gc.freeze()  # what is imported is never looked through again
    gc.disable()
    for number, seed in enumerate(seeds):
        if (problem := play(draw(seed)).problem) is not None:
            found.append((seed, problem))
        if number % COLLECT_EACH == 0:
            gc.collect()
    return found


def same_hashes() -> None:
    """Sets of partitions are walked through in the same order each time: begins anew where that
    is not so."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, "-m", "tests.walk", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})


if __name__ == "__main__":
    same_hashes()
    sys.exit(main())
