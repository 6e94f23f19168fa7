"""Sends dead letters to the input again, each once, whatever is killed meanwhile.

What is sent and the mark that says so are one transaction. The transactional id is the same for
every redrive of a dead letter topic: the start of a producer ends whatever an earlier one had
open and shuts that one out, and only then the marks are read. So whoever sends knows all that was
ever sent, and two at once cannot both send.

A message goes back byte for byte (key, value, the headers that it first had), to the partition in
which it first came in, with its history behind its headers. Its own timestamp is now, so that
retention does not delete it at once; the first one is in the history, and outputs carry that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import Enum

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from service.core.errors import CannotRun
from service.kafka.client.connection import client_options
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import stop_for
from service.kafka.client.topics_seen import look_at_topics
from service.kafka.letters.reader import Letter, Reader, Redriven, Selection, mark, opened
from service.kafka.sending.producers import BATCH_MAX_BYTES, Output
from service.kafka.sending.sizes import UNKNOWN, record_max_bytes, size_alone
from service.kafka.transactions.producer import Fenced, TransactionalProducer
from service.kafka.transactions.transactions import PREFIX, transactional_options
from service.settings import Settings

LETTERS_MAX = 500
"""One transaction sends at most this many letters again."""

NAMED_MAX = 5
"""A sentence names at most this many letters."""


class Left(Enum):
    """Why a letter that is meant is not sent; the text says what to do."""

    ALREADY = "were sent again before; --again sends them once more"
    TOO_OFTEN = "came back too often: raise --attempts-max to send them all the same"
    NOT_OURS = "came in through a topic that is not among input.topics: name it there"
    TOO_LARGE = "don't fit their topic any more: raise its max.message.bytes"


@dataclass
class RedrivePlan:
    """What a redrive comes to: how many are sent, which are left and why."""

    sent: int = 0
    declined: bool = False  # the person said no
    left: dict[Left, list[Letter]] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether something that was asked for is left undone."""
        return any(why is not Left.ALREADY for why in self.left)

    def sentences(self) -> list[str]:
        return [
            f"{len(letters)} {why.value} ({_named(letters)})" for why, letters in self.left.items()
        ]


def _named(letters: list[Letter]) -> str:
    named = ", ".join(f"{each.at.partition}:{each.at.offset}" for each in letters[:NAMED_MAX])
    return named + (", …" if len(letters) > NAMED_MAX else "")


@dataclass(frozen=True, slots=True)
class Input:
    """An input topic, as far as it matters here."""

    partitions: int
    record_max_bytes: int


@dataclass(frozen=True, slots=True)
class RedriveRequest:
    """What a person asks for."""

    selection: Selection
    again: bool = False
    attempts_max: int = 3
    limit: int | None = None


class Redrive:
    """The redrive of what is wished, over one reader."""

    def __init__(
        self,
        request: RedriveRequest,
        reader: Reader,
        inputs: Mapping[str, Input],
        redriven: Redriven,
    ) -> None:
        self._request, self._reader = request, reader
        self._inputs, self._redriven = inputs, redriven
        self._partitioner = DefaultPartitioner()
        self._batch_max_bytes = min(
            (BATCH_MAX_BYTES, *(each.record_max_bytes for each in inputs.values()))
        )
        """So that what goes to any partition makes one batch; a larger message goes alone."""

    async def plan(self) -> RedrivePlan:
        """What would come of it; sends nothing."""
        plan = RedrivePlan()
        async for letter, why in self._judged():
            if why is None:
                plan.sent += 1
            else:
                plan.left.setdefault(why, []).append(letter)
        return plan

    async def batches(self) -> AsyncIterator[list[tuple[Letter, Output]]]:
        """What goes in one transaction each: letters of one partition, within a batch's size."""
        batch: list[tuple[Letter, Output]] = []
        size = 0
        async for letter, why in self._judged():
            if why is not None:
                continue
            output = self.output(letter)
            other = batch and batch[0][0].at.partition != letter.at.partition
            full = len(batch) == LETTERS_MAX or size + output.size_bytes > self._batch_max_bytes
            if other or (batch and full):
                yield batch
                batch, size = [], 0
            batch.append((letter, output))
            size += output.size_bytes
        if batch:
            yield batch

    async def _judged(self) -> AsyncIterator[tuple[Letter, Left | None]]:
        wanted = 0
        async for letter in self._reader.letters(self._request.selection):
            why = self._why_left(letter)
            wanted += why is None
            if self._request.limit is not None and wanted > self._request.limit:
                return
            yield letter, why

    def _why_left(self, letter: Letter) -> Left | None:
        found = self._inputs.get(letter.origin.topic)
        if not self._request.again and self._redriven.when_ms(letter) is not None:
            return Left.ALREADY
        if letter.redrives >= self._request.attempts_max:
            return Left.TOO_OFTEN
        if found is None:
            return Left.NOT_OURS
        return Left.TOO_LARGE if self.output(letter).size_bytes > found.record_max_bytes else None

    def output(self, letter: Letter) -> Output:
        """The message as it goes into the input."""
        headers = [*letter.own_headers, *letter.history.headers]
        size = size_alone(letter.key, letter.value, headers)
        return Output(letter.origin.topic, letter.key, letter.value, headers, None, size)

    def place(self, letter: Letter) -> TopicPartition:
        """Where it first came in; the topic made again with fewer partitions: by its key."""
        topic, partition, _ = letter.origin
        partitions = range(self._inputs[topic].partitions)
        if partition not in partitions:
            partition = self._partitioner(letter.key, list(partitions), list(partitions))
        return TopicPartition(topic, partition)


async def plan_redrive(settings: Settings, request: RedriveRequest) -> RedrivePlan:
    """What a redrive would come to; disturbs none that is under way."""
    async with opened(settings) as reader:
        redriven = await reader.redriven()
        return await Redrive(request, reader, await _inputs(settings), redriven).plan()


async def redrive(
    settings: Settings,
    request: RedriveRequest,
    may_go: Callable[[RedrivePlan], bool],
    sent: Callable[[int], None],
) -> RedrivePlan:
    """Send what is wished, if `may_go` says so of the plan; `sent` hears of each transaction.

    Raises `CannotRun` with what stands in the way; what is sent by then is marked as sent.
    """
    async with _producer(settings) as producer, opened(settings) as reader:
        redriven = await reader.redriven()  # behind the fence, so that it is all there is
        work = Redrive(request, reader, await _inputs(settings), redriven)
        plan = await work.plan()
        plan.declined = plan.sent > 0 and not may_go(plan)
        if plan.sent == 0 or plan.declined:
            return plan
        async for batch in work.batches():
            with _ended_early(settings):
                await _send(settings, producer, work, batch)
            sent(len(batch))
    return plan


async def _send(
    settings: Settings,
    producer: TransactionalProducer,
    work: Redrive,
    batch: list[tuple[Letter, Output]],
) -> None:
    """One transaction: the messages, and the mark that they are sent."""
    batches: dict[TopicPartition, list[Output]] = {}
    for letter, output in batch:
        batches.setdefault(work.place(letter), []).append(output)
    first = batch[0][0].at
    headers: list[tuple[str, bytes | None]] = [mark([letter.at.offset for letter, _ in batch])]
    size = size_alone(None, None, headers)
    batches[TopicPartition(first.topic, first.partition)] = [
        Output(first.topic, None, None, headers, None, size)
    ]
    await within(_deadline_s(settings), producer.begin())
    refused = await within(_deadline_s(settings), producer.send(batches))
    for where, error in refused.items():
        raise stop_for(error, settings.kafka, where.topic) from error
    await within(_deadline_s(settings), producer.commit())


@asynccontextmanager
async def _producer(settings: Settings) -> AsyncIterator[TransactionalProducer]:
    """A producer behind the fence; what goes wrong with it becomes a sentence."""
    kafka = settings.kafka
    client = AIOKafkaProducer(
        **{**client_options(kafka), **transactional_options(_deadline_s(settings))},
        transactional_id=f"{PREFIX}-{kafka.group_id}:{settings.dead_letters.topic}:redrive",
        acks="all",
        compression_type=None,
        max_batch_size=2 * BATCH_MAX_BYTES,
        max_request_size=REQUEST_MAX_BYTES,
        linger_ms=0,
    )
    producer = TransactionalProducer(client, observe=lambda _: None)
    try:
        await within(kafka.request_timeout_s, producer.start())
        yield producer
    except Fenced as error:
        raise CannotRun(
            "Another redrive of these dead letters has begun and shut this one out; what this one "
            "had sent is marked. Run it again once the other has ended."
        ) from error
    except (KafkaError, OSError, TimeoutError) as error:
        raise stop_for(error, kafka) from error
    finally:
        await producer.end()


@contextmanager
def _ended_early(settings: Settings) -> Iterator[None]:
    """Whether the last transaction was committed may be open; the next fence finds out."""
    try:
        yield
    except (KafkaError, TimeoutError) as error:
        raise CannotRun(
            f"The redrive ended early ({type(error).__name__}) at "
            f"{settings.kafka.bootstrap_servers}. What was sent is marked as sent: run it again to "
            "go on."
        ) from error


REQUEST_MAX_BYTES = 104_857_600
"""The client refuses nothing that could have been an input message: the brokers' limit decides."""


def _deadline_s(settings: Settings) -> float:
    return 2 * settings.kafka.request_timeout_s


async def _inputs(settings: Settings) -> dict[str, Input]:
    kafka, names = settings.kafka, settings.input.topics
    found = await look_at_topics(kafka, names)
    sizes = {name: await record_max_bytes(kafka, name) for name in names}
    return {
        name: Input(topic.partitions, sizes[name] or UNKNOWN)
        for name, topic in found.items()
        if topic.partitions
    }
