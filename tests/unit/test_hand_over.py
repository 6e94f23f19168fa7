"""Exactly once, from the fence to the first outcome: what holdings and writers do between them.

In virtual time, with the real holdings, transactions and writers of one worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiokafka.errors import KafkaError

from service.kafka.client.stored import Stored
from service.kafka.group.reading import STALE_S
from service.kafka.transactions.producer import Fenced
from service.kafka.transactions.transactions import STUCK_S
from tests.support import virtual_time
from tests.support.hand_over import TOPIC, OneWorker, P, Q
from tests.support.sources import HeldUp


def play(scene: Callable[[OneWorker], Awaitable[None]]) -> None:
    """One worker to which nothing is given yet."""

    async def whole() -> None:
        async with asyncio.TaskGroup() as tasks:
            await scene(OneWorker(tasks))

    virtual_time.run(whole())


# --- a topic in doubt ----------------------------------------------------------------------------


def test_a_topic_in_doubt_does_not_lose_a_writer() -> None:
    """A producer is to be renewed while brokers don't know the topic: that waits, then goes on."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P)
        assert await worker.publish(P, 3) == "ok"
        worker.doubtful.add(TOPIC)
        worker.fails[P] = KafkaError("the broker starts again")
        waiting = asyncio.create_task(worker.publish(P, 4))
        await worker.poll_for(STUCK_S + 1.0)
        assert not waiting.done()
        assert len(worker.opened) == 1, "an epoch was taken for a topic that may be another"
        assert "no new producer while its topic is in doubt" in (worker.member.problem or "")
        worker.doubtful.clear()
        assert await waiting == "ok"
        assert await worker.publish(P, 5) == "ok"
        assert worker.member.problem is None

    play(scene)


def test_in_doubt_nothing_is_stored_and_the_writer_stays() -> None:
    """With a producer that works the outcomes fail, to be handed over again, and nothing else."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P)
        before = dict(worker.group.stored)
        worker.doubtful.add(TOPIC)
        assert await worker.publish(P, 3) != "ok"
        assert worker.group.stored == before
        worker.doubtful.clear()
        assert await worker.publish(P, 3) == "ok"

    play(scene)


# --- each partition is held, to be restored, or held out -----------------------------------------


def test_a_partition_fenced_during_the_restore_of_another_is_restored() -> None:
    """It is neither held nor among those of the running restore: it has its turn after it."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        worker.fails[P] = Fenced()
        assert await worker.publish(P, 4) != "ok"
        held_up = worker.slow_commits[P] = HeldUp()
        restoring = asyncio.create_task(worker.poll_for(4.0))
        await held_up.asked.wait()  # the mark of P
        worker.fails[Q] = Fenced()
        assert await worker.publish(Q, 4) != "ok"
        held_up.gate.set()
        await restoring
        assert "in[1]" in (worker.member.problem or "")
        await worker.poll_for(4.0)
        assert worker.holdings.held.keys() == {P, Q}
        assert worker.member.problem is None
        assert [await worker.publish(each, 5) for each in (P, Q)] == ["ok", "ok"]

    play(scene)


def test_a_partition_fenced_behind_the_read_is_not_taken_for_read() -> None:
    """What was read before its fence may be old: it waits for a restore that begins with one."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        worker.fails[P] = Fenced()
        assert await worker.publish(P, 4) != "ok"
        held_up = worker.offsets.before_bounds = HeldUp()
        restoring = asyncio.create_task(worker.poll_for(4.0))
        await held_up.asked.wait()
        worker.fails[Q] = Fenced()
        assert await worker.publish(Q, 4) != "ok"
        epoch = worker.pipeline.epochs[Q]
        worker.offsets.before_bounds = None
        held_up.gate.set()
        await restoring
        assert worker.opened.count(Q) == 1
        assert worker.holdings.held.keys() == {P}
        await worker.poll_for(4.0)
        assert worker.opened.count(Q) == 2
        assert worker.pipeline.epochs[Q] > epoch

    play(scene)


def test_a_fenced_partition_that_is_then_held_out_leaves_the_pipeline() -> None:
    """Its log was cut: nothing of it can be published, and its messages must not fill the window
    in which those of others wait for room."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        assert await worker.publish(P, 4) == "ok"
        assert worker.pipeline.assignments[-1].keys() == {P, Q}
        worker.offsets.ends[P] = 0
        worker.fails[P] = Fenced()
        assert await worker.publish(P, 5) != "ok"
        await worker.poll_for(4.0)
        assert worker.holdings.held.keys() == {Q}
        assert "log ends at 0" in (worker.member.problem or "")
        assert worker.pipeline.assignments[-1].keys() == {Q}
        told = len(worker.pipeline.assignments)
        await worker.poll_for(60.0)
        assert len(worker.pipeline.assignments) == told, "calls are called off by each look"

    play(scene)


def test_a_partition_that_is_held_nowhere_is_told_of() -> None:
    """From the fence to the restore there is a sentence, and no partition is forgotten."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        worker.fails[P] = Fenced()
        await worker.publish(P, 4)
        assert worker.member.problem is not None
        assert "Another producer has taken the place" in worker.member.problem
        assert not worker.holdings.takes(P)
        await worker.poll_for(4.0)
        assert worker.member.problem is None

    play(scene)


# --- what is read right behind a commit ----------------------------------------------------------


async def rebalance(worker: OneWorker) -> None:
    await worker.member.on_revoked()
    worker.group.generation += 1
    await worker.given(P, Q)


def test_a_commit_in_doubt_is_not_forgotten_by_its_fence() -> None:
    """A rebalance comes before its writer has learned what became of it. Behind the fence there
    is a new writer that is in no doubt: kept all the same, the outcome would go out again."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        assert await worker.publish(P, 3) == "ok"
        epochs = dict(worker.pipeline.epochs)
        worker.loses_answers.add(P)
        in_doubt = asyncio.create_task(worker.publish(P, 4))
        while worker.group.stored[P].offset < 5:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # its writer pauses before it looks
        worker.loses_answers.clear()
        await rebalance(worker)
        await asyncio.wait([in_doubt])
        assert in_doubt.cancelled()
        assert worker.opened.count(P) == 2
        assert worker.pipeline.epochs[P] > epochs[P]
        assert worker.pipeline.epochs[Q] == epochs[Q]
        assert worker.pipeline.given[P].progress.next_offset == 5

    play(scene)


@pytest.mark.parametrize("reads", [1, 5])
def test_an_earlier_offset_of_our_own_is_read_again(reads: int) -> None:
    """A commit is answered before its offset can be read: the running calls go on."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        assert await worker.publish(P, 3) == "ok"
        before, epochs = worker.group.stored[P], dict(worker.pipeline.epochs)
        assert await worker.publish(P, 4) == "ok"
        worker.offsets.stale[P] = [before] * reads
        await rebalance(worker)
        assert worker.pipeline.epochs == epochs
        assert worker.offsets.stale[P] == []

    play(scene)


def test_none_is_earlier_than_the_first_mark() -> None:
    """Right behind the first restore Kafka may still tell that it has nothing."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        epochs = dict(worker.pipeline.epochs)
        worker.offsets.stale[P] = worker.offsets.stale[Q] = [None] * 6
        await rebalance(worker)
        assert worker.pipeline.epochs == epochs
        assert worker.member.problem is None

    play(scene)


def test_an_offset_that_stays_earlier_is_the_truth() -> None:
    """Kafka has forgotten a commit: after a bounded time it is a new epoch, from what it holds."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        assert await worker.publish(P, 3) == "ok"
        before, epoch = worker.group.stored[P], worker.pipeline.epochs[P]
        assert await worker.publish(P, 4) == "ok"
        worker.group.stored[P] = before
        began_s = asyncio.get_running_loop().time()
        await rebalance(worker)
        assert STALE_S <= asyncio.get_running_loop().time() - began_s < 2 * STALE_S
        assert worker.pipeline.epochs[P] > epoch
        assert worker.pipeline.given[P].progress.next_offset == before.offset

    play(scene)


def test_what_another_has_stored_is_not_waited_for() -> None:
    """It is no earlier offset of ours: the partition starts anew at once."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        epoch = worker.pipeline.epochs[P]
        worker.group.stored[P] = Stored(7, "sluice1:fedcba9876543210")
        began_s = asyncio.get_running_loop().time()
        await rebalance(worker)
        assert asyncio.get_running_loop().time() == began_s
        assert worker.pipeline.epochs[P] > epoch

    play(scene)


def test_a_commit_that_cannot_be_read_yet_is_waited_for_behind_the_fence() -> None:
    """The owner before us has committed, and Kafka still shows what was before: going on from
    there would publish it again."""

    async def scene(worker: OneWorker) -> None:
        before = worker.group.stored[P] = Stored(3, "sluice1:fedcba9876543210")
        worker.group.stored[P] = Stored(4, "sluice1:fedcba9876543210")
        worker.offsets.stale[P] = [before] * 2
        worker.offsets.unstable[P] = 3
        await worker.given(P)
        assert worker.pipeline.given[P].progress.next_offset == 4
        assert worker.offsets.unstable[P] == 0

    play(scene)


def test_a_writer_waits_until_its_last_commit_can_be_read() -> None:
    """What it reads back before would pass for "not committed", and go out a second time."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P)
        assert await worker.publish(P, 3) == "ok"
        worker.fails[P] = KafkaError("no answer")
        worker.offsets.unstable[P] = 3
        assert await worker.publish(P, 4) == "ok"
        assert worker.offsets.unstable[P] == 0
        assert worker.opened == [P, P], "an epoch is taken once"

    play(scene)


# --- a restore that is overtaken -----------------------------------------------------------------


def test_a_restore_that_is_overtaken_while_it_reads_fences_nobody() -> None:
    """The partition may be another's when the answer comes, and he must not lose his calls."""

    async def scene(worker: OneWorker) -> None:
        held_up = worker.offsets.before_reading = HeldUp()
        first = asyncio.create_task(worker.given(P, Q))
        await held_up.asked.wait()
        await worker.member.on_revoked()
        worker.offsets.before_reading = None
        worker.group.generation += 1
        await worker.given(Q)
        held_up.gate.set()
        await first
        assert P not in worker.opened
        assert worker.holdings.held.keys() == {Q}

    play(scene)


def test_a_restore_that_is_overtaken_behind_its_read_holds_nothing() -> None:
    """Neither is a mark stored: what was read may be another's by now."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P)
        await worker.member.on_revoked()
        stored, held_up = dict(worker.group.stored), HeldUp()
        worker.offsets.before_bounds = held_up
        worker.group.generation += 2  # it starts anew
        restoring = asyncio.create_task(worker.given(P))
        await held_up.asked.wait()
        await worker.member.on_revoked()
        held_up.gate.set()
        await restoring
        assert worker.holdings.held == {}
        assert not worker.holdings.restored.is_set()
        assert worker.group.stored == stored

    play(scene)


def test_a_revoke_ends_the_fences_that_wait() -> None:
    """Many partitions are fenced a few at a time: those whose turn has not come are left."""

    async def scene(worker: OneWorker) -> None:
        held_up = worker.slow_opens = HeldUp()
        first = asyncio.create_task(worker.given(P, Q))
        await held_up.asked.wait()
        await worker.member.on_revoked()
        worker.slow_opens = None
        held_up.gate.set()
        await first
        assert worker.opened == []

    play(scene)


def test_a_mark_that_failed_opens_no_producer_after_a_revoke() -> None:
    """Its writer would take a new epoch, by which it would fence the new owner."""

    async def scene(worker: OneWorker) -> None:
        held_up = worker.slow_commits[P] = HeldUp()
        restoring = asyncio.create_task(worker.given(P))
        await held_up.asked.wait()
        await worker.member.on_revoked()
        worker.fails[P] = KafkaError("no answer")
        held_up.gate.set()
        await restoring
        assert worker.opened == [P]

    play(scene)


# --- another client in the place of one ----------------------------------------------------------


def test_an_epoch_without_use_is_not_taken_over_from_another_client() -> None:
    """Its writer asks the ledger of a client that is gone, which knows no partition any more."""

    async def scene(worker: OneWorker) -> None:
        held_up = worker.offsets.before_bounds = HeldUp()
        first = asyncio.create_task(worker.given(P))
        await held_up.asked.wait()  # fenced, and nothing has begun under the epoch
        await worker.member.hand_back()
        worker.offsets.before_bounds = None
        held_up.gate.set()
        await first
        worker.join()
        reads = worker.offsets.reads
        await worker.given(P)
        assert worker.holdings.held.keys() == {P}, "the first restore of the new client failed"
        assert worker.offsets.reads <= reads + 2
        assert await worker.publish(P, 3) == "ok"

    play(scene)


def test_a_replacement_waits_for_a_revoke() -> None:
    """The client that ends would cancel it in its drain: what is finished would not be stored."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        drained: list[str] = []
        draining = HeldUp()

        async def drain() -> None:
            await draining.wait()
            drained.append(await worker.publish(P, 3))

        worker.pipeline.when_revoked = drain
        revoke = asyncio.create_task(worker.member.on_revoked())
        await draining.asked.wait()
        handing_back = asyncio.create_task(worker.member.hand_back())
        await asyncio.sleep(1.0)
        assert not handing_back.done()
        draining.gate.set()
        await handing_back
        await revoke
        assert drained == ["ok"]
        assert worker.pipeline.revokes == 1
        assert worker.holdings.held == {}

    play(scene)


def test_a_replacement_gathers_no_longer() -> None:
    """A rebalance may wait for it: what is handed over leaves at once."""

    async def scene(worker: OneWorker) -> None:
        worker.transactions._interval_s = 30.0
        await worker.given(P)
        drained: list[str] = []

        async def drain() -> None:
            drained.append(await worker.publish(P, 3))

        worker.pipeline.when_revoked = drain
        began_s = asyncio.get_running_loop().time()
        await worker.member.hand_back()
        assert drained == ["ok"]
        assert asyncio.get_running_loop().time() - began_s < 1.0

    play(scene)


def test_a_revoke_waits_for_a_replacement() -> None:
    """The group may not go on before what is finished is stored."""

    async def scene(worker: OneWorker) -> None:
        await worker.given(P, Q)
        drained: list[str] = []
        draining = HeldUp()

        async def drain() -> None:
            await draining.wait()
            drained.append(await worker.publish(P, 3))

        worker.pipeline.when_revoked = drain
        handing_back = asyncio.create_task(worker.member.hand_back())
        await draining.asked.wait()
        revoke = asyncio.create_task(worker.member.on_revoked())
        await asyncio.sleep(1.0)
        assert not revoke.done()
        draining.gate.set()
        await revoke
        await handing_back
        assert drained == ["ok"]
        assert worker.pipeline.revokes == 1

    play(scene)
