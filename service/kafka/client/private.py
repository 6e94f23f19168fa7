"""What aiokafka knows of a group member and does not say in public, all in one place.

Each of these reads private state of aiokafka 0.14, which the requirement pins: positions that
are read without a chance that they move, messages of one partition without a look at all others,
one commit attempt that cannot outlive its generation, and an end for a consumer that doesn't stop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.consumer.fetcher import FetchError, FetchResult
from aiokafka.errors import BrokerResponseError, KafkaError, UnknownMemberIdError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import SyncGroupRequest
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from service.core.messages import Partition
from service.kafka.group.starts import Stored

log = logging.getLogger(__name__)

STOP_S = 8.0
"""Leaving the group and closing connections, in order."""

ABANDON_S = 1.0
"""Each step of an end by force."""


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
        del fetcher._records[partition]  # so that it fetches on
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

        async def heard(node: int, request: Any, **options: Any) -> Any:
            answer = await send(node, request, **options)
            if isinstance(request, FetchRequest):
                _tell_fetches(request, answer, hear)
            return answer

        client.send = heard

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


async def briefly(step: Callable[[], Awaitable[None]], limit_s: float) -> bool:
    """Whether a step of an end came to its own end in time; raises nothing of the client's.

    While no broker answers, the client's own `stop` raises the cancellation of a task of its own.
    """
    try:
        async with asyncio.timeout(limit_s):
            await step()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # it is we who are cancelled
        return False
    except (KafkaError, OSError, TimeoutError) as error:
        log.warning("the Kafka client does not end in order: %s", type(error).__name__)
        return False
    return True
