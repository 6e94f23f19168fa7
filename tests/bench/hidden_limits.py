"""How admission converges to limits that providers do not tell, in virtual time.

    python -m tests.bench.hidden_limits [--seeds 3]

A token bucket of N calls a minute that holds so many seconds' worth, no rate headers, lognormal
latency (sigma 0.7), ten minutes after the first two. *Used*: calls taken over N. *Refused*: of all
calls. *Until 0.9*: seconds until a stretch of ten had nine tenths of N.
"""

from __future__ import annotations

import argparse
import itertools

from tests.support.providers import Provider, Simulation, Worker

BEGIN_S, END_S = 120.0, 720.0


def until(worker: Worker, per_minute: float) -> float:
    """Seconds until ten of them had nine tenths of the rate, and no refusals to speak of."""
    for begin_s in range(0, int(END_S) - 10, 5):
        taken = worker.taken(begin_s, begin_s + 10)
        refused = worker.refused(begin_s, begin_s + 10)
        if taken >= 0.9 * per_minute / 6 and refused <= 0.02 * taken:
            return float(begin_s)
    return END_S


def measure(per_minute: int, held_s: float, latency_s: float, retry_after: bool, seed: int) -> str:
    bucket = max(1.0, per_minute / 60 * held_s)
    slots = max(50, int(per_minute / 60 * latency_s * 2))
    provider = Provider(per_minute, bucket, latency_s=latency_s, sigma=0.7, retry_after=retry_after)
    simulation = Simulation(provider, seed, slots=slots)
    simulation.run(END_S)
    [worker] = simulation.workers
    taken, refused = worker.taken(BEGIN_S, END_S), worker.refused(BEGIN_S, END_S)
    return (
        f"{per_minute:>6} {held_s:>6g} {latency_s:>9g} {retry_after!s:>12} {slots:>6} {seed:>5} "
        f"{taken / per_minute / 10:>6.3f} {refused / (taken + refused):>8.2%} "
        f"{until(worker, per_minute):>10.0f}"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    print("     N  holds s latency s  Retry-After  slots  seed   used  refused  until 0.9")
    scenes = itertools.product((600, 1200, 6000), (0.5, 1, 10, 60), (0.3, 2.0), (False, True))
    for scene in scenes:
        for seed in range(given.seeds if scene[0] < 6000 else 1):
            print(measure(*scene, seed), flush=True)


if __name__ == "__main__":
    main()
