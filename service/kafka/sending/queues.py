"""One queue for each output partition, one batch of it under way: order without waiting.

Whoever hands outputs over need not wait, and never overtakes itself: what is handed over behind
a batch stays here until that batch is settled. If it fails, everything queued behind it fails
with it and nothing of it has left. aiokafka sends one batch a partition at a time as well, so
this costs no throughput.

A message may have outputs in several queues. Where one of them fails, the message fails, and its
others leave their queues too. So what stands behind them there and belongs to the same lane fails
with it, and what stands behind those: it would reach readers before an earlier message of
its lane. What travels in one batch with that earlier message may still land behind it; it is sent
again as well, so that the newest message of a lane is the last to land.

All partitions with something to send depart together, in one task: the client puts what goes to
one broker at the same moment into one request, and requests are what costs.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from service import clock
from service.core.errors import OutputTooLarge, PublishFailed, SluiceError
from service.kafka.sending.producers import Output, Producer, Producers

LINGER_S = 0.007
"""The time between two departures is short against a call to a model, and long enough to fill
requests."""
GATHERED_MIN = 2.0
"""Where fewer outputs than this would gather between two departures, each leaves at once: waiting
for others costs time and saves no request."""
GAP_WEIGHT = 1 / 16
"""The latest gap has this weight in the mean of gaps, so that a rate is known after some dozen
outputs."""
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
"""With these brokers refuse a batch whose size is above the topic's limit, whichever record it
was."""

log = logging.getLogger(__name__)


class Handover:
    """The outputs of one message: settled when all are acknowledged, failed when one is.

    Those of one `lane` must not overtake each other.
    """

    __slots__ = ("future", "lane", "on_failure", "open")

    def __init__(self, outputs: int, on_failure: Callable[[], None], lane: Hashable = None) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open = outputs
        self.on_failure = on_failure
        self.lane = lane

    def acknowledged(self) -> None:
        self.open -= 1
        if not self.open and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: SluiceError) -> None:
        """Does nothing where it is settled, or where nobody waits for it any more."""
        if self.future.done():
            return
        if isinstance(error, PublishFailed):
            self.on_failure()
        self.future.set_exception(error)
        self.future.exception()  # read once: nobody waits where the lane was dropped


@dataclass(slots=True)
class Waiting:
    """One output in its queue; `alone` after a refusal, to find out whose fault it was."""

    output: Output
    handover: Handover
    alone: bool = False


class OutputQueue:
    """What waits for one output partition, and its batch that is under way.

    `running` from when it boards for a departure until nothing waits behind its last batch.
    """

    __slots__ = ("running", "under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Waiting] = deque()
        self.under_way: list[Waiting] = []
        self.running = False

    def next_batch(self, size_max: int) -> list[Waiting]:
        """The next batch, in order; what has failed or was withdrawn meanwhile is left out."""
        batch: list[Waiting] = []
        size = 0
        while self.waiting:
            each = self.waiting[0]
            if each.handover.future.done():
                self.waiting.popleft()
                continue
            size += each.output.size_bytes
            if batch and (each.alone or batch[0].alone or size > size_max):
                break
            batch.append(self.waiting.popleft())
        return batch

    def behind(self, failed: Collection[Handover]) -> Iterator[Handover]:
        """What is open here, behind an output of one of these, in the same lane."""
        lanes: set[Hashable] = set()
        for each in chain(self.under_way, self.waiting):
            if each.handover in failed:
                lanes.add(each.handover.lane)
            elif each.handover.lane in lanes and not each.handover.future.done():
                yield each.handover


class Sending:
    """The queues, and the tasks that empty them."""

    def __init__(
        self,
        producers: Producers,
        batch_max_bytes: Callable[[str], int],
        refused: Callable[[str, int], None],
        deadline_s: float,
        group: asyncio.TaskGroup,
    ) -> None:
        self._producers = producers
        self._batch_max_bytes = batch_max_bytes
        self._refused = refused
        self._deadline_s = deadline_s
        self._group = group
        self._queues: dict[TopicPartition, OutputQueue] = {}
        self._boarding: dict[TopicPartition, OutputQueue] = {}  # they leave with the next departure
        self._departure_s = 0.0  # nothing leaves before, unless too few come
        self._handed_over_s = 0.0
        self._gap_s = LINGER_S  # on average, between two hand-overs
        self._tasks: set[asyncio.Task[None]] = set()

    def hand_over(
        self,
        outputs: Sequence[tuple[int, Output]],
        on_failure: Callable[[], None],
        lane: Hashable = None,
    ) -> asyncio.Future[None]:
        """Take outputs with their partitions, in order, without waiting.

        The future ends when all are acknowledged; with `PublishFailed` nothing of its lane that
        was handed over later lands before it is handed over again, in no partition that it has
        outputs for. Cancelling it withdraws what has not left yet.
        """
        handover = Handover(len(outputs), on_failure, lane)
        self._measure_gap()
        for partition, output in outputs:
            where = TopicPartition(output.topic, partition)
            queue = self._queues.get(where)
            if queue is None:
                queue = self._queues[where] = OutputQueue()
            queue.waiting.append(Waiting(output, handover))
            if not queue.running:
                self._board(where, queue)
        return handover.future

    async def stop(self, flush_timeout_s: float) -> bool:
        """Give what is queued this long, then fail the rest; whether nothing was left."""
        deadline_s = clock.now_s() + flush_timeout_s
        while self._tasks and (rest_s := deadline_s - clock.now_s()) > 0:
            await asyncio.wait(self._tasks, timeout=rest_s)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        for where, queue in self._queues.items():
            self._fail_all(queue, f"{_name(where)}: the sink was stopped")
        return not left

    def _board(self, where: TopicPartition, queue: OutputQueue) -> None:
        queue.running = True
        self._boarding[where] = queue
        if len(self._boarding) == 1:
            self._start(self._depart())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _depart(self) -> None:
        """Wait for the next departure, then send a batch of each queue that has boarded."""
        await self._linger()
        boarded, self._boarding = self._boarding, {}
        try:
            producer = await self._producers.open()
        except PublishFailed as error:
            for where, queue in boarded.items():
                queue.running = False
                self._fail_all(queue, f"{_name(where)}: {error}")
            return
        for where in [each for each in boarded if not producer.knows(each)]:
            # What has to be looked up first holds up nobody else.
            self._start(self._send(producer, {where: boarded.pop(where)}))
        await self._send(producer, boarded)

    def _measure_gap(self) -> None:
        now_s = clock.now_s()
        # After a pause the rate is not known to be low: the pause counts as one short of it.
        gap_s = min(now_s - self._handed_over_s, 2 * LINGER_S)
        self._gap_s += (gap_s - self._gap_s) * GAP_WEIGHT
        self._handed_over_s = now_s

    async def _linger(self) -> None:
        """Until the next departure, which whoever waits takes together."""
        gathers = GATHERED_MIN * self._gap_s <= LINGER_S
        await asyncio.sleep(max(0.0, self._departure_s - clock.now_s()) if gathers else 0)
        self._departure_s = clock.now_s() + LINGER_S

    async def _send(
        self, producer: Producer, boarded: Mapping[TopicPartition, OutputQueue]
    ) -> None:
        """Send a batch of each; it is settled when its answer is there or the time is over."""
        unsettled = dict(boarded)
        sent: dict[asyncio.Future[Any], TopicPartition] = {}
        producer.batches += len(boarded)
        try:
            async with asyncio.timeout(self._deadline_s):
                for where, queue in boarded.items():
                    sent[await self._sent(producer, where, queue)] = where
                while sent:
                    answered, _ = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
                    for each in answered:
                        where = sent.pop(each)
                        self._settle(producer, where, unsettled.pop(where), each.exception())
        except TimeoutError:
            why = f"not acknowledged within {self._deadline_s:g} s"
            self._producers.cut_off(producer, f"{', '.join(map(_name, unsettled))}: {why}")
            for where, queue in unsettled.items():
                self._fail_all(queue, f"{_name(where)}: {why}")
                self._ended(where, queue)
        finally:
            for each in sent:
                each.cancel()  # nobody wants to hear of it any more
            producer.batches -= len(unsettled)
            self._producers.release(producer)

    async def _sent(
        self, producer: Producer, where: TopicPartition, queue: OutputQueue
    ) -> asyncio.Future[Any]:
        """The queue's next batch is with the client; the answer to it."""
        queue.under_way = queue.next_batch(self._batch_max_bytes(where.topic))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not queue.under_way:  # all of it was withdrawn
            answer.set_result(None)
            return answer
        try:
            return await producer.enqueue(where, [each.output for each in queue.under_way])
        except KafkaError as error:
            answer.set_exception(error)
            return answer

    def _settle(
        self,
        producer: Producer,
        where: TopicPartition,
        queue: OutputQueue,
        error: BaseException | None,
    ) -> None:
        """Acknowledged, put back to be tried otherwise, or failed."""
        producer.batches -= 1
        match error:
            case None:
                for each in queue.under_way:
                    each.handover.acknowledged()
            case KafkaError():
                self._producers.distrust(producer, f"{_name(where)}: {type(error).__name__}")
                self._settle_refused(where, queue, error)
            case _:
                raise error
        self._ended(where, queue)

    def _ended(self, where: TopicPartition, queue: OutputQueue) -> None:
        queue.under_way, queue.running = [], False
        if queue.waiting:
            self._board(where, queue)

    def _settle_refused(self, where: TopicPartition, queue: OutputQueue, error: KafkaError) -> None:
        """What a broker's answer means for a batch, and for what waits behind it."""
        batch = queue.under_way
        if isinstance(error, TOO_LARGE):
            self._refused(where.topic, sum(each.output.size_bytes for each in batch))
        failure = after_refusal(batch, error)
        if failure is None:
            queue.waiting.extendleft(reversed(batch))
        elif isinstance(failure, PublishFailed) and not isinstance(error, TOO_LARGE):
            self._fail_all(queue, f"{_name(where)}: {failure}")
        else:
            self._fail([batch[0].handover], failure)

    def _fail_all(self, queue: OutputQueue, why: str) -> None:
        """Nothing that was handed over later may land before these are sent again."""
        behind, queue.waiting = queue.waiting, deque()
        self._fail([each.handover for each in (*queue.under_way, *behind)], PublishFailed(why))

    def _fail(self, handovers: Sequence[Handover], error: SluiceError) -> None:
        """These, and where they are to be sent again, whatever of their lanes stands behind them
        in any queue.

        With `OutputTooLarge` nothing goes to these partitions again: nothing is overtaken.
        """
        failed = {each: None for each in handovers if not each.future.done()}
        for each in failed:
            each.fail(error)
        while failed and isinstance(error, PublishFailed):
            failed = dict.fromkeys(chain(*(q.behind(failed) for q in self._queues.values())))
            for each in failed:
                each.fail(PublishFailed("an earlier message of its lane failed and goes first"))


def after_refusal(batch: Sequence[Waiting], error: KafkaError) -> SluiceError | None:
    """What ends the outputs of a refused batch; None: they are to go again, one by one.

    A refused batch says nothing of the single record.
    """
    if isinstance(error, TOO_LARGE):
        if len(batch) == 1:
            return _too_large(batch[0].output)
    elif isinstance(error, InvalidTimestampError) and any(
        each.output.timestamp_ms is not None for each in batch
    ):
        # The topic bounds how far a timestamp may lie from now, and input has others.
        if len(batch) == 1:
            batch[0].output = batch[0].output._replace(timestamp_ms=None)
    else:
        return PublishFailed(type(error).__name__)
    for each in batch:
        each.alone = True
    return None


def _too_large(output: Output) -> SluiceError:
    text = f"topic {output.topic} does not take a record of {output.size_bytes} bytes"
    return PublishFailed(text) if output.must_fit else OutputTooLarge(text)


def _name(where: TopicPartition) -> str:
    return f"{where.topic}[{where.partition}]"
