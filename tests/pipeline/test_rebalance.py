"""Rebalances under virtual time: who may publish and commit what, and when."""

import asyncio
from collections.abc import Set as AbstractSet
from dataclasses import replace

import pytest

from service.core.errors import CommitFailed, PublishFailed, TransientFailure
from service.core.events import Admitted, Dropped, Event
from service.core.messages import Batch, Partition
from service.core.status import State
from service.core.tracker import UNCLEAN_ENDS_MAX, Progress
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import partition


def test_calls_in_flight_are_waited_for_and_committed() -> None:
    """A revoke waits for short calls, publishes them and commits before it returns."""
    stage = Stage()
    for n in range(8):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda _: 2.0

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.revoke()
        assert stage.broker.committed == {partition(): 4}
        assert len(stage.extractor.calls) == 4, "a call was admitted during the revoke"
        stage.source.hold()
        await asyncio.sleep(10)

    stage.show(lose)
    assert len(stage.extractor.calls) == 4
    assert stage.broker.committed == {partition(): 4}


def test_the_wait_is_bounded() -> None:
    """A call that is too slow does not hold the whole group longer than the rebalance drain."""
    stage = Stage()
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 100.0

    async def lose() -> None:
        await asyncio.sleep(1)
        before_s = asyncio.get_running_loop().time()
        await stage.source.rebalance()
        assert asyncio.get_running_loop().time() - before_s < 6

    stage.show(lose)
    assert stage.extractor.cancelled == ["slow"]


def test_waiting_retries_are_not_waited_for() -> None:
    """A message that waits for another attempt does not hold a revoke up."""
    stage = Stage()
    stage.broker.append("fails")
    stage.extractor.latency_s = lambda _: 0.01
    stage.extractor.scripts["fails"] = [TransientFailure("timeout", retry_after_s=60)]

    async def lose() -> None:
        await asyncio.sleep(1)
        before_s = asyncio.get_running_loop().time()
        await stage.source.rebalance()
        assert asyncio.get_running_loop().time() - before_s < 0.1

    stage.show(lose)


def test_a_kept_partition_keeps_its_running_call() -> None:
    """A partition that comes back with its epoch keeps the call: it is not made twice."""
    stage = Stage(partitions=2)
    stage.broker.append("slow", number=0)
    stage.extractor.latency_s = lambda _: 20.0

    async def keep() -> None:
        await asyncio.sleep(1)
        await stage.source.rebalance(keep={partition(0)})
        stage.source.fetch_again()
        await asyncio.sleep(30)

    stage.show(keep)
    assert stage.extractor.calls == ["slow"]
    assert stage.broker.texts() == ["slow"]
    assert stage.broker.committed[partition(0)] == 1
    assert [e.messages for e in stage.events if isinstance(e, Dropped)] == [1], "fetched again"


def test_a_late_outcome_of_a_lost_partition_goes_nowhere() -> None:
    """After the partition came back with a new epoch, the old call is neither kept nor used."""
    stage = Stage()
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 20.0

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.rebalance(fresh={partition()})
        await asyncio.sleep(40)

    stage.show(lose)
    assert stage.extractor.cancelled == ["slow"]
    assert stage.extractor.calls == ["slow", "slow"]
    assert stage.broker.texts() == ["slow"]


def test_nothing_is_published_between_revoke_and_assignment() -> None:
    """An answer that comes while nobody knows whose the partition is waits for the assignment."""
    stage = Stage()
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 7.0

    async def between() -> None:
        await asyncio.sleep(1)
        await stage.source.revoke()
        await asyncio.sleep(5)
        assert stage.extractor.in_flight == []
        assert stage.sink.handed == []
        assert stage.pipeline.status(SETTLED).state is State.REBALANCING
        stage.source.hold(keep={partition()})
        await asyncio.sleep(1)

    stage.show(between)
    assert stage.broker.texts() == ["slow"]
    assert stage.broker.committed == {partition(): 1}


def test_an_acknowledgement_after_the_loss_marks_nothing() -> None:
    """A send that is acknowledged after its partition was lost does not move the new epoch."""
    stage = Stage()
    stage.broker.append("one")
    stage.broker.append("two")
    stage.sink.ack_s = 8.0
    stage.extractor.latency_s = lambda _: 0.1

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.rebalance(fresh={partition()})
        stage.sink.ack_s = 0.01
        await asyncio.sleep(20)

    stage.show(lose)
    assert stage.broker.committed == {partition(): 2}
    assert sorted(set(stage.broker.texts())) == ["one", "two"]


def test_an_open_circuit_does_not_outlast_its_messages() -> None:
    """Partitions are lost during an outage, and all failing messages with them: intake resumes."""
    stage = Stage()
    for n in range(20):
        stage.broker.append(f"text {n}")
    stage.extractor.always = TransientFailure("connection")

    async def lose() -> None:
        await asyncio.sleep(120)
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_PROVIDER
        await stage.source.rebalance(fresh={partition()})
        stage.extractor.always = None
        await asyncio.sleep(120)

    stage.show(lose)
    assert stage.broker.committed == {partition(): 20}


def test_a_probe_outlives_the_partition_that_failed() -> None:
    """It is nobody's call: it goes on through a rebalance, and then the next one does."""
    stage = Stage()
    for n in range(20):
        stage.broker.append(f"text {n}")
    stage.extractor.always = TransientFailure("connection")

    async def lose() -> None:
        await asyncio.sleep(120)
        stage.extractor.latency_s = lambda _: 1000.0
        await asyncio.sleep(60)
        probes = stage.extractor.probes
        await stage.source.rebalance(fresh={partition()})
        stage.extractor.latency_s = lambda _: 0.1
        await asyncio.sleep(500)
        assert stage.extractor.probes == probes, "two at once"
        await asyncio.sleep(500)
        stage.extractor.always = None
        await asyncio.sleep(120)

    stage.show(lose)
    assert stage.extractor.cancelled == []
    assert stage.broker.committed == {partition(): 20}


def test_attempts_count_for_one_holder() -> None:
    """A message that failed twice before its partition was lost may fail twice more after it."""
    stage = Stage()
    stage.broker.append("unlucky")
    for n in range(400):
        stage.broker.append(f"text {n}")
    stage.extractor.scripts["unlucky"] = [TransientFailure("server_error") for _ in range(4)]

    async def lose() -> None:
        while stage.extractor.calls.count("unlucky") < 2:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        await stage.source.rebalance(fresh={partition()})
        await asyncio.sleep(60)

    stage.show(lose)
    assert stage.extractor.calls.count("unlucky") == 5
    assert not stage.rejected()
    assert stage.broker.committed == {partition(): 401}


def test_attempts_go_on_where_the_partition_is_kept() -> None:
    """A rebalance gives a message no further attempts as long as it stays with its holder."""
    stage = Stage()
    stage.broker.append("poison")
    for n in range(400):
        stage.broker.append(f"text {n}")
    stage.extractor.scripts["poison"] = [TransientFailure("server_error") for _ in range(9)]

    async def keep() -> None:
        while stage.extractor.calls.count("poison") < 2:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        await stage.source.rebalance(keep={partition()})
        await asyncio.sleep(60)

    stage.show(keep)
    assert [rejected.attempts for rejected in stage.rejected()] == [3]


def test_a_batch_from_before_a_rebalance_is_not_taken_after_it() -> None:
    """Fetched under the old epoch, returned under the new one: what stands before it comes too."""
    stage = Stage(bounds=replace(BOUNDS, rebalance_drain_s=0.1))
    stage.broker.append("text 0")
    stage.extractor.latency_s = lambda _: 10.0
    poll = stage.source.poll

    async def late(limit: int, closed: AbstractSet[Partition]) -> Batch:
        batch = await poll(limit, closed)
        if [message.offset for message in batch.messages] == [1] and not stage.extractor.cancelled:
            await stage.source.rebalance(fresh={partition()})
            return Batch(batch.messages)
        return batch

    stage.source.poll = late  # type: ignore[method-assign]

    async def lose() -> None:
        await asyncio.sleep(1)
        stage.broker.append("text 1")
        await asyncio.sleep(30)

    stage.show(lose)
    assert stage.extractor.calls == ["text 0", "text 0", "text 1"]
    assert stage.broker.committed == {partition(): 2}
    assert [e.messages for e in stage.events if isinstance(e, Dropped)] == [1]


def test_a_revoke_does_not_wait_for_ever_for_a_commit_under_way() -> None:
    """One that waits for the group, which waits for the revoke, ends in time; then it goes on."""
    stage = Stage()
    stage.broker.append("text")
    answered = asyncio.Event()

    async def wait_for_the_group() -> None:
        try:
            await asyncio.wait_for(answered.wait(), 5)
        except TimeoutError:
            raise CommitFailed("timeout") from None

    stage.source.before_storing = wait_for_the_group

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.revoke()
        assert asyncio.get_running_loop().time() < 12
        answered.set()
        stage.source.hold(fresh={partition()})
        await asyncio.sleep(5)

    stage.show(lose)
    assert stage.broker.committed == {partition(): 1}


def test_an_acknowledgement_in_the_moment_of_the_loss_marks_nothing() -> None:
    """Acknowledged, but not heard of yet when the partition is taken away: nothing happens."""
    stage = Stage()
    stage.broker.append("one")

    def lose_in_a_moment() -> bool:
        asyncio.get_running_loop().call_soon(stage.source.hold)
        return False

    stage.sink.loses_acknowledgement = lose_in_a_moment

    async def wait() -> None:
        await asyncio.sleep(5)

    stage.show(wait)
    assert stage.broker.texts() == ["one"]
    assert stage.finished() == []


def test_nothing_is_published_while_the_revoke_commits() -> None:
    """What comes after the drain of a revoke waits, also while its commit is under way."""
    stage = Stage(bounds=replace(BOUNDS, commit_interval_s=100))
    stage.broker.append("quick")
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda text: 6.5 if text == "slow" else 0.1
    stage.source.commit_s = 1.0

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.revoke()
        assert asyncio.get_running_loop().time() == 7.0
        assert stage.extractor.in_flight == []
        assert stage.sink.handed == [0]
        stage.source.hold()

    stage.show(lose)
    assert stage.broker.texts() == ["quick"]
    assert stage.broker.committed == {partition(): 1}


def test_commits_do_not_overtake_each_other() -> None:
    """The commit of a revoke waits for a slow one under way: no offset moves back."""
    stage = Stage()
    stage.broker.append("quick")
    stage.broker.append("later")
    stage.extractor.latency_s = lambda text: 1.2 if text == "later" else 0.1
    stage.source.commit_s = 3.0

    async def lose() -> None:
        await asyncio.sleep(0.6)
        stage.source.commit_s = 0.001
        await stage.source.rebalance(keep={partition()})
        assert stage.broker.committed == {partition(): 2}
        await asyncio.sleep(5)

    stage.show(lose)
    assert stage.broker.committed == {partition(): 2}


def test_what_was_handed_over_is_withdrawn_with_its_partition() -> None:
    """An outcome that waits for a broker is not published once its partition is another's."""
    stage = Stage()
    stage.broker.append("one")
    stage.sink.ack_s = 30.0

    async def lose() -> None:
        await asyncio.sleep(1)
        await stage.source.rebalance()
        await asyncio.sleep(60)

    stage.show(lose)
    assert stage.sink.handed == [0]
    assert stage.broker.published == []


def test_a_resting_lane_is_lost_with_its_partition() -> None:
    """After a failed send it would have gone on in a moment; by then the outcome is another's."""
    stage = Stage(bounds=replace(BOUNDS, rebalance_drain_s=0.1))
    stage.broker.append("one")
    stage.sink.failures[0] = [PublishFailed()]

    async def lose() -> None:
        await asyncio.sleep(0.3)
        await stage.source.rebalance()
        await asyncio.sleep(5)

    stage.show(lose)
    assert stage.sink.handed == [0]
    assert stage.broker.published == []


def test_slots_are_whole_after_many_rebalances() -> None:
    """However often calls are cut off, no slot is lost and none is given back twice."""
    stage = Stage(partitions=3, bounds=replace(BOUNDS, rebalance_drain_s=0.05))
    for n in range(300):
        stage.broker.append(f"text {n}", number=n % 3)
    stage.extractor.latency_s = lambda text: 0.05 + (hash(text) % 7) / 10

    async def shake() -> None:
        for turn in range(40):
            await asyncio.sleep(0.3)
            everything = {partition(n) for n in range(3)}
            kept = {partition(turn % 3)} & stage.source.epochs.keys()
            await stage.source.rebalance(keep=kept, fresh=everything - kept)
        await asyncio.sleep(100)
        assert stage.pipeline.status(SETTLED).slots_busy == 0
        assert stage.pipeline.status(SETTLED).state is State.IDLE

    stage.show(shake)
    assert stage.extractor.in_flight_max == 4
    assert stage.broker.committed == {partition(n): 100 for n in range(3)}
    assert len(set(stage.broker.texts())) == 300


def test_a_rebalance_during_a_drain_loses_nothing() -> None:
    """Stopping while the group rebalances still finishes and commits what is kept."""
    stage = Stage()
    for n in range(4):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda _: 8.0

    async def stop() -> None:
        await asyncio.sleep(1)
        stage.pipeline.stop()
        await stage.source.rebalance(keep={partition()})

    stage.show(stop)
    assert stage.broker.committed == {partition(): 4}
    assert len(stage.extractor.calls) == 4


class GivenAnew(Stage):
    """Its partition is given anew between the start of one call and the first step of its task."""

    def __init__(self, call: int, **bounds: int) -> None:
        super().__init__(bounds=replace(BOUNDS, **bounds))  # type: ignore[arg-type]
        self.call = call  # the number of the call, from 1
        self.never_began = 0

    def observe(self, event: Event) -> None:
        super().observe(event)
        if isinstance(event, Admitted):
            self.call -= 1
            if self.call == 0:  # the task is created behind this line, and steps behind this call
                asyncio.get_running_loop().call_soon(self._give_anew, len(self.extractor.calls))

    def _give_anew(self, begun: int) -> None:
        self.never_began = len(self.pipeline._window.calling) - len(self.extractor.in_flight)
        assert begun == len(self.extractor.calls)
        self.source.give_anew(partition())


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("slots", [1, 4])
def test_a_call_that_is_called_off_before_it_begins_gives_its_slot_back(
    slots: int, call: int
) -> None:
    """A task that is cancelled before its first step runs none of its code: the slot is given
    back where the task ends, and everything goes on."""
    stage = GivenAnew(call, concurrency=slots, window=4 * slots)
    for n in range(8):
        stage.broker.append(f"text {n}", key=str(n))

    async def wait() -> None:
        await asyncio.sleep(60)
        assert stage.never_began
        assert stage.pipeline.status(SETTLED).slots_busy == 0

    stage.show(wait)
    assert set(stage.broker.texts()) == {f"text {n}" for n in range(8)}
    assert stage.broker.committed == {partition(): 8}
    assert stage.extractor.in_flight_max == slots


@pytest.mark.parametrize("call", range(1, 4))
def test_a_suspect_that_is_called_off_before_it_begins_lets_others_run(call: int) -> None:
    """Nothing runs beside a suspect; one that never runs keeps nobody out."""
    stage = GivenAnew(call)
    stage.broker.stored[partition()] = Progress(0, unclean_ends=UNCLEAN_ENDS_MAX)
    for n in range(8):
        stage.broker.append(f"text {n}", key=str(n))

    async def wait() -> None:
        await asyncio.sleep(60)
        assert stage.never_began == 1

    stage.show(wait)
    assert set(stage.broker.texts()) == {f"text {n}" for n in range(8)}
    assert stage.broker.committed == {partition(): 8}
