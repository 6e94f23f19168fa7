"""Every use of aiokafka's private parts: what it knows or can do without a public call for it.

Each of these reads private state of aiokafka 0.14, which the requirement pins: positions that
are read without a chance that they move, messages of one partition without a look at all others,
one commit attempt that cannot outlive its generation, requests that the client does not have, and
an end for a client that doesn't stop. A test reads the other files of `kafka/` for such uses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.consumer.fetcher import FetchError, FetchResult
from aiokafka.errors import BrokerResponseError, KafkaError, UnknownMemberIdError
from aiokafka.producer.transaction_manager import TransactionState
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import SyncGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import size_of_varint
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from service.core.messages import Partition
from service.kafka.client.deadlines import STOP_S, briefly
from service.kafka.client.stored import Stored

log = logging.getLogger(__name__)

ABANDON_S = 1.0
"""Each step of an end by force has this long."""


class FencedInstanceIdError(BrokerResponseError):  # type: ignore[misc]
    """Another member has joined under our `group_instance_id` and taken our place."""

    errno = 82
    message = "FENCED_INSTANCE_ID"
    description = "another member has joined under this group_instance_id"


# The client does not know it, and would tell of an unknown error.
kafka_errors.kafka_errors[FencedInstanceIdError.errno] = FencedInstanceIdError


class Membership:
    """One consumer's place in its group."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer

    @property
    def generation(self) -> int:
        """Counts the group's assignments; -1 while there is none."""
        return int(self._consumer._coordinator.generation)

    @property
    def member_id(self) -> str:
        """Empty while the group does not know us."""
        return str(self._consumer._coordinator.member_id)

    async def is_put_out(self, member_id: str, generation: int) -> bool:
        """Whether another has taken the place that we had under our `group_instance_id`.

        The client asks under its member id alone, so that it hears the same when its session has
        ended, and joins again: by that it would put the other one out. Raises `KafkaError`.
        """
        coordinator = self._consumer._coordinator
        if coordinator._group_instance_id is None or not member_id:
            return False
        await coordinator.ensure_coordinator_known()
        # Whoever is no member of this generation any more learns why, and nothing happens.
        asked = SyncGroupRequest(
            coordinator.group_id, generation, member_id, coordinator._group_instance_id, []
        )
        answer = await coordinator._send_req(asked)
        return bool(answer.error_code == FencedInstanceIdError.errno)

    @property
    def reassigning(self) -> bool:
        """Between the revoke and the next assignment; `getmany` would wait until its end."""
        return bool(self._consumer._subscription.reassignment_in_progress)

    @property
    def fetching(self) -> bool:
        """False when the task that fetches has died: then `getmany` returns nothing for ever."""
        return not self._consumer._fetcher._fetch_task.done()

    def position(self, partition: Partition) -> int | None:
        """The next offset to be returned; None while it is unknown.

        The public `position` is a coroutine that waits where none is known.
        """
        state = self._state(partition)
        return state.position if state is not None and state.has_valid_position else None

    def end(self, partition: Partition) -> int | None:
        """The last stable offset, as of the last fetch."""
        state = self._state(partition)
        if state is None:
            return None
        end: int | None = state.lso
        return end if end is not None and end >= 0 else state.highwater

    def fetched_at_ms(self) -> int:
        """Wall clock of the latest answered fetch, 0 if there was none."""
        states = (self._state(Partition(*each)) for each in self._consumer.assignment())
        return max((state.timestamp or 0 for state in states if state is not None), default=0)

    @contextmanager
    def polling(self) -> Iterator[None]:
        """Time in here counts as polled, as it does within `getmany`; time after it does not.

        The client counts a poll that raised, or was cancelled, as one that goes on for ever: a
        member that polls no more would keep its partitions.
        """
        subscription = self._consumer._subscription
        try:
            with subscription.fetch_context():
                yield
        finally:
            subscription._fetch_count = 0  # polls do not overlap
            subscription._last_fetch_ended = time.monotonic()

    def fetched(self, partition: TopicPartition, limit: int) -> list[ConsumerRecord]:
        """At most `limit` messages of those that the client has fetched of a partition.

        As `getmany` hands them out, which looks through all partitions each time. Raises the
        `KafkaError` of its fetch.
        """
        fetcher = self._consumer._fetcher
        found = fetcher._records.get(partition)
        if found is None:
            return []
        records: list[ConsumerRecord] = []
        if type(found) is FetchResult:
            records = found.getall(limit)
            if found.has_more():
                return records
        del fetcher._records[partition]  # so that the client fetches more
        fetcher._notify(fetcher._wait_consume_future)
        if type(found) is FetchError:
            found.check_raise()
        return records

    def hear_fetches(self, hear: Callable[[Partition, int, bytes], None]) -> None:
        """Have each fetch told before its messages can be had: partition, offset, batches.

        The client parses batches without a word of the leader epoch in them.
        """
        client = self._consumer._client
        send = client.send

        async def telling(node: int, request: Any, **options: Any) -> Any:
            answer = await send(node, request, **options)
            if isinstance(request, FetchRequest):
                _tell_fetches(request, answer, hear)
            return answer

        client.send = telling

    def knows(self, topic: str) -> int:
        """How many partitions of a topic the client's own metadata has."""
        return len(self._consumer._client.cluster.partitions_for_topic(topic) or ())

    def raise_what_failed(self) -> None:
        """Raises the `KafkaError` for which the group's own task waits to be heard.

        It waits without end, and only `getmany` would ask. Raises `FencedInstanceIdError`, and
        leaves the task waiting, where it has learnt so while it joined: it would join again.
        """
        coordinator = self._consumer._coordinator
        pending = coordinator._pending_exception
        if pending is not None and FencedInstanceIdError.__name__ in str(pending):
            raise FencedInstanceIdError
        coordinator.check_errors()

    async def find_coordinator(self) -> None:
        """Returns once the group's coordinator is known and connected; may wait without end."""
        await self._consumer._coordinator.ensure_coordinator_known()

    async def commit_once(self, offsets: Mapping[Partition, Stored]) -> None:
        """One attempt, in the generation of this very moment; raises `KafkaError`.

        The public `commit` repeats an attempt without end, and each takes the generation of its
        own moment: one begun before a rebalance could store, in the next generation, offsets of
        partitions that have another owner by then. Here the request is built before the first
        wait.
        """
        if not self.member_id:
            # Without a member the request would pass for one from outside the group, which an
            # empty group takes.
            raise UnknownMemberIdError
        coordinator = self._consumer._coordinator
        assignment = self._consumer._subscription.subscription.assignment
        wanted = {
            TopicPartition(*partition): OffsetAndMetadata(stored.offset, stored.metadata)
            for partition, stored in offsets.items()
        }
        await coordinator._do_commit_offsets(assignment, wanted)

    async def leave(self, *, put_out: bool = False) -> bool:
        """Leaves the group and closes, within `STOP_S` in order, else by force; says if in order.

        Where another has taken our place (`put_out`), without joining once more: the client's
        task waits in the callback in which we heard of it. Raises nothing; cancelled, it is by
        force.
        """
        in_order = False
        try:
            if put_out:
                joining = self._consumer._coordinator._coordination_task
                joining.cancel()
                await asyncio.wait((joining,), timeout=ABANDON_S)
            in_order = await briefly(self._consumer.stop, STOP_S)
        finally:
            if not in_order:
                await self._abandon()
        return in_order

    async def _abandon(self) -> None:
        consumer, coordinator = self._consumer, self._consumer._coordinator
        if coordinator is not None:
            coordinator._coordination_task.cancel()
            await briefly(coordinator._maybe_leave_group, ABANDON_S)
            for task in (coordinator._heartbeat_task, coordinator._commit_refresh_task):
                if task is not None:
                    task.cancel()
        if consumer._fetcher is not None:
            await briefly(consumer._fetcher.close, ABANDON_S)
        await briefly(consumer._client.close, ABANDON_S)

    def _state(self, partition: Partition) -> Any:
        subscription = self._consumer._subscription.subscription
        if subscription is None or subscription.assignment is None:
            return None
        return subscription.assignment.state_value(TopicPartition(*partition))


def _tell_fetches(
    request: FetchRequest, answer: Any, hear: Callable[[Partition, int, bytes], None]
) -> None:
    asked = {
        Partition(topic, number): offset
        for topic, partitions in request.topics
        for number, offset, _ in partitions
    }
    for topic, partitions in answer.topics:
        for number, _, _, *_, batches in partitions:
            if batches and (offset := asked.get(Partition(topic, number))) is not None:
                hear(Partition(topic, number), offset, bytes(batches))


# --- the admin client ----------------------------------------------------------------------------


async def send(admin: AIOKafkaAdminClient, request: Any, node: int | None = None) -> Any:
    """The answer to a request, of the broker `node` or of any; raises `KafkaError`.

    For requests that the client does not have a call for. May wait as long as a request may.
    """
    return await admin._send_request(request, node)


async def has_controller(admin: AIOKafkaAdminClient) -> bool:
    """Whether the cluster has a broker that makes topics; others that look like Kafka have none."""
    await admin._client.force_metadata_update()
    return admin._client.cluster.controller is not None


# --- one connection ------------------------------------------------------------------------------

CONNECTION_OPTIONS = (
    "client_id",
    "request_timeout_ms",
    "ssl_context",
    "security_protocol",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "sasl_oauth_token_provider",
)
"""These of the client's options concern one connection."""


async def knock(host: str, port: int, options: dict[str, Any]) -> None:
    """Returns where a broker answers there and lets us in; raises `KafkaError` or `OSError`."""
    own = {name: options[name] for name in CONNECTION_OPTIONS}
    connection = await create_conn(host, port, **own)
    try:
        # A listener that wants credentials answers version requests without them, no others.
        await connection.send(MetadataRequest([]))
    finally:
        connection.close()


def hosts_of(bootstrap_servers: str) -> list[tuple[str, int]]:
    """Host and port of each address, in the order in which the client tries them."""
    return [(host, port) for host, port, _ in collect_hosts(bootstrap_servers)]


# --- producers -----------------------------------------------------------------------------------

record_size = DefaultRecordBatchBuilder.size_of
"""Returns the bytes of key, value and headers inside of a record, with the lengths before them."""

varint_size = size_of_varint
"""Returns the bytes of a number as a varint."""


def tasks_of(client: AIOKafkaProducer) -> list[asyncio.Task[Any]]:
    """The sender's own task and those of its requests.

    Cancelled alone, the first waits for the others one by one and forgets the rest when it is
    cancelled again; some of them try for ever to find a coordinator.
    """
    return [
        task
        for task in asyncio.all_tasks()
        if (frame := getattr(task.get_coro(), "cr_frame", None)) is not None
        and frame.f_locals.get("self") is client._sender
    ]


def drop_connections(client: AIOKafkaProducer) -> None:
    """A polite close waits until a hanging peer has read everything."""
    for connection in client.client._conns.values():
        if connection._writer is not None:
            connection._writer.transport.abort()


def fail_batches(client: AIOKafkaProducer) -> None:
    """Whoever waits for a batch hears of it; where nobody does any more, nobody complains."""
    accumulator = client._message_accumulator
    queued = list(chain(*accumulator._batches.values()))
    # A batch queued for another try stands in this set no more, but takes itself out of it.
    accumulator._pending_batches.update(batch for batch in queued if batch.retry_count)
    batches = [*accumulator._pending_batches, *queued]
    accumulator.fail_all(KafkaError("the producer was replaced"))
    for batch in batches:
        for future in (batch.future, batch._drain_waiter):
            if future.done() and not future.cancelled():
                future.exception()


def raise_what_ended(client: AIOKafkaProducer) -> None:
    """Raises what the client's own task has died of, as a `KafkaError`."""
    task = client._sender.sender_task
    if task is not None and task.done():
        error = None if task.cancelled() else task.exception()
        raise error if isinstance(error, KafkaError) else KafkaError("the client has ended")


async def end_transaction(client: AIOKafkaProducer) -> None:
    """Abort the transaction that is open; one that ends already is waited for.

    Raises what the client raises.
    """
    manager = client._txn_manager
    match manager.state:
        case TransactionState.IN_TRANSACTION:
            await client.abort_transaction()
        case TransactionState.COMMITTING_TRANSACTION | TransactionState.ABORTING_TRANSACTION:
            await asyncio.shield(manager.wait_for_transaction_end())
        case TransactionState.READY:
            return
        case _:
            raise KafkaError("the client has failed")


def forget_transaction(client: AIOKafkaProducer) -> None:
    """Whoever waited for the transaction's end is gone: its failure is no unheard exception."""
    waiter = client._txn_manager._transaction_waiter
    if waiter is not None:
        with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            waiter.exception()
