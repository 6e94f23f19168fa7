"""One transactional producer: a started client with the newest epoch of its transactional id.

Its start is the fence. When the broker has given the epoch, no older producer of the same id can
end a transaction any more; the one that it had open is ended: committed where the request to
commit it had arrived before, else aborted.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    IllegalOperation,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaError,
    ProducerFenced,
)
from aiokafka.structs import OffsetAndMetadata

from service.core.events import Observe
from service.core.messages import Partition
from service.kafka.client.private import end_transaction, forget_transaction, raise_what_ended
from service.kafka.client.stored import Stored
from service.kafka.sending.producers import Output, Producer

END_S = 2.0
"""The transaction that is open at the end has this long to end; the next owner's fence would abort
it as well."""

FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidProducerIdMapping)
"""With these the coordinator says that a newer epoch is there, or that it has taken ours back: a
transaction was open too long, or an id was not used for days."""

log = logging.getLogger(__name__)


class Fenced(Exception):
    """The epoch is over: nothing can be done with this producer any more."""


def transactional_id(prefix: str, group_id: str, partition: Partition) -> str:
    """The same for whoever reads this partition for this group, and for nobody else.

    A topic's name has no colon, so that no other group and topic make the same id.
    """
    return f"{prefix}-{group_id}:{partition.topic}:{partition.partition}"


class TransactionalProducer:
    """One transaction at a time. All calls may wait without end; the caller has the deadline.

    Every call raises `Fenced`, or `KafkaError`, after which only `end` may follow: the client
    never takes back the sequence numbers of a batch that failed.
    """

    def __init__(self, client: AIOKafkaProducer, observe: Observe) -> None:
        self._client = client
        self._producer = Producer(client, observe)
        self.used = False
        """Whether a transaction has begun under this epoch."""

    async def start(self) -> None:
        """Returns with the epoch; a transaction that was open under an older one has ended."""
        await self._client.start()

    async def begin(self) -> None:
        self.used = True
        with self._errors():
            await self._client.begin_transaction()

    async def send(
        self, batches: Mapping[TopicPartition, Sequence[Output]]
    ) -> dict[TopicPartition, KafkaError]:
        """Write one batch to each of these output partitions; what was refused, and why."""
        refused: dict[TopicPartition, KafkaError] = {}
        sent: dict[TopicPartition, asyncio.Future[object]] = {}
        with self._errors():
            for where, outputs in batches.items():
                try:
                    sent[where] = await self._producer.enqueue(where, outputs)
                except KafkaError as error:
                    refused[where] = error
                else:
                    sent[where].add_done_callback(_hear)
            if sent:
                await asyncio.wait(sent.values())
            for where, future in sent.items():
                if isinstance(failure := future.exception(), KafkaError):
                    refused[where] = failure
            for failure in refused.values():
                if isinstance(failure, FENCED):
                    raise failure
            raise_what_ended(self._client)
        return refused

    async def store(self, group_id: str, partition: Partition, stored: Stored) -> None:
        """Make a next offset part of the transaction."""
        offsets = {TopicPartition(*partition): OffsetAndMetadata(stored.offset, stored.metadata)}
        with self._errors():
            await self._client.send_offsets_to_transaction(offsets, group_id)

    async def commit(self) -> None:
        """Anything but a return leaves open whether it is committed; even `Fenced` does."""
        with self._errors():
            await self._client.commit_transaction()

    async def abort(self) -> None:
        with self._errors():
            await self._client.abort_transaction()

    async def end(self) -> None:
        """End the transaction that is open, briefly, and close; what hangs is cut off.

        A commit that is under way is waited for: nobody can call it back.
        """
        try:
            async with asyncio.timeout(END_S):
                await self._end_transaction()
        except (Fenced, KafkaError, TimeoutError):
            await self.cut_off()
        else:
            await self._producer.close()

    async def cut_off(self) -> None:
        """Close at once; what already left this process may still arrive, under this epoch."""
        await self._producer.cut_off()
        forget_transaction(self._client)

    async def _end_transaction(self) -> None:
        with self._errors():
            await end_transaction(self._client)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors, by what is to be done about them."""
        try:
            raise_what_ended(self._client)
            yield
        except FENCED as error:
            raise Fenced from error
        except KafkaError as error:
            if isinstance(error.__cause__, FENCED):
                raise Fenced from error
            raise
        except IllegalOperation as error:  # an error meanwhile has ended the transaction
            raise KafkaError("no transaction is open") from error


def _hear(future: asyncio.Future[object]) -> None:
    """Read its failure once, so that asyncio logs nothing where nobody waits for it any more."""
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
        future.exception()
