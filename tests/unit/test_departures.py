"""When outputs leave for Kafka: at once where few come, together where many do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import TopicPartition

from service.kafka.sending.producers import Output
from service.kafka.sending.queues import LINGER_S, Sending
from tests.support import virtual_time

ROUND_TRIP_S = 0.001


class Broker:
    """Stands for the producers: notes when each batch left, acknowledges after a round trip."""

    def __init__(self, unknown: str | None = None) -> None:
        self.unknown = unknown  # a topic that has to be looked up, for a second
        self.left_s: list[float] = []
        self.batches = 0

    async def open(self) -> Broker:
        return self

    def knows(self, where: TopicPartition) -> bool:
        return where.topic != self.unknown

    async def enqueue(
        self, where: TopicPartition, outputs: Sequence[Output]
    ) -> asyncio.Future[None]:
        assert outputs, "an empty batch"
        if not self.knows(where):
            await asyncio.sleep(1)
        loop = asyncio.get_running_loop()
        self.left_s.append(loop.time())
        answer: asyncio.Future[None] = loop.create_future()
        loop.call_later(ROUND_TRIP_S, answer.set_result, None)
        return answer

    def release(self, _: object) -> None:
        pass


def output(topic: str = "records") -> Output:
    return Output(topic, None, b"{}", [], None, 10)


def sending_to(broker: Any, group: asyncio.TaskGroup) -> Sending:
    return Sending(broker, lambda _: 1000, lambda *_: None, 60.0, group)


def waits_and_departures(gap_s: float, partitions: int = 6) -> tuple[list[float], int]:
    """How long each output waited until it was acknowledged, and how often batches left."""

    async def play() -> tuple[list[float], int]:
        broker = Broker()
        async with asyncio.TaskGroup() as group:
            sending = sending_to(broker, group)
            waits = [
                group.create_task(hand_over(sending, number, gap_s, partitions))
                for number in range(200)
            ]
        return [each.result() for each in waits], len(set(broker.left_s))

    return virtual_time.run(play())


async def hand_over(sending: Sending, number: int, gap_s: float, partitions: int) -> float:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(number * gap_s)
    began_s = loop.time()
    await sending.hand_over([(number % partitions, output())], lambda: None)
    return loop.time() - began_s


def test_a_lone_output_leaves_at_once() -> None:
    """Where one comes every 4 ms, hardly another would come within a wait of 7 ms."""
    waits, _ = waits_and_departures(gap_s=0.004)
    assert max(waits) == pytest.approx(ROUND_TRIP_S)


def test_many_outputs_leave_together() -> None:
    """Of all partitions, one departure for each `LINGER_S`, and none waits for longer."""
    waits, departures = waits_and_departures(gap_s=0.001)
    lasted_s = 200 * 0.001
    assert departures < 2 * lasted_s / LINGER_S
    assert max(waits) < LINGER_S + 2 * ROUND_TRIP_S + 0.001


def test_a_burst_after_a_pause_soon_gathers() -> None:
    """A rate is noticed within some dozen outputs."""
    waits, departures = waits_and_departures(gap_s=0.0)
    assert departures < 10
    assert max(waits) < 0.1


def test_what_has_to_be_looked_up_holds_up_nobody_else() -> None:
    """One topic without metadata delays what goes there, and nothing that departs with it."""

    async def play() -> list[float]:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            sending = sending_to(Broker(unknown="letters"), group)
            began_s, waits_s = loop.time(), []
            letter = sending.hand_over([(0, output("letters"))], lambda: None)
            record = sending.hand_over([(0, output())], lambda: None)
            for each in (record, letter):
                await each
                waits_s.append(loop.time() - began_s)
        return waits_s

    record_s, letter_s = virtual_time.run(play())
    assert record_s < 2 * LINGER_S
    assert letter_s > 1
