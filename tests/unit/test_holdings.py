"""Which partitions are kept through a rebalance, and what is stored for those that are not."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, NodeNotReadyError
from aiokafka.protocol.group import SyncGroupRequest, SyncGroupRequest_v3

from service.core.messages import Partition
from service.core.tracker import Progress
from service.kafka.client.instances import began, this_process
from service.kafka.client.stored import Mark, Stored, read, to_store
from service.kafka.group import name as name_module
from service.kafka.group.group_offsets import GroupOffsets
from service.kafka.group.holdings import Remembered
from service.kafka.group.member import Member as GroupMember
from service.kafka.group.name import NameTaken
from service.kafka.group.starts import LogRange
from service.settings import Start
from tests.support.sources import Kafka, Member, settings

P = Partition("in", 0)
ANOTHER = Mark("fedcba9876543210")  # another process
BEGAN = 3
"""Where the settings let a new group begin."""


def batch(base: int, epoch: int) -> bytes:
    """The start of a batch of messages; the rest does not matter here."""
    return struct.pack(">qiib", base, 5, epoch, 2)


class Group:
    """Stands in for Kafka's client: a place in a group, and what Kafka holds for the group."""

    def __init__(self) -> None:
        self.member_id, self.generation = "member", 1
        self.stored: dict[Partition, Stored] = {}
        self.topic_ids = {P.topic: "A"}
        self.position: int | None = None  # None: paused
        self.reassignment_in_progress = False
        self.assignment = None
        self._coordinator = self._subscription = self.subscription = self

    async def _do_commit_offsets(self, _: object, offsets: Mapping[TopicPartition, Any]) -> None:
        for where, at in offsets.items():
            self.stored[Partition(*where)] = Stored(at.offset, at.metadata)

    def pause(self, _: TopicPartition) -> None:
        self._sought, self.position = None, None

    def seek(self, _: TopicPartition, offset: int) -> None:
        self._sought = offset

    def resume(self, _: TopicPartition) -> None:
        self.position = self._sought


class Offsets(GroupOffsets):
    """What Kafka answers about them."""

    def __init__(self, group: Group) -> None:
        self._group, self.end = group, 100
        self.epoch_end: dict[int, int] = {}  # of the leader's log as it is now
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0

    async def stored(self) -> dict[Partition, Stored | None]:
        self.asked += 1
        await self.gate.wait()
        return {P: self._group.stored.get(P)}

    async def topic_ids(self) -> dict[str, str]:
        return dict(self._group.topic_ids)

    async def bounds(self, partitions: AbstractSet[Partition]) -> dict[Partition, LogRange]:
        return {each: LogRange(0, self.end) for each in partitions}

    async def epoch_ends(self, epochs: Mapping[Partition, int]) -> dict[Partition, int]:
        return {
            each: self.epoch_end[epoch] for each, epoch in epochs.items() if epoch in self.epoch_end
        }

    async def chosen(
        self, start: Start, bounds: Mapping[Partition, LogRange]
    ) -> dict[Partition, int]:
        return dict.fromkeys(bounds, BEGAN)


class Worker:
    """One process that is given the partition again and again; `before` has left its offsets."""

    def __init__(
        self,
        before: Worker | None = None,
        *,
        start_over: bool = False,
        group: Group | None = None,
        **sections: dict[str, object],
    ) -> None:
        self.group = group or (Group() if before is None else before.group)
        self.offsets = Offsets(self.group)
        self.pipeline: Member[Any] = Member(None)
        given = settings(Kafka("127.0.0.1:1"), P.topic, "g", **sections)
        self.remembered = Remembered(given.kafka.group_instance_id, start_over=start_over)
        self.member = GroupMember(
            given,
            self.group,
            self.offsets,
            self.pipeline,
            self.pipeline.told.append,
            SimpleNamespace(on_generation_assignment=lambda _: None),
            remembered=self.remembered,
        )
        self.holdings, self.positions = self.member.holdings, self.member.positions

    async def given(self) -> None:
        await self.member.on_assigned({TopicPartition(*P)})

    async def rebalance(self) -> None:
        await self.member.on_revoked()
        self.group.generation += 1
        await self.given()

    def commit(self, progress: Progress, *, answered: bool = True) -> Stored:
        self.pipeline.wanted = {P: progress}
        stored = self.holdings.to_store(P)
        assert stored is not None
        self.group.stored[P] = stored
        if answered:
            self.holdings.stored(P, stored)
        return stored

    async def look(self) -> None:
        """As the next poll does when it is time."""
        self.positions.mend_at_s = self.holdings.restore_at_s = 0.0
        await self.member.see_to_the_rest()

    async def follower(self, *, start_over: bool = False) -> Worker:
        """The next process, which is given the partition."""
        follower = Worker(self, start_over=start_over)
        follower.offsets.end = self.offsets.end
        follower.offsets.epoch_end = self.offsets.epoch_end
        self.group.member_id += "x"
        self.group.generation += 1
        await follower.given()
        return follower

    @property
    def epoch(self) -> int | None:
        return self.pipeline.epochs.get(P)


@pytest.fixture
async def worker() -> Worker:
    """It has stored 5 and returned what stands before 7."""
    worker = Worker()
    await worker.given()
    worker.commit(Progress(5))
    worker.holdings.held[P].next = 7
    return worker


async def test_the_same_member_in_the_next_generation_keeps_its_partition(worker: Worker) -> None:
    """It goes on behind what was returned, under its epoch, and nothing is stored for it."""
    before, stored = worker.epoch, dict(worker.group.stored)
    await worker.rebalance()
    assert (worker.epoch, worker.group.position) == (before, 7)
    assert worker.group.stored == stored


def _another_member(group: Group) -> None:
    group.member_id = "another"


def _a_generation_missed(group: Group) -> None:
    group.generation += 1


def _another_offset(group: Group) -> None:
    group.stored[P] = to_store(Progress(6), ANOTHER)


def _another_process(group: Group) -> None:
    group.stored[P] = to_store(Progress(5), ANOTHER)


def _metadata_of_nobody(group: Group) -> None:
    group.stored[P] = Stored(5, "")


@pytest.mark.parametrize(
    "happens",
    [
        _another_member,
        _a_generation_missed,
        _another_offset,
        _another_process,
        _metadata_of_nobody,
    ],
)
async def test_a_partition_that_another_may_have_had_starts_anew(
    worker: Worker, happens: Callable[[Group], None]
) -> None:
    """Under a new epoch, from what Kafka stores, whatever this process had read of it."""
    before = worker.epoch
    await worker.member.on_revoked()
    happens(worker.group)
    offset = worker.group.stored[P].offset
    worker.group.generation += 1
    await worker.given()
    assert before is not None
    assert worker.epoch == before + 1
    assert worker.group.position == offset


async def test_a_commit_that_was_not_answered_and_arrived_is_ours(worker: Worker) -> None:
    """What Kafka holds may be any of those that were sent."""
    before = worker.epoch
    worker.commit(Progress(6), answered=False)
    await worker.rebalance()
    assert worker.epoch == before


async def test_a_partition_of_a_topic_made_again_is_not_kept(worker: Worker) -> None:
    """Not even where our own commit has found the new topic: it is held out, with a sentence."""
    worker.group.topic_ids = {P.topic: "B"}
    await worker.rebalance()
    assert worker.holdings.held == {}
    assert "has been deleted since" in (worker.member.problem or "")
    found = read(worker.group.stored[P])
    assert found is not None
    assert found[1].topic_id == "A", "the offset passes for one of the new topic"


@pytest.mark.parametrize("ids", [{}, {P.topic: "A"}])
async def test_a_topic_whose_id_nobody_tells_is_taken_for_the_same(
    worker: Worker, ids: dict[str, str]
) -> None:
    """Brokers that know no ids cost nobody his running calls."""
    before, worker.group.topic_ids = worker.epoch, ids
    await worker.rebalance()
    assert worker.epoch == before


async def test_idle_rebalances_leave_the_offset_where_it_is() -> None:
    """However often, kept or not: a new group stays where it began, and its map stays whole."""
    worker = Worker()
    await worker.given()
    assert worker.group.stored[P].offset == BEGAN, "where the group began was not stored"
    before = worker.commit(Progress(5, (1, 3)))
    for turn in range(6):
        if turn % 2:
            worker.group.member_id += "x"
        await worker.rebalance()
        found = read(worker.group.stored[P])
        assert found is not None
        assert (found[0].next_offset, found[0].runs) == (before.offset, (1, 3))


async def test_the_end_of_a_holder_is_counted_before_he_holds(worker: Worker) -> None:
    """Each process that takes it over counts one more, before any message can come; one that
    takes it over from itself lives."""
    for nonce, unclean_ends in (("a", 1), ("b", 2), ("b", 2), ("c", 3)):
        worker.remembered.nonce = nonce * 16
        worker.group.member_id += "x"
        await worker.rebalance()
        found = read(worker.group.stored[P])
        assert found is not None
        assert found[0] == worker.pipeline.given[P].progress == Progress(5, (), unclean_ends)


async def test_what_a_newer_version_stores_is_kept(worker: Worker) -> None:
    """By one that takes the partition over, in its mark and in each commit, while it is true."""
    worker.group.stored[P] = Stored(5, to_store(Progress(5), ANOTHER).metadata + ":x1:Y2")
    worker.group.member_id = "another"
    await worker.rebalance()
    assert worker.group.stored[P].metadata.endswith(":x1:Y2"), "the mark has dropped it"
    assert worker.commit(Progress(5, (1, 1))).metadata.endswith(":x1:Y2:mbAg")
    assert worker.commit(Progress(7)).metadata.endswith(":x1")
    await worker.rebalance()
    assert worker.commit(Progress(8)).metadata.endswith(":x1"), "a kept partition has dropped it"


async def read_up_to_90_and_cut_at_50(worker: Worker) -> None:
    worker.commit(Progress(90))
    worker.holdings.held[P].next = 90
    worker.offsets.end = 50
    worker.positions.cannot_read(P)  # the fetch at 90 has raised
    await worker.look()


async def test_a_log_that_was_cut_is_not_read_on_when_it_has_grown(worker: Worker) -> None:
    """Not by who saw it, not through a rebalance, not by the next process: with a sentence."""
    await read_up_to_90_and_cut_at_50(worker)
    assert "in[0] has been read up to offset 90, but the log ends at 50:" in (
        worker.member.problem or ""
    )
    worker.offsets.end = 95
    await worker.look()
    assert worker.positions.readable == []
    assert "has grown since" in (worker.member.problem or "")
    await worker.rebalance()
    assert worker.positions.readable == []
    assert worker.group.position is None
    assert "from 50" in (worker.member.problem or "")
    after = await worker.follower()
    assert after.holdings.held == {}
    assert "sluice run --start-over" in (after.member.problem or "")
    await after.look()
    assert after.holdings.held == {}


async def test_a_cut_whose_trace_could_not_be_stored_is_not_forgotten(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has found it holds the partition out, also when he is given it anew and it has grown."""

    async def refused(*_: object) -> None:
        raise KafkaError

    with monkeypatch.context() as patch:
        patch.setattr(worker.group, "_do_commit_offsets", refused)
        await read_up_to_90_and_cut_at_50(worker)
    worker.offsets.end = 95
    worker.group.member_id += "x"
    await worker.rebalance()
    assert worker.holdings.held == {}
    assert "from 50" in (worker.member.problem or "")
    found = read(worker.group.stored[P])
    assert found is not None
    assert found[1].cut_at == 50


async def test_a_cut_that_a_start_finds_is_stored(worker: Worker) -> None:
    """So that whoever starts after the log has grown finds it too, at its shortest."""
    worker.commit(Progress(90, (1, 2)))
    for end, cut_at in ((70, 70), (60, 60), (200, 60)):
        worker.offsets.end = end
        worker = await worker.follower()
        found = read(worker.group.stored[P])
        assert found is not None
        assert (found[0], found[1].cut_at) == (Progress(90, (1, 2)), cut_at)
        assert worker.holdings.held == {}


async def test_a_log_that_was_cut_and_has_grown_between_two_processes_is_found(
    worker: Worker,
) -> None:
    """By the leader's epoch that is stored, though nobody has seen the log shorter."""
    worker.positions.fetched(P, 7, batch(5, 3) + batch(90, 3))
    worker.commit(Progress(90, (2, 8)))
    assert ":E3" in worker.group.stored[P].metadata
    worker.offsets.epoch_end = {3: 100}
    assert (await worker.follower()).group.position == 90
    worker.offsets.end, worker.offsets.epoch_end = 200, {3: 95}
    after = await worker.follower()
    assert after.holdings.held == {}
    assert "read up to offset 100, but the log ends at 95, and" in (after.member.problem or "")


@pytest.mark.parametrize(
    ("epoch_end", "position"), [(100, 100), (110, 100), (None, 100), (95, None)]
)
async def test_another_leaders_messages_wait_until_it_is_known_that_nothing_is_cut(
    worker: Worker, epoch_end: int | None, position: int | None
) -> None:
    """They are not handed out before; where brokers say nothing it goes on."""
    worker.positions.fetched(P, 7, batch(7, 3))
    worker.holdings.held[P].next = 100
    worker.group.pause(TopicPartition(*P))
    worker.positions.fetched(P, 100, batch(100, 4))
    assert worker.positions.readable == []
    assert not worker.positions.may_be_read(P)
    worker.offsets.end = 200
    worker.offsets.epoch_end = {} if epoch_end is None else {3: epoch_end}
    await worker.look()
    assert worker.group.position == position
    assert bool(worker.positions.readable) == (position is not None)
    if position is None:
        assert worker.commit(Progress(98)).metadata.endswith(":E3:H95")
        assert "but the log ends at 95, and has grown" in (worker.member.problem or "")


async def test_a_map_that_reaches_into_another_epoch_is_stored_with_it(worker: Worker) -> None:
    """The cut may lie between the next offset and what is finished beyond it."""
    worker.positions.fetched(P, 7, batch(7, 3) + batch(50, 4))
    assert ":E4" in worker.commit(Progress(40, (5, 10))).metadata
    assert ":E3" in worker.commit(Progress(40, (5, 5))).metadata


async def test_what_was_fetched_before_a_leader_changed_can_be_fetched_again(
    worker: Worker,
) -> None:
    """Its messages were thrown away, as a rebalance does: they are handed out."""
    worker.positions.fetched(P, 7, batch(7, 3) + batch(50, 4))
    worker.positions.fetched(P, 7, batch(7, 3))
    assert worker.positions.readable == [P]


async def test_a_rebalance_does_not_forget_what_is_to_be_verified(worker: Worker) -> None:
    """The partition is kept, and still not read before it is known."""
    worker.positions.fetched(P, 7, batch(7, 3))
    worker.holdings.held[P].next = 100
    worker.positions.fetched(P, 100, batch(100, 4))
    await worker.rebalance()
    assert worker.positions.readable == []
    worker.offsets.epoch_end = {3: 100}
    await worker.look()
    assert worker.group.position == 100


async def test_what_finishes_behind_a_cut_is_committed_with_its_trace(worker: Worker) -> None:
    """Answers of the window are paid for; a failed commit of the trace is repeated."""
    await read_up_to_90_and_cut_at_50(worker)
    for progress in (Progress(90, (1, 2)), Progress(93)):
        found = read(worker.commit(progress))
        assert found is not None
        assert (found[0], found[1].cut_at) == (progress, 50)
    lost = worker.group.stored[P] = to_store(Progress(93), ANOTHER)
    worker.holdings.held[P].stored = lost
    await worker.look()
    assert worker.group.stored[P].metadata.endswith(":H50")


async def test_a_cut_log_is_started_over_where_it_was_cut(worker: Worker) -> None:
    """Once a person says so, and once: a later cut waits for another word."""
    await read_up_to_90_and_cut_at_50(worker)
    worker.offsets.end = 95
    after = await worker.follower(start_over=True)
    assert after.group.position == 50
    assert after.pipeline.given[P].progress == Progress(50, unclean_ends=1)
    found = read(worker.group.stored[P])
    assert found is not None
    assert (found[0].next_offset, found[1].cut_at) == (50, None)
    await read_up_to_90_and_cut_at_50(after)
    after.group.member_id += "x"  # not kept
    await after.rebalance()
    assert after.holdings.held == {}
    assert "--start-over" in (after.member.problem or "")


async def test_a_topic_made_again_is_started_over_as_a_new_group_would(worker: Worker) -> None:
    """At input.start, not at an offset of the old topic."""
    worker.group.topic_ids = {P.topic: "B"}
    assert (await worker.follower()).holdings.held == {}
    after = await worker.follower(start_over=True)
    assert after.group.position == BEGAN
    found = read(worker.group.stored[P])
    assert found is not None
    assert (found[0].next_offset, found[1].topic_id) == (BEGAN, "B")


async def test_a_group_without_offsets_is_told_before_it_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line with the number of messages; no line where an offset is stored."""
    worker = Worker()
    await worker.given()
    (line,) = (each.message for each in caplog.records if "no offsets" in each.message)
    assert "The group g has no offsets for 1 of its partitions" in line
    assert "97 messages before the present end" in line
    caplog.clear()
    await worker.follower()
    assert not any("no offsets" in each.message for each in caplog.records)


async def test_nothing_is_held_before_its_restore(worker: Worker) -> None:
    """While Kafka has not said what it holds, the partition is paused and nobody hears of it."""
    told = len(worker.pipeline.assignments)
    await worker.member.on_revoked()
    worker.offsets.gate.clear()
    worker.group.generation += 1
    restoring = asyncio.create_task(worker.given())
    for _ in range(5):
        await asyncio.sleep(0)
    assert worker.holdings.held == {}
    assert not worker.holdings.restored.is_set()
    assert worker.group.position is None
    assert len(worker.pipeline.assignments) == told
    worker.offsets.gate.set()
    await restoring
    assert worker.holdings.restored.is_set()


async def test_a_restore_that_is_overtaken_by_a_revoke_holds_nothing(worker: Worker) -> None:
    """What it has read may be another's by now, and so is the partition."""
    await worker.member.on_revoked()
    worker.offsets.gate.clear()
    worker.group.generation += 1
    restoring = asyncio.create_task(worker.given())
    await asyncio.sleep(0)
    stored = dict(worker.group.stored)
    await worker.member.on_revoked()
    worker.offsets.gate.set()
    await restoring
    assert worker.holdings.held == {}
    assert not worker.holdings.restored.is_set()
    assert worker.group.stored == stored


async def test_whoever_is_fenced_in_a_revoke_does_not_fence_back(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group has given the partition to another by then; two that fence each other stand still.

    Where it is held and nothing is being rebalanced, it is restored, beginning with a fence.
    """
    monkeypatch.setattr("service.kafka.group.holdings.FENCED_AGAIN_S", 0.0)

    async def fenced() -> int:
        before = worker.offsets.asked
        worker.holdings.fenced(P)
        await worker.member.see_to_the_rest()
        return worker.offsets.asked - before

    asked: list[int] = []

    async def in_the_revoke() -> None:
        asked.append(await fenced())

    worker.pipeline.when_revoked = in_the_revoke
    await worker.member.on_revoked()
    assert asked == [0]
    worker.group.generation += 1
    await worker.given()
    assert await fenced() == 1


# --- another worker of our name ---------------------------------------------------------------


class NamedGroup(Group):
    """One whose members have names; `rival` has joined under ours, as far as the broker knows."""

    group_id, _group_instance_id = "g", "worker-0"

    def __init__(self) -> None:
        super().__init__()
        self.rival = False
        self.deaf = 0  # requests that fail

    async def ensure_coordinator_known(self) -> None:
        pass

    async def _send_req(self, request: SyncGroupRequest) -> SimpleNamespace:
        if self.deaf:
            self.deaf -= 1
            raise NodeNotReadyError
        sent = request.build(SyncGroupRequest_v3)
        assert (sent.member_id, sent.group_instance_id) == ("member", "worker-0")
        return SimpleNamespace(error_code=82 if self.rival else 25)


@pytest.fixture
async def named() -> Worker:
    worker = Worker(group=NamedGroup(), kafka={"group_instance_id": "worker-0"})
    await worker.given()
    worker.commit(Progress(5))
    worker.group.member_id = ""  # the client has heard that it is no member any more
    return worker


@pytest.mark.parametrize("deaf", [0, 2])
async def test_whoever_is_put_out_by_his_name_does_not_join_again(
    named: Worker, deaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is finished or committed any more, the client stays in the callback, and the next
    poll ends the process with a sentence."""
    monkeypatch.setattr(name_module, "PUT_OUT_AGAIN_S", 0.0)
    named.group.rival, named.group.deaf = True, deaf
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(named.member.on_revoked(), 0.1)
    assert isinstance(named.holdings.fatal, NameTaken)
    assert "worker-0" in str(named.holdings.fatal)
    assert named.holdings.held == {}
    assert named.pipeline.revokes == 0


async def test_whoever_was_away_for_too_long_joins_again(named: Worker) -> None:
    """The group has forgotten him and knows nobody else of his name."""
    await asyncio.wait_for(named.member.on_revoked(), 1)
    assert named.holdings.fatal is None
    assert named.pipeline.revokes == 1


async def test_a_name_is_free_once_nobody_runs_who_bears_it(named: Worker) -> None:
    """A process of this machine that is stored as its bearer and runs: a sentence with its number;
    one that has ended, one on another machine, or this one itself: nothing."""
    own = this_process("worker-0")
    parent = replace(own, pid=os.getppid(), began=began(os.getppid()) or 0)
    for free in (own, replace(parent, began=1), replace(parent, host="0" * 8)):
        named.group.stored[P] = to_store(Progress(5), replace(ANOTHER, bearer=free))
        await named.member.name.see_that_it_is_free()
    named.group.stored[P] = to_store(Progress(5), replace(ANOTHER, bearer=parent))
    with pytest.raises(NameTaken, match=f"Process {parent.pid} .* worker-0"):
        await named.member.name.see_that_it_is_free()
