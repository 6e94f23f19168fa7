"""How busy the slots are: key order, default window, heavy-tailed latencies, a real Kafka.

    python -m tests.bench.slots_busy [--messages 4000] [--slots 50] [--keys 1000]

The endpoint runs in its own process and notes when each call began and ended; the share is the
time that calls overlap the span between the 10th and the 90th hundredth of the calls, over the
slots. It is measured at the endpoint, so what the service adds between two calls counts against
it. Printed beside it: CPU of the service for each message, Kafka both ways included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.kafka import a_kafka
from tests.support.service import ROOT
from tests.support.topics import create_topic, produce, unique_name

Span = tuple[float, float]


def busy(spans: list[Span], slots: int) -> float:
    """Share of the slots in use between the 10th and the 90th hundredth of the calls."""
    began = sorted(begin for begin, _ in spans)
    low_s, high_s = began[len(began) // 10], began[len(began) * 9 // 10]
    used_s = sum(max(0.0, min(end, high_s) - max(begin, low_s)) for begin, end in spans)
    return used_s / (slots * (high_s - low_s))


def fetch_spans(url: str) -> list[Span]:
    with urllib.request.urlopen(f"{url}/_spans") as response:
        return [(begin, end) for begin, end in json.load(response)]


@asynccontextmanager
async def endpoint(median_ms: float, sigma: float) -> AsyncIterator[str]:
    """The scripted endpoint as a process; its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.endpoint",
        *("--latency-median-ms", str(median_ms), "--latency-sigma", str(sigma), "--record"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.terminate()
        await process.wait()


async def measure(servers: str, given: argparse.Namespace) -> None:
    topics = {word: unique_name(word) for word in ("input", "output", "letters")}
    for topic in topics.values():
        await create_topic(servers, topic, 6)
    messages = [
        (b"key-%d" % (n % given.keys), f"Person {n} is {n % 90}".encode())
        for n in range(given.messages)
    ]
    await produce(servers, topics["input"], messages)
    async with endpoint(given.median_ms, given.sigma) as url:
        environment = {
            **os.environ,
            "SLUICE_KAFKA__BOOTSTRAP_SERVERS": servers,
            "SLUICE_KAFKA__GROUP_ID": unique_name("group"),
            "SLUICE_INPUT__TOPICS": topics["input"],
            "SLUICE_OUTPUT__TOPIC": topics["output"],
            "SLUICE_DEAD_LETTERS__TOPIC": topics["letters"],
            "SLUICE_LIMITS__CONCURRENCY": str(given.slots),
            "SLUICE_DELIVERY__ORDERING": given.ordering,
            "SLUICE_EXTRACTION__MODEL": "scripted",
            "SLUICE_TELEMETRY__PORT": "0",
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "bench",
        }
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "run", "--until-caught-up"),
            cwd=ROOT,
            env=environment,
        )
        assert await service.wait() == 0, "the service failed"
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        spans = await asyncio.to_thread(fetch_spans, url)
    length_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
    cpu_ms = (used.ru_utime + used.ru_stime) * 1000 / given.messages
    print(f"{'messages':>10}{'slots':>8}{'busy':>8}{'msg/s':>8}{'CPU ms/msg':>12}")
    print(
        f"{given.messages:>10}{given.slots:>8}{busy(spans, given.slots):>8.3f}"
        f"{given.messages / length_s:>8.0f}{cpu_ms:>12.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How busy the slots are.")
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--median-ms", type=float, default=300.0)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--ordering", choices=("key", "partition", "none"), default="key")
    given = parser.parse_args()
    with a_kafka() as servers:
        asyncio.run(measure(servers, given))


if __name__ == "__main__":
    main()
