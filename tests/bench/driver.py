"""One peer under load: topics, messages, endpoint and process; what it did in a span of time.

Everything is measured from outside while the peer is in full swing: calls and slots at the
endpoint, CPU and memory from /proc, records in the output topic. The start of the process is left
out by a warm-up, its end by a backlog that is longer than the measurement.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.bench import built
from tests.support.service import ROOT, children
from tests.support.topics import create_topic, produce, unique_name

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
WARM_UP_CALLS_MIN = 200
"""Calls before the measurement: code imported, connections open, Java compiled in part."""
START_S = 90.0
"""The longest that a peer may take to its first calls on a busy machine."""
PUBLISHED_S = 30.0
"""The longest that it may take until what was called is published."""
INSTRUCTIONS = "Take the person from the text."


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer is given to do."""

    letter: str
    claim: str
    slots: int
    median_ms: float = 0.0
    sigma: float = 0.0
    partitions: int = 6
    keys: int = 1000
    text_bytes: int = 24
    records: int = 0  # in one answer; 0: one that stands alone
    rate_max: float = 8000.0  # messages/s that nobody here exceeds: how long the backlog is

    @property
    def slots_rate(self) -> float:
        """Messages/s at which all slots are always busy; 0 where the endpoint answers at once."""
        mean_s = self.median_ms / 1000 * math.exp(self.sigma**2 / 2)
        return self.slots / mean_s if mean_s else 0.0

    def messages(self, seconds: float) -> int:
        return int((self.slots_rate or self.rate_max) * seconds * 1.1) + 8 * self.slots


@dataclass(frozen=True, slots=True)
class Figures:
    """What one peer did; CPU in ms a message, memory in MB."""

    peer: str
    rate: float
    cpu_ms: float
    busy: float
    most: int
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a load's messages are."""

    servers: str
    load: Load
    input: str
    messages: int = 0


async def fill(servers: str, load: Load, seconds: float) -> Place:
    """Produce the backlog of one load, once for all peers."""
    topic = unique_name(f"input-{load.letter}")
    await create_topic(servers, topic, load.partitions)
    filling = "Ada Lovelace is 36. " * (load.text_bytes // 20 + 1)
    count = load.messages(seconds)
    messages = (
        (b"key-%d" % (n % load.keys), (f"{n}: " + filling)[: load.text_bytes].encode())
        for n in range(count)
    )
    await produce(servers, topic, messages)
    return Place(servers, load, topic, count)


async def measure(place: Place, peer: str, seconds: float, warm_up_s: float) -> Figures:
    """Run one peer; raises `AssertionError` where it does not do what it is there for."""
    told = _workers(peer, place.load)
    async with at_work(place, command=_command(peer), told=told) as work:
        await work.until_calls(WARM_UP_CALLS_MIN)
        await asyncio.sleep(warm_up_s)
        figures = await _observed(peer, place.load, work, seconds)
        left = place.messages - await work.calls()
        assert left > place.load.slots, f"{peer} ran out of messages: enlarge rate_max"
        await _until_published(place.servers, work)
    return figures


@dataclass(frozen=True, slots=True)
class Work:
    """A peer at work: its process, the endpoint that counts its calls, the topic of its records."""

    process: asyncio.subprocess.Process
    url: str
    output: str

    async def calls(self) -> int:
        return int((await stats(self.url))["calls"])

    async def until_calls(self, wanted: int, within_s: float = START_S) -> int:
        """Wait until the endpoint has answered so many; returns how many they are then."""
        deadline = time.monotonic() + within_s
        while (calls := await self.calls()) < wanted:
            assert self.process.returncode is None, "the peer ended"
            assert time.monotonic() < deadline, f"{calls} calls instead of {wanted}"
            await asyncio.sleep(0.1)
        return calls


@asynccontextmanager
async def at_work(
    place: Place,
    *,
    command: list[str] | None = None,
    told: Mapping[str, str] | None = None,
    topic_config: Mapping[str, str] | None = None,
) -> AsyncIterator[Work]:
    """Sluice, or another command, on a place: topics, endpoint and process; all of it ends here.

    `told` goes over the environment that each peer gets.
    """
    output, letters = unique_name("output"), unique_name("letters")
    for topic in (output, letters):
        await create_topic(place.servers, topic, 6, config=topic_config)
    async with endpoint(place.load) as url:
        environment = environment_of(place, output, letters, url) | dict(told or {})
        async with running(command or sluice(), environment) as process:
            yield Work(process, url, output)


async def _observed(peer: str, load: Load, work: Work, seconds: float) -> Figures:
    url, process = work.url, work.process
    before, cpu_before_s, began_s = await stats(url), cpu_s(process.pid), time.monotonic()
    await asyncio.sleep(seconds)
    after, cpu_after_s, elapsed_s = (
        await stats(url),
        cpu_s(process.pid),
        time.monotonic() - began_s,
    )
    calls = after["calls"] - before["calls"]
    assert calls, f"{peer} made no calls"
    return Figures(
        peer=peer,
        rate=calls / elapsed_s,
        cpu_ms=(cpu_after_s - cpu_before_s) * 1000 / calls,
        busy=(after["busy_s"] - before["busy_s"]) / (load.slots * elapsed_s),
        most=int(after["most"]),
        memory_mb=memory_mb(process.pid),
    )


async def _until_published(servers: str, work: Work) -> None:
    """What it called for it also publishes: at least what was called when this began."""
    wanted = await work.calls() - 20
    deadline = time.monotonic() + PUBLISHED_S
    consumer = AIOKafkaConsumer(bootstrap_servers=servers)
    await consumer.start()
    try:
        where = [TopicPartition(work.output, number) for number in range(6)]
        while sum((await consumer.end_offsets(where)).values()) < wanted:
            assert time.monotonic() < deadline, "what was called is not published"
            await asyncio.sleep(0.2)
    finally:
        await consumer.stop()


# --- processes -----------------------------------------------------------------------------------


@asynccontextmanager
async def endpoint(load: Load) -> AsyncIterator[str]:
    """The compiled endpoint; its base URL."""
    process = await asyncio.create_subprocess_exec(
        *(built.endpoint(), "-median-ms", str(load.median_ms), "-sigma", str(load.sigma)),
        *("-records", str(load.records)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}/v1"
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def running(
    command: list[str], environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "OPENAI_"))}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=clean | dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            for pid in _family(process.pid):
                os.kill(pid, signal.SIGKILL)
        await process.wait()


def sluice() -> list[str]:
    """As a user runs it."""
    return [sys.executable, "-m", "service", "run"]


def _command(peer: str) -> list[str]:
    match peer:
        case "sluice" | "sluice-2":
            return sluice()
        case "parallel-consumer":
            return built.parallel_consumer()
        case _:
            return [sys.executable, "-m", "tests.bench.peers", peer]


def _workers(peer: str, load: Load) -> dict[str, str]:
    """Of `sluice-2`: two workers, which have the slots of the others between them."""
    if peer != "sluice-2":
        return {}
    return {"SLUICE_LIMITS__WORKERS": "2", "SLUICE_LIMITS__CONCURRENCY": str(load.slots // 2)}


def environment_of(place: Place, output: str, letters: str, url: str) -> dict[str, str]:
    group, load = unique_name("group"), place.load
    return {
        "BENCH_SERVERS": place.servers,
        "BENCH_GROUP": group,
        "BENCH_INPUT": place.input,
        "BENCH_OUTPUT": output,
        "BENCH_URL": url,
        "BENCH_SLOTS": str(load.slots),
        "BENCH_MANY": str(int(load.records > 0)),
        "BENCH_INSTRUCTIONS": INSTRUCTIONS,
        "SLUICE_KAFKA__BOOTSTRAP_SERVERS": place.servers,
        "SLUICE_KAFKA__GROUP_ID": group,
        "SLUICE_INPUT__TOPICS": place.input,
        "SLUICE_OUTPUT__TOPIC": output,
        "SLUICE_DEAD_LETTERS__TOPIC": letters,
        "SLUICE_LIMITS__CONCURRENCY": str(load.slots),
        "SLUICE_EXTRACTION__RECORD": "tests/bench/records.py:Person",
        "SLUICE_EXTRACTION__CARDINALITY": "many" if load.records else "one",
        "SLUICE_EXTRACTION__INSTRUCTIONS": INSTRUCTIONS,
        "SLUICE_EXTRACTION__MODEL": "bench",
        "SLUICE_TELEMETRY__HOST": "127.0.0.1",
        "SLUICE_TELEMETRY__PORT": "0",
        "SLUICE_TELEMETRY__LOG_LEVEL": "WARNING",
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": "bench",
    }


# --- figures -------------------------------------------------------------------------------------


async def stats(url: str) -> dict[str, float]:
    """What the endpoint has counted since its start."""
    return await asyncio.to_thread(_stats, url.removesuffix("/v1") + "/_stats")


def _stats(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url) as response:
        found: dict[str, float] = json.load(response)
    return found


def _family(pid: int) -> list[int]:
    """A process and those that it has started."""
    return [pid, *children(pid)]


def cpu_s(pid: int) -> float:
    """CPU of all threads so far, in user and kernel, of a process and its children, in seconds."""
    return sum(map(_cpu_s, _family(pid)))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def memory_mb(pid: int) -> float:
    """The most memory that a process and each of its children has held so far, added up."""
    return sum(map(_memory_mb, _family(pid)))


def _memory_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0
