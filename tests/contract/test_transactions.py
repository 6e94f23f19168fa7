"""Exactly once, on a real Kafka: outputs and offset together, whoever dies, hangs or is fenced."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import InvalidTransactionTimeout, NodeNotReadyError
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
    TxnOffsetCommitRequest,
)

from service.core.errors import CannotRun, CommitFailed, OutputTooLarge, PublishFailed
from service.core.messages import Partition
from service.kafka.client.stable_offsets import UnstableOffset, stable_offsets
from service.kafka.client.stored import Stored
from service.kafka.sending.producers import Output
from service.kafka.transactions.transactions import PARTITIONS_MAX
from tests.conftest import hanging
from tests.support.kafka import Broker, KafkaUnavailable, RealKafka
from tests.support.started import for_tests
from tests.support.topics import (
    admin,
    committed,
    create_topic,
    end_offsets,
    read_topic,
    unique_name,
)
from tests.support.transactions import Answer, Worker, hangs_at, output, pauses_at, worker

BOOTSTRAP = "Unclosed AIOKafkaConnection"
"""What the client says when its start is cancelled in the moment of its very first request; the
connection is closed by the garbage collector, at once."""

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{BOOTSTRAP}:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
]


class Place:
    """Topics and a group for one test."""

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self.group = unique_name("group")
        self.topic = unique_name("records")
        self.input = unique_name("in")
        self.first = Partition(self.input, 0)
        self.second = Partition(self.input, 1)

    def outputs(self, offset: int, partition: Partition | None = None) -> list[tuple[int, Output]]:
        """One record; which names its origin."""
        origin = partition or self.first
        return [(0, output(self.topic, f"{origin.partition}:{offset}".encode()))]

    async def values(self, *, committed_only: bool = True) -> list[str]:
        """What stands in the output topic now."""
        reads = await read_topic(self.servers, self.topic, committed_only=committed_only)
        return [(each.value or b"").decode() for each in reads]

    async def settled(self) -> list[str]:
        """What a reader sees once no transaction is open: markers come behind the answer."""
        await eventually(True, self._has_nothing_open)
        return await self.values()

    async def kept(self) -> dict[int, tuple[int, str]]:
        """What the group has stored."""
        return await committed(self.servers, self.group, self.input, 2)

    async def _has_nothing_open(self) -> bool:
        stable = await end_offsets(self.servers, self.topic)
        return stable == await end_offsets(self.servers, self.topic, committed_only=False)


async def eventually(expected: object, ask: Callable[[], Awaitable[object]]) -> None:
    """Within 20 s the answer is what is expected."""
    found: object = None
    for _ in range(100):
        found = await ask()
        if found == expected:
            return
        await asyncio.sleep(0.2)
    assert expected == found


async def make(servers: str, **config: str) -> Place:
    place = Place(servers)
    limits = {name.replace("_", "."): value for name, value in config.items()}
    await create_topic(servers, place.topic, 2, config=limits)
    await create_topic(servers, place.input, 2)
    return place


@pytest.fixture
async def place(real_kafka: str) -> Place:
    return await make(real_kafka)


@pytest.fixture(autouse=True)
async def complaints() -> AsyncIterator[None]:
    """Nothing ends in the event loop's complaints, and no task is left behind."""
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    yield
    gc.collect()
    assert [each for each in heard if BOOTSTRAP not in str(each)] == []


async def test_outputs_offset_and_metadata_appear_together(place: Place) -> None:
    """Until the commit a reader sees neither; behind it both."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        one.interfere, reached, gate = pauses_at(EndTxnRequest)
        sent = [one.send(place.first, n, place.outputs(n)) for n in (0, 1, 3)]
        await reached.wait()
        assert await place.values() == []
        assert await place.kept() == {}
        assert not any(each.done() for each in sent)
        gate.set()
        await asyncio.gather(*sent)
    assert await place.settled() == ["0:0", "0:1", "0:3"]
    await eventually({0: (2, "[0, 1, 3]")}, place.kept)


# --- one transaction after the other -------------------------------------------------------------


async def test_a_transaction_gathers_for_the_interval(place: Place) -> None:
    """What is handed over within it shares a transaction; a wish or a hurry ends the wait."""
    async with worker(place.servers, place.group, interval_s=0.5) as one:
        await one.own(place.first)
        began_s = time.monotonic()
        sent = []
        for n in range(10):
            sent.append(one.send(place.first, n, place.outputs(n)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*sent)
        assert time.monotonic() - began_s >= 0.5
        assert len(one.ledger.attempts) == 1
    async with worker(place.servers, place.group, interval_s=60.0) as one:
        await one.own(place.first)
        wished = one.send(place.first, 10, place.outputs(10))
        await one.transactions.commit([place.first])
        assert wished.done()
        hurried = one.send(place.first, 11, place.outputs(11))
        one.transactions.hurry(on=True)
        await asyncio.wait_for(hurried, 20)
        await asyncio.wait_for(one.send(place.first, 12, place.outputs(12)), 20)
    assert [f"0:{n}" for n in range(13)] == await place.settled()


async def test_what_comes_while_a_transaction_ends_goes_into_the_next(place: Place) -> None:
    """In order, and the ledger is asked only when it knows of all that was committed before."""
    async with worker(place.servers, place.group, interval_s=0.0) as one:
        await one.own(place.first)
        sent = []
        for n in range(40):
            sent.append(one.send(place.first, n, place.outputs(n)))
            await asyncio.sleep(0.005)
        await asyncio.gather(*sent)
        assert 2 < len(one.ledger.attempts) < 40
    assert [f"0:{n}" for n in range(40)] == await place.settled()
    await eventually({0: (40, json.dumps(list(range(40))))}, place.kept)


async def test_input_partitions_do_not_wait_for_each_other(place: Place) -> None:
    """Each has its own producer, over several input topics, and one that is added later."""
    other = Partition(unique_name("other-in"), 0)
    await create_topic(place.servers, other.topic, 1)
    async with worker(place.servers, place.group) as one:
        await one.own(place.first, other)
        one.interfere, reached, gate = pauses_at(EndTxnRequest)
        stuck = one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        one.interfere = None
        await asyncio.wait_for(one.send(other, 0, [(0, output(place.topic, b"other"))]), 10)
        await one.own(place.second)
        await asyncio.wait_for(one.send(place.second, 0, place.outputs(0, place.second)), 10)
        assert not stuck.done()
        gate.set()
        await stuck
    assert sorted(await place.settled()) == ["0:0", "1:0", "other"]
    assert await committed(place.servers, place.group, other.topic, 1) == {0: (1, "[0]")}


async def test_connections_that_were_idle_are_opened_again(place: Place) -> None:
    """A partition where nothing happens needs none, and goes on under the same epoch."""
    async with worker(place.servers, place.group) as one:
        one.client_options["connections_max_idle_ms"] = 200
        await one.own(place.first)
        for n in range(3):
            await one.publish(place.first, [n], place.outputs)
            assert one.clients[0].client._conns
            while any(each.connected() for each in one.clients[0].client._conns.values()):
                await asyncio.sleep(0.05)
        assert len(one.clients) == 1
    assert await place.settled() == ["0:0", "0:1", "0:2"]


async def test_a_wish_stores_the_ledger_without_outputs(place: Place) -> None:
    """A position moved over markers, a mark at the restore: serialised with the others."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first, place.second)
        one.ledger.pages[place.first].finished = {0, 1}
        await one.transactions.commit([place.first, place.second])
        assert Stored(2, "[0, 1]") == one.ledger.known(place.first)
        one.ledger.pages.pop(place.second)
        with pytest.raises(CommitFailed):
            await one.transactions.commit([place.second])
        one.lose(place.second)
        with pytest.raises(CommitFailed, match="rebalance"):
            await one.transactions.commit([place.first, place.second])
    await eventually({0: (2, "[0, 1]"), 1: (0, "[]")}, place.kept)


async def test_a_commit_that_is_not_answered_is_bounded(place: Place) -> None:
    """It raises within twice the deadline; the wish is withdrawn."""
    async with worker(place.servers, place.group, deadline_s=0.5) as one:
        await one.own(place.first)
        one.interfere, _ = hangs_at(TxnOffsetCommitRequest, arrives=False, times=100)
        with pytest.raises(CommitFailed, match="timeout"):
            await asyncio.wait_for(one.transactions.commit([place.first]), 10)


# --- what is not committed is not there ----------------------------------------------------------


async def test_a_partition_that_is_not_ours_is_aborted(place: Place) -> None:
    """The ledger says so in the moment of sending: nothing is visible, everything fails."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        one.interfere, reached, gate = pauses_at(ProduceRequest)
        sent = [one.send(place.first, n, place.outputs(n)) for n in (0, 1)]
        await reached.wait()
        page = one.ledger.pages.pop(place.first)
        gate.set()
        ends = await asyncio.gather(*sent, return_exceptions=True)
        assert [PublishFailed] * 2 == [type(each) for each in ends]
        assert await place.settled() == []
        assert await place.values(committed_only=False) == ["0:0", "0:1"]
        # Between two assignments of a partition that is kept: it goes on under the same epoch.
        assert one.transactions.holds(place.first)
        one.ledger.pages[place.first] = page
        await one.publish(place.first, [0, 1], place.outputs)
        assert len(one.clients) == 1
    assert await place.settled() == ["0:0", "0:1"]


async def test_what_is_withdrawn_is_not_published(place: Place) -> None:
    """Before it has left and after; the others of its transaction go again without it."""
    async with worker(place.servers, place.group, interval_s=0.2) as one:
        await one.own(place.first)
        sent = [one.send(place.first, n, place.outputs(n)) for n in range(4)]
        sent[1].cancel()
        one.interfere, reached, gate = pauses_at(TxnOffsetCommitRequest)
        await reached.wait()
        sent[2].cancel()
        gate.set()
        await asyncio.gather(sent[0], sent[3])
        assert [Stored(1, "[0, 2, 3]"), Stored(1, "[0, 3]")] == one.ledger.attempts
    assert await place.settled() == ["0:0", "0:3"]


async def test_nothing_is_taken_before_the_restore_has_ended(place: Place) -> None:
    """A late outcome of an older assignment, which the ledger may know as finished by another."""
    async with worker(place.servers, place.group) as one:
        await one.transactions.fence(frozenset({place.first}))
        late = one.transactions.hand_over(place.first, 0, place.outputs(0), _quiet)
        assert isinstance(late.exception(), PublishFailed)


async def test_a_fence_withdraws_what_was_queued(place: Place) -> None:
    """Although no transaction had begun: what is queued is of an older assignment."""
    async with worker(place.servers, place.group, interval_s=60.0) as one:
        await one.own(place.first)
        queued = one.send(place.first, 0, place.outputs(0))
        await one.transactions.fence(frozenset({place.first}))
        assert queued.cancelled()
        assert len(one.clients) == 2


async def test_the_ledger_is_not_asked_for_what_was_withdrawn(place: Place) -> None:
    """It may know it as finished, by another's hand; what is left goes again without it."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        one.interfere, reached, gate = pauses_at(ProduceRequest)
        late = one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        page = one.ledger.pages[place.first]
        page.known, page.finished = Stored(1, "[0]"), {0}
        late.cancel()
        gate.set()
        await one.publish(place.first, [1], place.outputs)
        assert [Stored(2, "[0, 1]")] == one.ledger.attempts
    assert await place.settled() == ["0:1"]


async def test_dropped_partitions_withdraw_everything(place: Place) -> None:
    """At once; the open transaction is aborted in a moment, others are left alone."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first, place.second)
        one.interfere, reached, gate = pauses_at(TxnOffsetCommitRequest)
        open_ = one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        queued = one.send(place.first, 1, place.outputs(1))
        one.ledger.pages.pop(place.first)
        one.transactions.keep_only({place.second})
        assert open_.cancelled()
        assert queued.cancelled()
        gate.set()
        late = one.transactions.hand_over(place.first, 2, place.outputs(2), _quiet)
        assert isinstance(late.exception(), PublishFailed)
        began_s = time.monotonic()
        assert await place.settled() == []
        assert time.monotonic() - began_s < 10, "readers waited for the transaction's timeout"
        await one.publish(place.second, [0], lambda n: place.outputs(n, place.second))
    assert await place.settled() == ["1:0"]


async def test_a_producer_that_hangs_is_cut_off_whole(place: Place) -> None:
    """No task of the client outlives it, however many wait for an answer."""
    before = asyncio.all_tasks()
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        one.interfere, reached = hangs_at(ProduceRequest, arrives=False)
        one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        one.lose(place.first)
        assert await one.transactions.stop(5.0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


# --- owners that follow each other ---------------------------------------------------------------


async def test_a_killed_owner_leaves_nothing_behind(place: Place) -> None:
    """Between sending and committing: the next fence aborts it at once, a repetition is one."""
    async with worker(place.servers, place.group, stops=False) as dead:
        await dead.own(place.first)
        await dead.publish(place.first, [0], place.outputs)
        dead.interfere, reached = hangs_at(EndTxnRequest, arrives=False)
        dead.send(place.first, 1, place.outputs(1))
        await reached.wait()
    assert await place.values() == ["0:0"]
    assert await place.values(committed_only=False) == ["0:0", "0:1"]
    async with worker(place.servers, place.group) as heir:
        began_s = time.monotonic()
        await heir.own(place.first)
        assert time.monotonic() - began_s < 5, "the fence waited for the transaction's timeout"
        assert {0} == heir.ledger.pages[place.first].finished
        await heir.publish(place.first, [0, 1, 2], place.outputs)
    assert await place.settled() == ["0:0", "0:1", "0:2"]
    await eventually({0: (3, "[0, 1, 2]")}, place.kept)


@pytest.mark.parametrize("at", [ProduceRequest, TxnOffsetCommitRequest, EndTxnRequest])
async def test_a_fenced_owner_commits_nothing(place: Place, at: type[Any]) -> None:
    """Wherever it stands in its transaction; it is told, and takes nothing until it is restored."""
    async with (
        worker(place.servers, place.group) as old,
        worker(place.servers, place.group) as new,
    ):
        await old.own(place.first)
        await old.publish(place.first, [0], place.outputs)
        old.interfere, paused, gate = pauses_at(at)
        late = [old.send(place.first, n, place.outputs(n)) for n in (1, 2)]
        await paused.wait()
        await new.own(place.first)
        gate.set()
        ends = await asyncio.gather(*late, return_exceptions=True)
        assert [PublishFailed] * 2 == [type(each) for each in ends]
        assert [place.first] == old.fenced
        assert {1, 2} == old.failed[place.first]
        assert not old.transactions.holds(place.first)
        refused = old.transactions.hand_over(place.first, 1, place.outputs(1), _quiet)
        assert isinstance(refused.exception(), PublishFailed)
        await new.publish(place.first, [0, 1, 2, 3], place.outputs)
        # It was ours all the same: a restore begins with another fence, and fences back.
        old.interfere = None
        await old.own(place.first)
        assert {0, 1, 2, 3} == old.ledger.pages[place.first].finished
        await old.publish(place.first, range(5), place.outputs)
        assert len(old.clients) == 2
    assert [f"0:{n}" for n in range(5)] == await place.settled()


async def test_a_fence_without_a_use_is_not_repeated(place: Place) -> None:
    """A restore that is tried again goes on with the rest; a used epoch is replaced."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        await one.transactions.fence(frozenset({place.first, place.second}))
        assert len(one.clients) == 2
        await one.publish(place.first, [0], place.outputs)
        await one.own(place.first)
        assert len(one.clients) == 3
        await one.publish(place.first, [0, 1], place.outputs)
    assert await place.settled() == ["0:0", "0:1"]


async def test_a_cancelled_fence_goes_on(place: Place) -> None:
    """A restore has little time: what it has begun serves its next attempt; a drop ends it."""
    async with worker(place.servers, place.group) as one:
        one.interfere, _, gate = pauses_at(InitProducerIdRequest)
        both = frozenset({place.first, place.second})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.transactions.fence(both), 0.5)
        again = asyncio.ensure_future(one.transactions.fence(both))
        await asyncio.sleep(0)
        one.transactions.keep_only({place.first})
        gate.set()
        with pytest.raises(PublishFailed, match="taken away"):
            await again
        await one.own(place.first)
        assert len(one.clients) == 2
        assert not one.transactions.holds(place.second)


async def test_a_fence_that_cannot_be_had_says_why(place: Place) -> None:
    """Too slow, refused by the broker, too many: raised, with nothing left behind."""
    async with worker(place.servers, place.group, open_timeout_s=2.0) as one:
        one.interfere, _ = hangs_at(InitProducerIdRequest, arrives=False)
        with pytest.raises(PublishFailed, match=r"no producer within 2 s"):
            await one.transactions.fence(frozenset({place.first}))
        await one.own(place.first)
    async with worker(place.servers, place.group, deadline_s=1e6) as one:
        with pytest.raises(InvalidTransactionTimeout):
            await one.transactions.fence(frozenset({place.first}))
        many = frozenset(Partition("in", n) for n in range(PARTITIONS_MAX + 1))
        with pytest.raises(CannotRun, match="got 501 partitions"):
            await one.transactions.fence(many)
        assert len(one.clients) == 1


# --- what the client does wrong ------------------------------------------------------------------


NETWORK_EXCEPTION, NOTHING = 13, 0


@pytest.mark.parametrize("codes", [[NETWORK_EXCEPTION], [NOTHING, NOTHING]], ids=["1004", "1098"])
async def test_a_client_that_dies_of_an_answer_is_replaced(place: Place, codes: list[int]) -> None:
    """Its task that sends ends at an answer that it does not expect (aiokafka's issues 1004 and
    1098): another takes its place, and what was in the transaction is published once."""
    async with worker(place.servers, place.group, deadline_s=3.0) as one:
        await one.own(place.first)
        left = 1

        async def unexpected(request: Any, go_on: Answer) -> Any:
            nonlocal left
            if isinstance(request, TxnOffsetCommitRequest) and left:
                left -= 1
                return SimpleNamespace(errors=[(place.input, [(0, code) for code in codes])])
            return await go_on()

        one.interfere = unexpected
        await asyncio.gather(*(one.send(place.first, n, place.outputs(n)) for n in (0, 1)))
        assert left == 0
        assert len(one.clients) == 2
        assert one.fenced == []
    assert await place.settled() == ["0:0", "0:1"]
    await eventually({0: (2, "[0, 1]")}, place.kept)


# --- what nobody knows ---------------------------------------------------------------------------


async def test_a_stable_read_is_not_older_than_a_commit_that_was_answered(place: Place) -> None:
    """Right behind the answer the offset of before can still be read; a stable read waits."""
    async with worker(place.servers, place.group) as one, admin(place.servers) as client:
        await one.own(place.first)
        refused = 0
        for n in range(40):
            await one.publish(place.first, [n], place.outputs)
            found = None
            while found is None:
                try:
                    found = await stable_offsets(client, place.group, {place.first})
                except UnstableOffset:
                    refused += 1
            assert found == {place.first: one.ledger.known(place.first)}
        assert refused < 4_000, "it waits in vain"


async def test_an_offset_in_an_open_transaction_is_not_stable(place: Place) -> None:
    """It is told of no other partition, and what the transaction held is read behind its end."""
    async with worker(place.servers, place.group) as one, admin(place.servers) as client:
        await one.own(place.first)
        one.interfere, reached, gate = pauses_at(EndTxnRequest)
        sent = one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        with pytest.raises(UnstableOffset):
            await stable_offsets(client, place.group, {place.first})
        assert await stable_offsets(client, place.group, {place.second}) == {place.second: None}
        gate.set()
        await sent


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_commit_without_an_answer_is_settled(place: Place, arrives: bool) -> None:
    """Landed or not: a new epoch and what Kafka holds tell, and it is published once."""
    async with worker(place.servers, place.group, deadline_s=2.0) as one:
        await one.own(place.first)
        await one.publish(place.first, [0], place.outputs)
        one.interfere, reached = hangs_at(EndTxnRequest, arrives=arrives)
        doubtful = [one.send(place.first, n, place.outputs(n)) for n in (1, 2)]
        await reached.wait()
        behind = one.send(place.first, 3, place.outputs(3))
        await asyncio.gather(*doubtful, behind)
        assert one.fenced == []
        assert len(one.clients) == 2
        attempts = [each.metadata for each in one.ledger.attempts]
        again = [] if arrives else ["[0, 1, 2, 3]"]
        assert ["[0]", "[0, 1, 2]", *(again or ["[0, 1, 2, 3]"])] == attempts
    assert await place.settled() == ["0:0", "0:1", "0:2", "0:3"]
    await eventually({0: (4, "[0, 1, 2, 3]")}, place.kept)


@pytest.mark.parametrize("arrives", [True, False])
async def test_what_is_read_before_the_new_epoch_does_not_count(
    place: Place, arrives: bool
) -> None:
    """A commit may be under way for as long as the old epoch lasts: so it is read behind it."""
    async with worker(place.servers, place.group, deadline_s=2.0) as one:
        await one.own(place.first)
        steps: list[str] = []
        read = one.read

        async def noted(partition: Partition) -> Stored | None:
            steps.append("read")
            return await read(partition)

        one.ledger.read = noted
        one.interfere, _ = hangs_at(EndTxnRequest, arrives=arrives)
        hang = one.interfere

        async def note(request: Any, go_on: Answer) -> Any:
            found = await hang(request, go_on)
            if isinstance(request, InitProducerIdRequest):
                steps.append("epoch")
            return found

        one.interfere = note
        one.lose(place.first)
        await one.own(place.first)
        steps.clear()
        await one.send(place.first, 0, place.outputs(0))
        assert steps[-2:] == ["epoch", "read"]
        assert steps.count("read") == 1
    assert await place.settled() == ["0:0"]


@pytest.mark.parametrize("arrives", [True, False])
async def test_another_owner_in_between_ends_the_doubt(place: Place, arrives: bool) -> None:
    """What Kafka holds is neither of the two: nothing is sent again, a restore is asked for."""
    async with (
        worker(place.servers, place.group, deadline_s=3.0) as old,
        worker(place.servers, place.group) as new,
    ):
        await old.own(place.first)
        old.interfere, reached = hangs_at(EndTxnRequest, arrives=arrives)
        doubtful = old.send(place.first, 0, place.outputs(0))
        await reached.wait()
        await new.own(place.first)
        await new.publish(place.first, [0, 1], place.outputs)
        with pytest.raises(PublishFailed):
            await doubtful
        assert [place.first] == old.fenced
        # Its new epoch has fenced the true owner, who is told and restores.
        await new.publish(place.first, [2], place.outputs)
        assert [place.first] == new.fenced
        await new.own(place.first)
        await new.publish(place.first, [0, 1, 2], place.outputs)
    assert await place.settled() == ["0:0", "0:1", "0:2"]


async def test_a_commit_that_kafka_forgot_is_published_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It was acknowledged, and then Kafka holds what was before: rather again than lost."""
    async with worker(place.servers, place.group, deadline_s=2.0) as one:
        await one.own(place.first)

        async def lie(request: Any, go_on: Answer) -> Any:
            if isinstance(request, EndTxnRequest):
                return SimpleNamespace(error_code=0)
            return await go_on()

        one.interfere = lie
        await one.publish(place.first, [0], place.outputs)
        one.interfere, _ = hangs_at(ProduceRequest, arrives=False)
        assert await one.publish(place.first, [1], place.outputs) == 1
        assert one.fenced == [place.first]
        assert "Kafka holds None, we knew Stored(offset=1" in caplog.text
        await one.own(place.first)
        await one.publish(place.first, [0, 1], place.outputs)
    assert await place.settled() == ["0:0", "0:1"]


async def test_without_the_partition_no_epoch_is_taken(place: Place) -> None:
    """A failure of one that has lost it disturbs nobody: the ledger is asked before."""
    async with (
        worker(place.servers, place.group, deadline_s=2.0) as old,
        worker(place.servers, place.group) as new,
    ):
        await old.own(place.first)
        old.interfere, reached = hangs_at(EndTxnRequest, arrives=False)
        doubtful = old.send(place.first, 0, place.outputs(0))
        await reached.wait()
        await new.own(place.first)
        old.ledger.pages.pop(place.first)
        with pytest.raises(PublishFailed):
            await doubtful
        assert len(old.clients) == 1
        assert old.fenced == []
        await new.publish(place.first, [0], place.outputs)
        assert new.fenced == []
    assert await place.settled() == ["0:0"]


async def test_a_doubt_is_kept_until_kafka_tells(place: Place) -> None:
    """Reading fails for a while: nothing is settled, nothing sent, then all is right."""
    async with worker(place.servers, place.group, deadline_s=2.0) as one:
        await one.own(place.first)
        failures = iter(range(2))
        read = one.read

        async def fails_first(partition: Partition) -> Stored | None:
            if next(failures, None) is not None:
                raise NodeNotReadyError
            return await read(partition)

        one.ledger.read = fails_first
        await one.own(place.first)
        one.lose(place.first)
        await one.own(place.first)
        one.interfere, reached = hangs_at(EndTxnRequest, arrives=True)
        doubtful = one.send(place.first, 0, place.outputs(0))
        await reached.wait()
        while one.transactions.holds(place.first):
            await asyncio.sleep(0.01)
        assert not doubtful.done()
        await doubtful
        assert next(failures, None) is None
        assert len(one.ledger.attempts) == 1
    assert await place.settled() == ["0:0"]


def _quiet() -> None:
    """Nobody keeps failures here."""


# --- what the broker refuses ---------------------------------------------------------------------


async def test_a_record_too_large_is_rejected_alone(real_kafka: str) -> None:
    """Only its own message ends; all others land, in order, and a dead letter is never given up."""
    place = await make(real_kafka, max_message_bytes="3000")
    large = output(place.topic, b"x" * 5000)
    letter = output(place.topic, b"y" * 5000, must_fit=True)
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        sent = [one.send(place.first, n, place.outputs(n)) for n in range(3)]
        sent.append(one.send(place.first, 3, [*place.outputs(3), (0, large), (1, large)]))
        sent += [one.send(place.first, n, place.outputs(n)) for n in range(4, 6)]
        sent.append(one.send(place.first, 6, [(0, letter)]))
        sent.append(one.send(place.first, 7, place.outputs(7)))
        ends = await asyncio.gather(*sent, return_exceptions=True)
        # Behind the letter, which is to be sent again, nothing may land before it.
        kinds = [type(each) for each in ends]
        none = type(None)
        assert kinds == [none, none, none, OutputTooLarge, none, none, PublishFailed, PublishFailed]
        assert one.failed[place.first] == {6, 7}
        assert all(topic == place.topic and size > 3000 for topic, size in one.refused)
        assert not one.fenced
        await one.publish(place.first, [7], place.outputs)
    assert await place.settled() == [f"0:{n}" for n in (0, 1, 2, 4, 5, 7)]
    await eventually({0: (3, "[0, 1, 2, 4, 5, 7]")}, place.kept)


async def test_many_outputs_go_in_batches_that_fit(real_kafka: str) -> None:
    """Of one message as well: cut for each output partition, side by side, in order."""
    place = await make(real_kafka, max_message_bytes="3000")
    async with worker(place.servers, place.group, batch_max_bytes=lambda topic: 3000) as one:
        await one.own(place.first)
        many = [(n % 2, output(place.topic, b"%03d" % n + b"x" * 400)) for n in range(60)]
        await one.send(place.first, 0, many)
        assert len(one.clients) == 1
        assert not one.refused
    found = [int(each[:3]) for each in await place.settled()]
    assert found == [*range(0, 60, 2), *range(1, 60, 2)]


async def test_a_timestamp_that_the_topic_refuses_becomes_now(real_kafka: str) -> None:
    """A message from the future ends nobody's transaction for ever."""
    place = await make(real_kafka, message_timestamp_after_max_ms="1000")
    ahead_ms = int(time.time() * 1000) + 600_000
    future = output(place.topic, b"later")._replace(timestamp_ms=ahead_ms)
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        sent = [one.send(place.first, 0, place.outputs(0)), one.send(place.first, 1, [(0, future)])]
        await asyncio.gather(*sent)
    assert await place.settled() == ["0:0", "later"]


async def test_a_topic_that_is_not_there_fails_what_is_behind_it(place: Place) -> None:
    """What was handed over before goes again at once; the rest is the lane's to try again."""
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        missing = [(9, output(place.topic, b"no such partition"))]
        one.interfere, reached, gate = pauses_at(ProduceRequest)
        sent = [one.send(place.first, 0, place.outputs(0)), one.send(place.first, 1, missing)]
        await reached.wait()
        gate.set()
        sent.append(one.send(place.first, 2, place.outputs(2)))
        ends = await asyncio.gather(*sent, return_exceptions=True)
        assert [type(each) for each in ends] == [type(None), PublishFailed, PublishFailed]
        assert one.failed[place.first] == {1, 2}
    assert await place.settled() == ["0:0"]


# --- faults of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3), ids=lambda seed: f"seed-{seed}")
async def test_no_order_changes_and_nothing_comes_twice(place: Place, seed: int) -> None:
    """Requests or answers of every kind lost at random, owners that take turns: each once."""
    draw = random.Random(seed)
    kinds = (ProduceRequest, AddOffsetsToTxnRequest, TxnOffsetCommitRequest, EndTxnRequest)

    async def interfere(request: Any, go_on: Answer) -> Any:
        chance = draw.random()
        if not isinstance(request, kinds) or chance > 0.08:
            return await go_on()
        if chance < 0.03:
            return await asyncio.Event().wait()  # lost
        if chance < 0.06:
            await go_on()  # its answer is lost
            return await asyncio.Event().wait()
        await asyncio.sleep(draw.random() * 0.3)
        return await go_on()

    def outputs(partition: Partition) -> Callable[[int], list[tuple[int, Output]]]:
        return lambda n: [
            (k, output(place.topic, b"%d:%d" % (partition.partition, n), b"%d" % (n % 5)))
            for k in (0, 1)
        ]

    both = (place.first, place.second)
    count = 120
    for turn in range(4):
        async with worker(place.servers, place.group, deadline_s=1.0, stops=turn % 2 == 1) as one:
            await one.own(*both)
            one.interfere = interfere
            upto = 30 * (turn + 1)
            work = asyncio.gather(
                *(
                    one.publish(each, range(k, upto, 5), outputs(each), 0.02)
                    for each in both
                    for k in range(5)
                )
            )
            if turn == 3:
                await work
            else:
                await asyncio.sleep(1 + draw.random())
                one.lose(*both) if turn == 1 else None
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
            one.interfere = None
    await place.settled()
    by_key = defaultdict(list)
    for read in await read_topic(place.servers, place.topic):
        origin, n = (read.value or b"").decode().split(":")
        by_key[origin, read.partition, read.key].append(int(n))
    lanes = {
        (str(each.partition), k, b"%d" % key): list(range(key, count, 5))
        for each in both
        for k in (0, 1)
        for key in range(5)
    }
    assert by_key == lanes
    everything = json.dumps(list(range(count)))
    await eventually({0: (count, everything), 1: (count, everything)}, place.kept)


@pytest.mark.parametrize("seed", range(2), ids=lambda seed: f"seed-{seed}")
async def test_two_that_think_it_theirs_publish_once(place: Place, seed: int) -> None:
    """They fence each other again and again, commits hang in between: no message comes twice."""
    draw = random.Random(seed)
    count = 60

    async def interfere(request: Any, go_on: Answer) -> Any:
        chance = draw.random()
        if isinstance(request, EndTxnRequest) and chance < 0.3:
            if chance < 0.15:
                await go_on()
            return await asyncio.Event().wait()
        return await go_on()

    async def insist(one: Worker) -> None:
        one.interfere = interfere
        while True:
            try:
                await one.own(place.first)
            except PublishFailed:
                continue
            finished = one.ledger.pages[place.first].finished
            if len(finished) == count:
                return
            upto = min(count, len(finished) + 12)
            await one.publish(place.first, range(upto), place.outputs, draw.random() * 0.02)
            await asyncio.sleep(draw.random())

    async with (
        worker(place.servers, place.group, deadline_s=0.5) as one,
        worker(place.servers, place.group, deadline_s=0.5) as other,
    ):
        async with asyncio.TaskGroup() as both:
            both.create_task(insist(one))
            both.create_task(insist(other))
        assert one.fenced or other.fenced
        one.interfere = other.interfere = None
    assert await place.settled() == [f"0:{n}" for n in range(count)]


@pytest.mark.parametrize("how", ["hangs", "is killed"])
@pytest.mark.timeout(240)
async def test_a_broker_that_goes_away_is_waited_for(own_broker: Broker, how: str) -> None:
    """Coordinators and leaders gone in the middle: all is published once, in order.

    Not stopped in order: while a broker that is alone shuts down, Kafka 4.3 forgets commits that
    it acknowledges (KAFKA-20734), and nobody can promise anything.
    """
    place = await make(own_broker.bootstrap_servers)
    both = (place.first, place.second)
    async with worker(place.servers, place.group, deadline_s=2.0, open_timeout_s=3.0) as one:
        await one.own(*both)
        work = [
            asyncio.ensure_future(
                one.publish(each, range(60), lambda n, each=each: place.outputs(n, each), 0.03)
            )
            for each in both
        ]
        await asyncio.sleep(0.6)
        if how == "hangs":
            with hanging(own_broker):
                await asyncio.sleep(4)
        else:
            await asyncio.to_thread(own_broker.kill)
            await asyncio.sleep(2)
            await asyncio.to_thread(own_broker.start)
        await asyncio.gather(*work)
    found = await place.settled()
    for each in both:
        own = [value for value in found if value.startswith(f"{each.partition}:")]
        assert own == [f"{each.partition}:{n}" for n in range(60)]


async def test_stopping_is_bounded_while_the_broker_hangs(own_broker: Broker) -> None:
    """What is not committed by then has failed, and nothing is left behind."""
    place = await make(own_broker.bootstrap_servers)
    before = asyncio.all_tasks()
    async with worker(place.servers, place.group, deadline_s=30.0) as one:
        await one.own(place.first, place.second)
        await one.publish(place.first, [0], place.outputs)
        with hanging(own_broker):
            sent = one.send(place.first, 1, place.outputs(1))
            fencing = asyncio.ensure_future(
                one.transactions.fence(frozenset({Partition(place.input, 7)}))
            )
            await asyncio.sleep(0.3)
            began_s = time.monotonic()
            assert not await one.transactions.stop(1.0)
            assert time.monotonic() - began_s < 20
            assert isinstance(sent.exception(), PublishFailed)
            with pytest.raises(PublishFailed):
                await fencing
            with pytest.raises(PublishFailed):
                await one.transactions.fence(frozenset({place.first}))
    assert asyncio.all_tasks() == before
    assert await place.settled() in (["0:0"], ["0:0", "0:1"])


async def test_an_unforeseen_exception_ends_the_owner(place: Place) -> None:
    """Whoever holds the group hears of it; what was handed over fails, nothing is left behind."""
    before = asyncio.all_tasks()
    sent: asyncio.Future[None] = asyncio.Future()
    third = Partition(place.input, 2)

    async def owner() -> None:
        nonlocal sent
        async with worker(place.servers, place.group) as one:
            await one.own(place.first, place.second)

            def broken(*_: object) -> Stored | None:
                raise ZeroDivisionError

            # Neither its own producers nor one that is only starting are left open.
            one.interfere, starting = hangs_at(InitProducerIdRequest, arrives=False)
            fencing = asyncio.ensure_future(one.transactions.fence(frozenset({third})))
            fencing.add_done_callback(lambda done: done.cancelled() or done.exception())
            await starting.wait()
            one.ledger.to_store = broken  # type: ignore[method-assign]
            sent = one.send(place.first, 0, place.outputs(0))
            await asyncio.sleep(20)

    with pytest.raises(BaseExceptionGroup) as raised:
        await owner()
    assert raised.group_contains(ZeroDivisionError)
    assert isinstance(sent.exception(), PublishFailed)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert await place.settled() == []


@pytest.fixture
def forgetful_broker() -> Iterator[RealKafka]:
    """Its coordinator forgets a transactional id that was not used for a second."""
    settings = {
        "transactional.id.expiration.ms": "1000",
        "transaction.remove.expired.transaction.cleanup.interval.ms": "500",
    }
    yield from for_tests(lambda: RealKafka(settings), KafkaUnavailable, "TEST_KAFKA")


@pytest.mark.real_kafka
async def test_an_id_that_the_coordinator_forgot_is_fenced_anew(
    forgetful_broker: RealKafka,
) -> None:
    """After days without a use (here a second): told as fenced; another fence heals it."""
    place = await make(forgetful_broker.bootstrap_servers)
    async with worker(place.servers, place.group) as one:
        await one.own(place.first)
        await one.publish(place.first, [0], place.outputs)
        await asyncio.sleep(5)
        with pytest.raises(PublishFailed):
            await one.send(place.first, 1, place.outputs(1))
        assert one.fenced == [place.first]
        await one.own(place.first)
        await one.publish(place.first, [0, 1], place.outputs)
    assert await place.settled() == ["0:0", "0:1"]
