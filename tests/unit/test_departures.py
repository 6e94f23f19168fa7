"""When outputs leave for Kafka: at once where few come, together where many do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.kafka.producers import Output
from service.kafka.sending import LINGER_S, Sending
from tests.support import virtual_time

ROUND_TRIP_S = 0.001


class Broker:
    """Stands for the producers: notes when each batch left, acknowledges after a round trip."""

    def __init__(self) -> None:
        self.left_s: list[float] = []
        self.batches = 0

    async def open(self) -> Broker:
        return self

    def knows(self, _: object) -> bool:
        return True

    async def enqueue(self, _: object, outputs: Sequence[Output]) -> asyncio.Future[None]:
        assert outputs, "an empty batch"
        loop = asyncio.get_running_loop()
        self.left_s.append(loop.time())
        answer: asyncio.Future[None] = loop.create_future()
        loop.call_later(ROUND_TRIP_S, answer.set_result, None)
        return answer

    def release(self, _: object) -> None:
        pass


def waits_and_departures(gap_s: float, partitions: int = 6) -> tuple[list[float], int]:
    """How long each output waited until it was acknowledged, and how often batches left."""

    async def play() -> tuple[list[float], int]:
        broker: Any = Broker()
        async with asyncio.TaskGroup() as group:
            sending = Sending(broker, lambda _: 1000, lambda *_: None, 60.0, group)
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
    output = Output("records", None, b"{}", [], None, 10)
    await sending.hand_over([(number % partitions, output)], lambda: None)
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
