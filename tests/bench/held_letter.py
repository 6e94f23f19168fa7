"""Behind a dead letter that fits nowhere: whether memory stays flat while all others go on.

    python -m tests.bench.held_letter [--seconds 1800] [--partitions 1] [--every 30] [--mode M]

The first message of partition 0 cannot be decoded, and the dead letter topic takes no record as
large as its dead letter: it is held, and the group's next offset stays before it. A worker works
off everything that comes behind it, as fast as it can, with an endpoint that answers at once.
Prints a line for each look and a verdict; exit code 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tests.bench.__main__ import LOADS
from tests.bench.driver import Place, endpoint, environment_of, stats
from tests.support.kafka import a_kafka
from tests.support.service import Service, service
from tests.support.topics import committed, create_topic, produce, producer, unique_name

AT_ONCE = next(load for load in LOADS if load.letter == "b")
POISON = b"\xff\xfe\xfd"
"""No text in UTF-8: rejected without a call."""
LETTER_MAX_BYTES = 200
"""Less than any dead letter needs."""
BACKLOG = 20_000
"""Messages that wait in the topic, so that the worker never does."""
GROWTH_MAX = 1.10
"""Resident memory: the median of the last quarter over that of the second one, behind the start."""
POLL_AGE_MAX_S = 5.0
"""The usual second and a busy machine."""
WARM_UP_S = 10.0


@dataclass(frozen=True, slots=True)
class Look:
    """What a worker holds and has done at a moment; rate and delay since the look before it."""

    at_s: float
    behind: int
    memory_mb: float
    rate: float
    poll_age_s: float
    loop_delay_ms: float

    def __str__(self) -> str:
        return (
            f"{self.at_s:>7.0f} s{self.behind:>12,}{self.memory_mb:>10.1f} MB{self.rate:>9.0f}/s"
            f"{self.poll_age_s:>10.2f} s{self.loop_delay_ms:>10.1f} ms"
        )


HEAD = f"{'time':>9}{'behind it':>12}{'memory':>13}{'rate':>11}{'poll age':>12}{'loop delay':>13}"


async def feed(place: Place, url: str) -> None:
    """Keep a backlog behind the poison, until cancelled."""
    number = 0
    async with producer(place.servers, linger_ms=20) as client:
        while True:
            called = (await stats(url))["calls"]
            waiting = []
            while number < called + BACKLOG:
                key, text = b"key-%d" % (number % place.load.keys), b"%d: Ada is 36" % number
                partition = number % place.load.partitions
                waiting.append(await client.send(place.input, text, key, partition=partition))
                number += 1
            for each in waiting:
                await each
            await asyncio.sleep(0.1)


async def looks(worker: Service, url: str, seconds: float, every_s: float) -> list[Look]:
    found: list[Look] = []
    began_s = before_s = time.monotonic()
    behind, delay_s, delays = (await stats(url))["calls"], 0.0, 0.0
    while before_s - began_s < seconds:
        await asyncio.sleep(every_s)
        now_s, now, told = time.monotonic(), (await stats(url))["calls"], await worker.metrics()
        summed_s = told["sluice_event_loop_delay_seconds_sum"]
        counted = told["sluice_event_loop_delay_seconds_count"]
        look = Look(
            at_s=now_s - began_s,
            behind=int(now),
            memory_mb=memory_mb(worker.process.pid),
            rate=(now - behind) / (now_s - before_s),
            poll_age_s=told["sluice_poll_turn_age_seconds"],
            loop_delay_ms=1000 * (summed_s - delay_s) / max(1.0, counted - delays),
        )
        print(look, flush=True)
        found.append(look)
        before_s, behind, delay_s, delays = now_s, now, summed_s, counted
    return found


def memory_mb(pid: int) -> float:
    """What is resident now, not at most."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def verdicts(found: list[Look], stored: tuple[int, int], ready: tuple[int, str]) -> Iterator[str]:
    """What was demanded; a line that does not hold begins with a cross."""
    quarter = max(1, len(found) // 4)
    middle, last = found[quarter : 2 * quarter] or found, found[-quarter:]
    growth = median(each.memory_mb for each in last) / median(each.memory_mb for each in middle)
    yield (
        f"{_mark(growth <= GROWTH_MAX)} memory at the end: {growth:.3f} of that after the first "
        f"quarter (at most {GROWTH_MAX})"
    )
    oldest_s = max(look.poll_age_s for look in found)
    yield f"{_mark(oldest_s <= POLL_AGE_MAX_S)} the poll loop turned within {oldest_s:.2f} s"
    yield f"{_mark(stored[0] == stored[1])} the next offset stays at the held message: {stored[0]}"
    slower = median(each.rate for each in last) / median(each.rate for each in middle)
    yield f"  rate at the end: {slower:.3f} of that after the first quarter; /readyz {ready[0]}"


def _mark(holds: bool) -> str:
    return "✓" if holds else "✗"


async def run(servers: str, given: argparse.Namespace) -> bool:
    topic = unique_name("input")
    output, letters = unique_name("output"), unique_name("letters")
    await create_topic(servers, topic, given.partitions)
    await create_topic(servers, output, 6)
    small = {"max.message.bytes": str(LETTER_MAX_BYTES)}
    await create_topic(servers, letters, 1, config=small)
    [(_, held)] = await produce(servers, topic, [(b"poison", POISON)], partition=0)
    place = Place(servers, replace(AT_ONCE, partitions=given.partitions), topic)
    async with endpoint(place.load) as url:
        environment = environment_of(place, output, letters, url)
        environment |= {
            "SLUICE_DELIVERY__MODE": given.mode,
            "SLUICE_TELEMETRY__LOG_LEVEL": "INFO",
        }
        async with service(environment) as worker, asyncio.TaskGroup() as tasks:
            feeding = tasks.create_task(feed(place, url))
            await worker.until("sluice_messages_finished_total", 100, within_s=120)
            await asyncio.sleep(WARM_UP_S)
            print(HEAD, flush=True)
            found = await looks(worker, url, given.seconds, given.every)
            ready = await worker.get("/readyz")
            group = environment["SLUICE_KAFKA__GROUP_ID"]
            at = (await committed(servers, group, topic, given.partitions))[0][0]
            feeding.cancel()
            with suppress(asyncio.CancelledError):
                await feeding
    lines = list(verdicts(found, (at, held), ready))
    print("\n" + "\n".join(lines))
    return not any(line.startswith("✗") for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.held_letter", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--partitions", type=int, default=1, help="of the input")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two looks")
    parser.add_argument(
        "--mode", choices=("at_least_once", "exactly_once"), default="at_least_once"
    )
    given = parser.parse_args()
    with a_kafka() as servers:
        return 0 if asyncio.run(run(servers, given)) else 1


if __name__ == "__main__":
    sys.exit(main())
