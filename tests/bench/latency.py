"""What Sluice adds to the time of a call, at 70 % load: from broker to broker, less the call.

The broker stamps a message when it is appended to the input topic, and its record when it is
appended to the output topic; the record itself says when its call began and ended at the endpoint.
What is left is all that lies between: fetch, poll, window, slot, HTTP both ways, validation,
lane, producer. The promise leaves out the fetch, so this is the stricter figure. Milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, replace
from statistics import median, quantiles

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import ConsumerRecord

from tests.bench.driver import (
    START_S,
    Load,
    Place,
    at_work,
    memory_mb,
    stats,
)
from tests.support.topics import create_topic, producer, unique_name

LOAD_SHARE = 0.7
STAMPED = {"message.timestamp.type": "LogAppendTime"}
PACE_S = 0.005
"""Between two handfuls of messages: a load without bursts of its own."""
WARM_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class Added:
    """Latency added to a call, and what the process came to hold."""

    slots: int
    messages: int
    rate: float
    p50_ms: float
    p99_ms: float
    memory_mb: float
    before_p50_ms: float = 0.0  # from the input topic to the call's beginning
    after_p50_ms: float = 0.0  # from its end to the output topic

    def __str__(self) -> str:
        return (
            f"{self.slots:>6} slots, {self.rate:.0f} messages/s: added p50 {self.p50_ms:.1f} ms, "
            f"p99 {self.p99_ms:.1f} ms over {self.messages} messages (p50 before the call "
            f"{self.before_p50_ms:.1f}, after it {self.after_p50_ms:.1f}); {self.memory_mb:.0f} MB"
        )


async def added(servers: str, load: Load, seconds: float) -> Added:
    """Run Sluice at `LOAD_SHARE` of its slots, ordering none, and look at each record."""
    place = Place(servers, replace(load, partitions=6), unique_name("input"))
    await create_topic(servers, place.input, 6, config=STAMPED)
    told = {"SLUICE_DELIVERY__ORDERING": "none"}
    async with at_work(place, told=told, topic_config=STAMPED) as work:
        await _first_call(place, work.url)
        rate = load.slots_rate * LOAD_SHARE
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(_send(place, rate))
            reading = tasks.create_task(_read(servers, work.output, seconds))
            ways_ms = await reading
            sending.cancel()
        held_mb = memory_mb(work.process.pid)
    cuts = quantiles(map(sum, ways_ms), n=100)
    before_ms, after_ms = map(median, zip(*ways_ms, strict=True))
    return Added(load.slots, len(ways_ms), rate, cuts[49], cuts[98], held_mb, before_ms, after_ms)


async def _first_call(place: Place, url: str) -> None:
    """Until it has its partitions, messages would only wait for them."""
    deadline = time.monotonic() + START_S
    async with producer(place.servers) as client:
        await client.send_and_wait(place.input, b"Ada Lovelace is 36")
    while not (await stats(url))["most"]:
        assert time.monotonic() < deadline, "no call was made"
        await asyncio.sleep(0.2)


async def _send(place: Place, rate: float) -> None:
    async with producer(place.servers) as client:
        began_s, sent = time.monotonic(), 0
        while True:
            while sent < (time.monotonic() - began_s) * rate:
                await client.send(place.input, b"%d: Ada Lovelace is 36" % sent)
                sent += 1
            await asyncio.sleep(PACE_S)


async def _read(servers: str, topic: str, seconds: float) -> list[tuple[float, float]]:
    """What was added before and after each call, once the slots are as busy as they get."""
    found_ms: list[tuple[float, float]] = []
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        # The calls of the first messages end at the same time as shorter ones of later ones.
        from_s = time.time() + WARM_UP_S
        until_s = time.monotonic() + WARM_UP_S + seconds
        while time.monotonic() < until_s:
            batches = await consumer.getmany(timeout_ms=200)
            for record in (each for batch in batches.values() for each in batch):
                if record.timestamp / 1000 > from_s:
                    found_ms.append(_added_ms(record))
    finally:
        await consumer.stop()
    assert found_ms, "no record came"
    return found_ms


def _added_ms(record: ConsumerRecord) -> tuple[float, float]:
    headers, value = dict(record.headers), json.loads(record.value)
    came_ms = int(headers["sluice.source.timestamp"])
    return value["began_us"] / 1000 - came_ms, record.timestamp - value["ended_us"] / 1000
