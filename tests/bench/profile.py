"""Where the CPU of a message goes, from poll to commit, in steady state.

    python -m tests.bench.profile [--scenario b] [--seconds 15] [--functions 15]

Shares come from samples within the process, the CPU for each message from outside and without
the profiler's own part, so that the two can be multiplied.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.__main__ import LOADS
from tests.bench.driver import WARM_UP_CALLS_MIN, Load, Place, at_work, fill, measure
from tests.support.kafka import a_kafka

SCENARIOS = {load.letter: load for load in LOADS}
WARM_UP_S = 6.0


async def profile(servers: str, load: Load, seconds: float, functions: int) -> str:
    place = await fill(servers, load, 2 * (seconds + WARM_UP_S))
    plain = await measure(place, "sluice", seconds, WARM_UP_S)
    samples = await sampled(place, seconds)
    return table(samples, plain.cpu_ms, functions)


async def sampled(place: Place, seconds: float) -> dict[str, Any]:
    """The same once more, under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "tests.bench.sampled", "run"]
        async with at_work(place, command=command, told={"BENCH_SAMPLES": str(path)}) as work:
            await work.until_calls(WARM_UP_CALLS_MIN)
            await asyncio.sleep(WARM_UP_S)
            work.process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(seconds)
            work.process.send_signal(signal.SIGTERM)
            await work.process.wait()
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(samples: dict[str, Any], cpu_ms: float, functions: int) -> str:
    areas: dict[str, int] = samples["areas"]
    total = sum(areas.values())
    lines = [f"{'where':24}{'share':>8}{'ms/message':>12}"]
    for area, count in sorted(areas.items(), key=lambda item: -item[1]):
        lines.append(f"{area:24}{count / total:>8.1%}{count / total * cpu_ms:>12.3f}")
    lines.append(f"{'all':24}{1:>8.0%}{cpu_ms:>12.3f}   ({total} samples)")
    lines.append(f"\n{'function (its own time)':64}{'share':>8}")
    for name, count in list(samples["functions"].items())[:functions]:
        lines.append(f"{name:64}{count / total:>8.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=__doc__)
    parser.add_argument("--scenario", choices=SCENARIOS, default="b")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--functions", type=int, default=15)
    given = parser.parse_args()
    load = SCENARIOS[given.scenario]
    with a_kafka() as servers:
        print(asyncio.run(profile(servers, load, given.seconds, given.functions)))


if __name__ == "__main__":
    main()
