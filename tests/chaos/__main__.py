"""Chaos on a real cluster: seeded faults, then what was lost, repeated or late.

    python -m tests.chaos --round kills [--seed N] [--times N] [--mode exactly_once]
    python -m tests.chaos --round cut_log [--seed N] [--times N] [--mode exactly_once]
    python -m tests.chaos --round all

`cut_log` has topics and a verdict of its own (cut_log.py) and is not among `all`.

Prints a row of a Markdown table for each round, progress to stderr. Exit code 1 where something
does not hold; it is named under the table, and the logs are kept. The faults are drawn from the
seed before a round begins: the same seed replays them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from dataclasses import replace

from tests.chaos import cut_log
from tests.chaos.rounds import HEAD, PLANS, Plan, Row, play
from tests.support.cluster import Cluster


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _plan(given: argparse.Namespace, name: str) -> Plan:
    plan = PLANS[name]
    if given.times is not None:
        plan = (
            replace(plan, times=given.times) if plan.kinds else replace(plan, minutes=given.times)
        )
    if given.mode is not None:
        plan = replace(plan, mode=given.mode)
    return replace(plan, settings=dict(word.split("=", 1) for word in given.set))


def _show(row: Row) -> None:
    """What stands behind the row."""
    report = row.report
    say(f"dead letters {dict(report.letters)}, retries {report.retries}")
    say(f"records of aborted transactions {report.uncommitted}")
    say(f"repeated calls after {dict(report.repeated_after)}")
    worst: dict[str, float] = {}
    for struck, seconds in report.recoveries:
        worst[struck.kind] = max(seconds, worst.get(struck.kind, 0.0))
    say("worst recovery, s: " + ", ".join(f"{kind} {s:.1f}" for kind, s in worst.items()))
    for line in row.memory:
        say(line)
    for line in row.broken:
        say(f"BROKEN {line}")
    if row.broken:
        say(f"logs: {row.folder}")


def _cut_logs(given: argparse.Namespace, seed: int) -> int:
    mode, times = given.mode or "at_least_once", given.times or 1
    with Cluster() as cluster:
        row = asyncio.run(cut_log.play(cluster, seed=seed, mode=mode, times=times, say=say))
    for line in row.broken:
        say(f"BROKEN {line}")
    if row.broken:
        say(f"logs: {row.folder}")
    print(cut_log.HEAD)
    print(row)
    return 1 if row.broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--round", choices=(*PLANS, "cut_log", "all"), required=True)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--times", type=int, default=None, help="faults; for soak minutes")
    parser.add_argument("--mode", choices=("at_least_once", "exactly_once"), default=None)
    parser.add_argument("--set", action="append", default=[], help="SLUICE_NAME=VALUE of workers")
    given = parser.parse_args()
    names = [name for name in PLANS if name != "soak"] if given.round == "all" else [given.round]
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    say(f"seed {seed}")
    if given.round == "cut_log":
        return _cut_logs(given, seed)
    rows = []
    with Cluster() as cluster:
        for name in names:
            plan = _plan(given, name)
            rows.append(asyncio.run(play(name, plan, cluster, seed=seed, say=say)))
            _show(rows[-1])
    print(HEAD)
    for row in rows:
        print(row)
    return 1 if any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
