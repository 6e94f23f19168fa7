"""What the service does at a provider's limits, in real time: real Kafka, real processes.

    python -m tests.bench.provider hidden     a limit of 600 calls a minute that nobody tells
    python -m tests.bench.provider outage     ten minutes down under load, then back
    python -m tests.bench.provider shared     two and three workers, one budget of tokens
    python -m tests.bench.provider            all side by side, in about a quarter of an hour

Each prints a line and what of it was demanded; exit code 1 where something does not hold. Settings
are the defaults but for what a line names.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from tests.support.endpoint import Asked, Endpoint, Latency, Step
from tests.support.kafka import a_kafka
from tests.support.service import Service, service
from tests.support.topics import committed, create_topic, produce, read_topic, unique_name

PARTITIONS = 6
HIDDEN_PER_MINUTE = 600
BUCKET_CALLS = 10.0
"""What the hidden limit lets through at once: a second's worth."""
SETTLING_S, MEASURED_S = 120.0, 600.0
DOWN_S = 600.0
FULL_SPEED_WITHIN_S = 15.0
TOKENS_PER_MINUTE = 60_000
SHARED_S = 300.0
SHARED_SETTLING_S = 60.0
RETRY_AFTER_S = 5


@dataclass
class Counted:
    """A provider that counts: a token bucket of calls, tokens of its answers, both over time."""

    per_minute: float | None = None
    level: float = BUCKET_CALLS
    at_s: float = 0.0
    taken: deque[float] = field(default_factory=deque)
    refused: deque[float] = field(default_factory=deque)
    down_until_s: float = 0.0

    def __call__(self, asked: Asked) -> Step:
        now_s = time.monotonic()
        if now_s < self.down_until_s:
            return Step("503", headers=(("retry-after", str(RETRY_AFTER_S)),))
        if self.per_minute is not None:
            gained = (now_s - self.at_s) * self.per_minute / 60
            self.level, self.at_s = min(BUCKET_CALLS, self.level + gained), now_s
            if self.level < 1:
                self.refused.append(now_s)
                return Step("429")
            self.level -= 1
        self.taken.append(now_s)
        return Step()

    def between(self, calls: deque[float], begin_s: float, end_s: float) -> int:
        return sum(begin_s <= at_s < end_s for at_s in calls)


@dataclass
class Place:
    """Topics, a provider, and workers that are started by `worker`."""

    servers: str
    provider: Counted
    endpoint: Endpoint
    topics: dict[str, str]
    stack: AsyncExitStack

    async def worker(self, **more: str) -> Service:
        environment = {
            "SLUICE_KAFKA__BOOTSTRAP_SERVERS": self.servers,
            "SLUICE_KAFKA__GROUP_ID": self.topics["input"],
            "SLUICE_INPUT__TOPICS": self.topics["input"],
            "SLUICE_OUTPUT__TOPIC": self.topics["output"],
            "SLUICE_DEAD_LETTERS__TOPIC": self.topics["letters"],
            "SLUICE_EXTRACTION__MODEL": "scripted",
            "OPENAI_BASE_URL": self.endpoint.url,
            "OPENAI_API_KEY": "none",
            **more,
        }
        return await self.stack.enter_async_context(service(environment))

    async def fill(self, messages: int, partition: int | None = None) -> None:
        texts = [
            (b"key-%d" % (n % 600), f"Person{n} is {n % 90}".encode()) for n in range(messages)
        ]
        await produce(self.servers, self.topics["input"], texts, partition=partition)

    async def finished(self) -> int:
        """Messages below the group's committed offsets."""
        topic = self.topics["input"]
        found = await committed(self.servers, topic, topic, PARTITIONS)
        return sum(offset for offset, _ in found.values())


@asynccontextmanager
async def place(servers: str, provider: Counted, latency: Latency) -> AsyncIterator[Place]:
    topics = {word: unique_name(word) for word in ("input", "output", "letters")}
    for topic in topics.values():
        await create_topic(servers, topic, PARTITIONS)
    endpoint = Endpoint(script=provider, latency=latency, record=False)
    async with endpoint, AsyncExitStack() as stack:
        yield Place(servers, provider, endpoint, topics, stack)


def told(what: str, figures: str, demanded: str, *, holds: bool) -> bool:
    print(f"| {what} | {figures} | {demanded} | {'yes' if holds else 'NO'} |", flush=True)
    return holds


async def hidden(servers: str) -> bool:
    """One worker with the default slots at a provider that says nothing of its limit."""
    provider = Counted(HIDDEN_PER_MINUTE)
    async with place(servers, provider, Latency(0.5, 0.7)) as at:
        await at.fill(int(HIDDEN_PER_MINUTE * (SETTLING_S + MEASURED_S) / 60 * 1.3))
        worker = await at.worker()
        await worker.until("sluice_calls_total", 1)
        begin_s = time.monotonic() + SETTLING_S
        await asyncio.sleep(SETTLING_S + MEASURED_S)
        taken = provider.between(provider.taken, begin_s, begin_s + MEASURED_S)
        refused = provider.between(provider.refused, begin_s, begin_s + MEASURED_S)
    used = taken / (HIDDEN_PER_MINUTE * MEASURED_S / 60)
    share = refused / (taken + refused)
    return told(
        f"hidden limit of {HIDDEN_PER_MINUTE}/min, minutes 3 to 12",
        f"{used:.3f} of it used, {share:.2%} of the calls refused",
        "at least 0.95, below 2 %",
        holds=used >= 0.95 and share < 0.02,
    )


async def outage(servers: str) -> bool:
    """503 with Retry-After to everything for ten minutes, under load."""
    provider = Counted()
    messages = 12_000
    async with place(servers, provider, Latency(0.5, 0.7)) as at:
        await at.fill(messages)
        worker = await at.worker()
        await worker.until("sluice_messages_finished_total", 1_000, within_s=120)
        await asyncio.sleep(10)
        now_s = time.monotonic()
        before = provider.between(provider.taken, now_s - 10, now_s) / 10
        provider.down_until_s = back_s = now_s + DOWN_S
        await asyncio.sleep(DOWN_S + 60)
        seconds = _until_full(provider, back_s, before)
        while await at.finished() < messages:
            await asyncio.sleep(1)
        outputs = await read_topic(servers, at.topics["output"])
        letters = await read_topic(servers, at.topics["letters"])
        lost = messages - len({read.header["sluice.id"] for read in outputs})
    return told(
        f"provider down for {DOWN_S / 60:g} min (503, Retry-After {RETRY_AFTER_S} s)",
        f"{len(letters)} dead letters, {lost} lost, full speed ({before:.0f}/s) "
        f"{seconds:.1f} s after it was back",
        f"0, 0, within {FULL_SPEED_WITHIN_S:g} s of the last Retry-After",
        holds=not letters and not lost and seconds <= FULL_SPEED_WITHIN_S + RETRY_AFTER_S,
    )


def _until_full(provider: Counted, back_s: float, before: float) -> float:
    """Seconds until the first five in which nine tenths of the calls of before were made."""
    for tenth in range(600):
        at_s = back_s + tenth / 10
        if provider.between(provider.taken, at_s, at_s + 5) >= 0.9 * before * 5:
            return tenth / 10
    return float("inf")


async def shared(servers: str, workers: int, partition: int | None) -> bool:
    """Tokens of all workers together, by what the answers say that they have used."""
    provider = Counted()
    async with place(servers, provider, Latency(0.5, 0.7)) as at:
        await at.fill(12_000, partition)
        budget = {"SLUICE_LIMITS__TOKENS_PER_MINUTE": str(TOKENS_PER_MINUTE)}
        running = [await at.worker(**budget) for _ in range(workers)]
        for each in running:
            await each.until("sluice_group_settled", 1)
        await asyncio.sleep(SHARED_SETTLING_S)
        before = [await _tokens(each) for each in running]
        await asyncio.sleep(SHARED_S)
        used = sum([await _tokens(each) for each in running]) - sum(before)
    share = used / (TOKENS_PER_MINUTE * SHARED_S / 60)
    where = "over all partitions" if partition is None else "all of it in one partition"
    least = 0.95 if partition is None else 0.9
    return told(
        f"{workers} workers, {TOKENS_PER_MINUTE} tokens/min together, backlog {where}",
        f"{share:.3f} of the budget used in {SHARED_S / 60:g} min",
        f"{least:g} to 1.05",
        holds=least <= share <= 1.05,
    )


async def _tokens(worker: Service) -> float:
    _, text = await worker.get("/metrics")
    found = re.findall(r'^sluice_tokens_total\{[^}]*type="(?:input|output)"\} (\S+)$', text, re.M)
    return sum(map(float, found))


async def run(servers: str, words: list[str]) -> bool:
    wanted = words or ["hidden", "outage", "shared"]
    async with asyncio.TaskGroup() as tasks:
        results = []
        if "hidden" in wanted:
            results.append(tasks.create_task(hidden(servers)))
        if "outage" in wanted:
            results.append(tasks.create_task(outage(servers)))
        if "shared" in wanted:
            for workers in (2, 3):
                for partition in (None, 0):
                    results.append(tasks.create_task(shared(servers, workers, partition)))
    return all(each.result() for each in results)


def main(words: list[str]) -> int:
    with a_kafka() as servers:
        print("| what | measured | demanded | holds |\n|---|---|---|---|")
        return 0 if asyncio.run(run(servers, words)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
