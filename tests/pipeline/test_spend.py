"""The limit of dollars an hour, for several workers that come, go and start again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.core.admission.accounts import PERIODS_MAX, TEXT, added, read, total_usd, written
from service.core.admission.admission import Limits
from service.core.messages import Extracted, Partition, Rejected
from service.core.tracker import Progress
from service.kafka.client.stored import FIELDS_CHARS_MAX, Mark, to_store
from service.kafka.client.stored import read as read_stored
from service.pipeline import Pipeline
from tests.pipeline.test_admission import WIDE, limited
from tests.pipeline.test_way import decode
from tests.support import virtual_time
from tests.support.fakes import FakeBroker, FakeExtractor, FakeSink, FakeSource, partition

LIMIT_USD = 1.0
CALL_USD = 0.002


class Priced(FakeExtractor):
    """Each answer costs the same."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        answer = await super().call(text, progress)
        assert isinstance(answer, Extracted)
        return replace(answer, provenance=replace(answer.provenance, cost_usd=CALL_USD))


class Worker:
    """One process on the broker."""

    def __init__(self, broker: FakeBroker) -> None:
        self.source, self.extractor = FakeSource(broker), Priced()
        self.pipeline = Pipeline(
            self.source,
            self.extractor,
            FakeSink(broker),
            decode,
            WIDE,
            observe=lambda _: None,
            uniform=lambda low, high: high,
            wall_clock=lambda: asyncio.get_running_loop().time(),
            admission=limited(Limits(50, spend_usd_per_hour=LIMIT_USD)),
        )
        self.source.assignment = self.pipeline
        self.pipeline.seen(dict.fromkeys(broker.logs))

    @property
    def usd(self) -> float:
        return CALL_USD * len(self.extractor.calls)


class Group:
    """Six partitions with more work than the limit allows."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.broker = FakeBroker(6)
        for number in range(6):
            for n in range(2000):
                self.broker.append(f"text {number} {n}", number=number)
        self.tasks, self.workers = tasks, list[Worker]()

    def start(self) -> Worker:
        worker = Worker(self.broker)
        self.workers.append(worker)
        self.tasks.create_task(worker.pipeline.run())
        return worker

    async def divide(self, *parts: tuple[Worker, range]) -> None:
        """A rebalance: everything is revoked, then each holds its part anew."""
        for worker, _ in parts:
            if worker.source.given:
                await worker.source.revoke()
        for worker, numbers in parts:
            worker.source.hold(fresh={partition(n) for n in numbers})
            worker.pipeline.seen(self.lags())

    def lags(self) -> dict[Partition, int | None]:
        return {
            where: log.end - self.broker.committed.get(where, 0)
            for where, log in self.broker.logs.items()
        }

    @property
    def usd(self) -> float:
        return sum(worker.usd for worker in self.workers)

    def end(self) -> None:
        for worker in self.workers:
            worker.pipeline.force()


@pytest.mark.parametrize("apart_s", [0.0, 0.5, 3.0, 60.0])
def test_workers_that_start_together_or_later_keep_the_limit(apart_s: float) -> None:
    """The first one has all partitions until the second one comes, and spends what it may."""

    async def play() -> float:
        async with asyncio.TaskGroup() as tasks:
            group = Group(tasks)
            one = group.start()
            await group.divide((one, range(6)))
            await asyncio.sleep(apart_s)
            two = group.start()
            await group.divide((one, range(3)), (two, range(3, 6)))
            await asyncio.sleep(600)
            group.end()
            return group.usd

    spent = virtual_time.run(play())
    assert 0.95 * LIMIT_USD <= spent <= 1.05 * LIMIT_USD


def test_three_uneven_workers_of_which_one_starts_again_keep_the_limit() -> None:
    """Two hold the half each; a third joins with one partition; one dies and starts again: within
    the first hour the limit is kept, and the second hour has its own."""

    async def play() -> tuple[float, float]:
        async with asyncio.TaskGroup() as tasks:
            group = Group(tasks)
            one, two = group.start(), group.start()
            await group.divide((one, range(3)), (two, range(3, 6)))
            await asyncio.sleep(2)
            three = group.start()
            await group.divide((one, range(3)), (two, range(3, 5)), (three, range(5, 6)))
            await asyncio.sleep(1)
            two.pipeline.stop()
            await asyncio.sleep(40)
            again = group.start()
            await group.divide((one, range(3)), (again, range(3, 5)), (three, range(5, 6)))
            await asyncio.sleep(3000)
            first_hour = group.usd
            await asyncio.sleep(3600)
            group.end()
            return first_hour, group.usd - first_hour

    first_hour, second_hour = virtual_time.run(play())
    assert 0.95 * LIMIT_USD <= first_hour <= 1.05 * LIMIT_USD
    assert 0.9 * LIMIT_USD <= second_hour <= 1.05 * LIMIT_USD


def test_the_ledger_survives_its_text() -> None:
    """Whatever was spent when, in a few characters; what is older than an hour is gone."""
    ledger: tuple[tuple[int, int], ...] = ()
    for minute in range(0, 180, 7):
        ledger = added(ledger, 1_795_000_000 + 60 * minute, 123.456789)
    text = written(ledger)
    assert text is not None
    assert TEXT.fullmatch(text)
    assert read(text) == ledger
    assert len(ledger) == PERIODS_MAX
    assert len(text) < 60
    assert 9 * 123.456789 <= total_usd(ledger) <= 10 * 123.456790 + 1e-3


def test_the_commit_has_it_and_says_nothing_where_nothing_was_spent() -> None:
    """Beside the offset, for whoever comes; an own field of the metadata."""
    spent = added((), 1_795_000_000, 0.25)
    mark = Mark("0" * 16)
    stored = to_store(Progress(7, spent=spent), mark)
    found = read_stored(stored)
    assert found is not None
    assert found[0] == Progress(7, spent=spent)
    assert ":s" not in to_store(Progress(7), mark).metadata
    assert len(stored.metadata) < FIELDS_CHARS_MAX
