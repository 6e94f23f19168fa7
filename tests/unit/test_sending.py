"""Order through the real queues, while brokers refuse, hang and answer late, under virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
)

from service.core.errors import OutputTooLarge, PublishFailed
from service.core.lanes import Lane
from service.core.messages import Message, Partition
from service.kafka.sending.lane_failures import LaneFailures
from service.kafka.sending.producers import Output
from service.kafka.sending.queues import Sending
from tests.support import virtual_time

A, B, C = (TopicPartition("records", each) for each in range(3))
DEADLINE_S = 5.0
RECORD_MAX_BYTES = 1_000
"""What the topics take; larger ones are refused, whichever of a batch they are."""
LANES = 3
MESSAGES = 14
"""Of each lane."""


def output(text: str, topic: str = "records", size: int = 10, **more: Any) -> Output:
    return Output(topic, None, text.encode(), [], None, size, **more)


class Log:
    """What stands in the output partitions, and what was overtaken there."""

    def __init__(self) -> None:
        self.landed: dict[TopicPartition, list[tuple[int, int]]] = defaultdict(list)
        self.overtaken: dict[tuple[int, int], str] = {}

    def append(self, where: TopicPartition, outputs: Sequence[Output]) -> None:
        for each in outputs:
            lane, number = map(int, (each.value or b"").split(b":"))
            before = self.landed[where]
            later = [each for each in before if each[0] == lane and each[1] > number]
            if later and (lane, number) not in before:
                self.overtaken[lane, number] = f"lands in {where} behind {later}"
            before.append((lane, number))

    def numbers(self, where: TopicPartition, lane: int = 0) -> list[int]:
        return [number for of_lane, number in self.landed[where] if of_lane == lane]


class Producer:
    """One whose answers are given by hand."""

    trusted, batches = True, 0

    def __init__(self, log: Log) -> None:
        self.log = log
        self.open: dict[TopicPartition, tuple[asyncio.Future[None], Sequence[Output]]] = {}

    def knows(self, _: TopicPartition) -> bool:
        return True

    async def enqueue(
        self, where: TopicPartition, outputs: Sequence[Output]
    ) -> asyncio.Future[None]:
        assert where not in self.open, "two batches of one partition under way"
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open[where] = answer, tuple(outputs)
        return answer

    def answer(self, where: TopicPartition, error: KafkaError | None = None) -> None:
        """Without an error the batch has landed."""
        answer, outputs = self.open.pop(where)
        if error is None:
            self.log.append(where, outputs)
        if not answer.done():
            answer.set_result(None) if error is None else answer.set_exception(error)


class Producers:
    """A new producer behind each that is not trusted any more."""

    def __init__(self) -> None:
        self.log = Log()
        self.all = [Producer(self.log)]

    @property
    def now(self) -> Producer:
        return self.all[-1]

    async def open(self) -> Any:
        if not self.now.trusted:
            self.all.append(Producer(self.log))
        return self.now

    def distrust(self, producer: Any, why: str) -> None:
        producer.trusted = False

    def release(self, producer: Any) -> None:
        pass

    def cut_off(self, producer: Any, why: str) -> None:
        producer.trusted = False
        for where in list(producer.open):
            producer.answer(where, KafkaError("the producer was replaced"))


class Lanes:
    """One lane by hand: what was handed over, and how it ended."""

    def __init__(self, producers: Producers, group: asyncio.TaskGroup) -> None:
        self.producers = producers
        self.sending = Sending(
            producers,  # type: ignore[arg-type]
            lambda _: 10**6,
            lambda *_: None,
            DEADLINE_S,
            group,
        )

    async def hand_over(
        self, number: int, *where: TopicPartition, lane: int = 0
    ) -> asyncio.Future[None]:
        text = f"{lane}:{number}"
        placed = [(each.partition, output(text, each.topic)) for each in where]
        return self.sending.hand_over(placed, lambda: None, lane)

    async def depart(self) -> None:
        await asyncio.sleep(0.1)

    async def answer(self, where: TopicPartition, error: KafkaError | None = None) -> None:
        for producer in self.producers.all:
            if where in producer.open:
                producer.answer(where, error)
        await self.depart()


def play(scene: Any) -> None:
    async def whole() -> None:
        async with asyncio.TaskGroup() as group:
            await scene(Lanes(Producers(), group))

    virtual_time.run(whole())


def failed(*futures: asyncio.Future[None]) -> list[bool]:
    return [each.done() and isinstance(each.exception(), PublishFailed) for each in futures]


def test_what_stands_behind_a_failed_one_in_another_partition_fails_with_it() -> None:
    """Its part for A is refused while the one for B waits: the next of its lane, which waits for
    B alone, does not go first; another lane's does, and stays where it is."""

    async def scene(lanes: Lanes) -> None:
        await lanes.hand_over(0, B)
        await lanes.depart()
        elder = await lanes.hand_over(1, A, B)
        next_ = await lanes.hand_over(2, B)
        other = await lanes.hand_over(1, B, lane=1)
        await lanes.depart()
        await lanes.answer(A, NotEnoughReplicasError())
        assert failed(elder, next_, other) == [True, True, False]
        await lanes.hand_over(1, A, B)
        again = await lanes.hand_over(2, B)
        for where in (B, A, B):
            await lanes.answer(where)
        assert (again.exception(), other.exception()) == (None, None)
        assert lanes.producers.log.numbers(B) == [0, 1, 2]

    play(scene)


def test_it_goes_on_from_queue_to_queue() -> None:
    """The second fails behind the first in B, and the third behind the second in C."""

    async def scene(lanes: Lanes) -> None:
        for where in (B, C):
            await lanes.hand_over(0, where, lane=2)
        await lanes.depart()
        first = await lanes.hand_over(1, A, B)
        second = await lanes.hand_over(2, B, C)
        third = await lanes.hand_over(3, C)
        alone = await lanes.hand_over(4, TopicPartition("letters", 0))
        await lanes.depart()
        await lanes.answer(A, NotEnoughReplicasError())
        assert failed(first, second, third, alone) == [True, True, True, False]
        for where in (B, C):
            await lanes.answer(where)
        assert lanes.producers.log.numbers(C) == []
        await lanes.answer(TopicPartition("letters", 0))
        assert alone.exception() is None

    play(scene)


def test_an_answer_that_does_not_come_fails_them_too() -> None:
    """A's batch is not answered in time. B's has left with it and ends the same way."""

    async def scene(lanes: Lanes) -> None:
        first = await lanes.hand_over(1, A)
        await lanes.depart()
        second = await lanes.hand_over(2, B)
        third = await lanes.hand_over(3, A, B)
        fourth = await lanes.hand_over(4, B)
        await asyncio.sleep(DEADLINE_S)
        assert failed(first, second, third, fourth) == [True] * 4
        assert lanes.producers.log.landed == {}

    play(scene)


def test_a_dead_letter_that_is_refused_for_its_size_keeps_its_place() -> None:
    """The next dead letter of its lane does not go before it; that of another lane does."""

    async def scene(lanes: Lanes) -> None:
        letters = TopicPartition("letters", 0)
        placed = [(0, output("0:1", "letters", must_fit=True))]
        held = lanes.sending.hand_over(placed, lambda: None, 0)
        behind = await lanes.hand_over(2, letters)
        other = await lanes.hand_over(1, letters, lane=1)
        await lanes.depart()
        await lanes.answer(letters, MessageSizeTooLargeError())  # whose fault is it?
        await lanes.answer(letters, MessageSizeTooLargeError())
        assert failed(held, behind, other) == [True, True, False]
        await lanes.answer(letters)
        assert other.exception() is None
        assert lanes.producers.log.numbers(letters) == []

    play(scene)


class Flaky(Producer):
    """Refuses, hangs, answers late, lands without saying so; by chance, in its own time."""

    def __init__(self, log: Log, chance: random.Random) -> None:
        super().__init__(log)
        self.chance = chance

    async def enqueue(
        self, where: TopicPartition, outputs: Sequence[Output]
    ) -> asyncio.Future[None]:
        if self.chance.random() < 0.03:
            raise NotEnoughReplicasError
        answer = await super().enqueue(where, outputs)
        # Most are quick; some come after the deadline.
        after_s = self.chance.choices((0.002, 0.01, 0.2, 2 * DEADLINE_S), (8, 4, 2, 1))[0]
        asyncio.get_running_loop().call_later(after_s, self._due, where, answer)
        return answer

    def _due(self, where: TopicPartition, answer: asyncio.Future[None]) -> None:
        if self.open.get(where, (None,))[0] is not answer:
            return  # it was cut off
        outputs = self.open[where][1]
        if any(each.size_bytes > RECORD_MAX_BYTES for each in outputs):
            self.answer(where, MessageSizeTooLargeError())
        elif any(each.timestamp_ms is not None for each in outputs):
            self.answer(where, InvalidTimestampError())
        elif (drawn := self.chance.random()) < 0.9:
            self.answer(where)
        else:
            if drawn < 0.95:  # it is there, and nobody hears of it
                self.log.append(where, outputs)
            self.answer(where, NotEnoughReplicasError())


class FlakyProducers(Producers):
    """One is not to be had at times; what was cut off may still land, later."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.all = [Flaky(self.log, chance)]

    async def open(self) -> Any:
        await asyncio.sleep(self.chance.choice((0, 0, 0.01)))
        if not self.now.trusted:
            if self.chance.random() < 0.2:
                raise PublishFailed("no producer")
            self.all.append(Flaky(self.log, self.chance))
        return self.now

    def cut_off(self, producer: Any, why: str) -> None:
        loop = asyncio.get_running_loop()
        for where, (_, outputs) in producer.open.items():
            fits = all(
                each.size_bytes <= RECORD_MAX_BYTES and each.timestamp_ms is None
                for each in outputs
            )
            if fits and self.chance.random() < 0.5:
                loop.call_later(self.chance.random(), self.log.append, where, outputs)
        super().cut_off(producer, why)


class Worker:
    """Lanes that do with the sink what the pipeline does, until every message has an end."""

    def __init__(self, seed: int, group: asyncio.TaskGroup) -> None:
        self.chance = random.Random(seed)
        self.producers = FlakyProducers(self.chance)
        self.sending = Sending(
            self.producers,  # type: ignore[arg-type]
            lambda _: 3_000,
            lambda *_: None,
            DEADLINE_S,
            group,
        )
        self.failures = LaneFailures("key")
        self.lanes = [Lane() for _ in range(LANES)]
        self.resting = [False] * LANES
        self.unfinished = LANES * MESSAGES
        self.outcomes: dict[tuple[int, int], list[tuple[int, Output]]] = {}
        self.given_up: set[tuple[int, int]] = set()
        self.finished = asyncio.Event()

    async def run(self) -> None:
        everything = [(lane, number) for lane in range(LANES) for number in range(MESSAGES)]
        for lane, number in everything:
            self.lanes[lane].enter(number)
            self.outcomes[lane, number] = self._outcome(lane, number)
        self.chance.shuffle(everything)
        for lane, number in everything:
            self.lanes[lane].answer(number)
            self._go_on(lane)
            await asyncio.sleep(self.chance.choice((0, 0.001, 0.02)))
        await self.finished.wait()

    def _outcome(self, lane: int, number: int) -> list[tuple[int, Output]]:
        drawn = self.chance.random()
        if drawn < 0.1:
            return [(0, self._letter(lane, number, 2_000))]
        large = RECORD_MAX_BYTES + 500 if drawn < 0.2 else 300
        early = 1 if drawn > 0.9 else None
        places = [self.chance.randrange(3) for _ in range(self.chance.randint(1, 4))]
        text = f"{lane}:{number}"
        records = [output(text, size=300) for _ in places]
        records[-1] = records[-1]._replace(size_bytes=large, timestamp_ms=early)
        return list(zip(places, records, strict=True))

    def _letter(self, lane: int, number: int, size: int) -> Output:
        return output(f"{lane}:{number}", "letters", size, must_fit=True)

    def _go_on(self, of: int) -> None:
        lane = self.lanes[of]
        while not self.resting[of] and (number := lane.hand_over()) is not None:
            message = Message(Partition("in", 0), number, 1, b"%d" % of, b"", (), 0)
            future: asyncio.Future[None]
            try:
                self.failures.let_pass(message)
            except PublishFailed as error:
                self.failures.add(message)
                future = asyncio.get_running_loop().create_future()
                future.set_exception(error)
            else:
                future = self.sending.hand_over(
                    self.outcomes[of, number],
                    partial(self.failures.add, message),
                    self.failures.lane(message),
                )
            future.add_done_callback(partial(self._settled, of, number))

    def _settled(self, of: int, number: int, future: asyncio.Future[None]) -> None:
        lane = self.lanes[of]
        match future.exception():
            case None:
                self.unfinished -= 1
                reopened = lane.acknowledge(number)
            case OutputTooLarge():
                # Younger dead letters may have gone before it was refused: it has no order. And
                # what was cut off of its records may land whenever it likes: nobody wants it.
                self.given_up.add((of, number))
                own = LANES * (number + 1) + of
                self.outcomes[of, number] = [(0, self._letter(own, number, 300))]
                reopened = lane.fail(number)
            case PublishFailed():
                (place, first), *more = self.outcomes[of, number]
                if first.must_fit:  # the sink writes a smaller one
                    first = first._replace(size_bytes=max(300, first.size_bytes // 2))
                self.outcomes[of, number] = [(place, first), *more]
                reopened = lane.fail(number)
            case failure:
                raise AssertionError(failure)
        if reopened:
            self.resting[of] = True
            asyncio.get_running_loop().call_later(0.05, self._rested, of)
        if not self.unfinished:
            self.finished.set()

    def _rested(self, of: int) -> None:
        self.resting[of] = False
        self._go_on(of)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_output_overtakes_its_elder_whatever_fails(first: int) -> None:
    """Three lanes, messages with one to four records for three partitions, dead letters, records
    that are too large: every message gets its end, and in each output partition the first record
    of a message never stands behind one of a later message of its lane."""

    async def one(seed: int) -> Worker:
        async with asyncio.TaskGroup() as group:
            worker = Worker(seed, group)
            async with asyncio.timeout(3_000):
                await worker.run()
        return worker

    for seed in range(first, first + 50):
        try:
            worker = virtual_time.run(one(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        log = worker.producers.log
        wrong = {each: log.overtaken[each] for each in log.overtaken.keys() - worker.given_up}
        assert wrong == {}, seed
        ended = {(of % LANES, n) for landed in log.landed.values() for of, n in landed}
        assert len(ended) == LANES * MESSAGES
