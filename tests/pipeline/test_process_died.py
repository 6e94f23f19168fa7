"""A message that takes the process down: found by elimination, rejected, and no other with it."""

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from service.core.messages import Reason, Rejected
from service.core.tracker import UNCLEAN_ENDS_MAX, Progress
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import partition

LIVES_MAX = 2 * (UNCLEAN_ENDS_MAX + 2)
"""The deaths that are counted, one that was not (it had made progress), one alone, once more."""


def lives(stage: Stage) -> int:
    """Start again after each death until nothing is deadly any more; how many lives it took."""
    for life in range(1, LIVES_MAX + 1):
        if not stage.die(1000.0):
            return life
    raise AssertionError("it dies for ever")


def rejected(stage: Stage) -> Counter[tuple[int, str]]:
    return Counter(
        (message.offset, outcome.reason)
        for message, outcome in stage.broker.published
        if isinstance(outcome, Rejected)
    )


@pytest.mark.parametrize("poison", [0, 1, 7, 19])
def test_the_message_it_died_of_is_rejected(poison: int) -> None:
    """Wherever it stands, after a few deaths it is a dead letter and all others have an outcome."""
    stage = Stage()
    for n in range(20):
        stage.broker.append(f"text {n}", key=str(n))
    stage.extractor.deadly = {f"text {poison}"}
    stage.extractor.latency_s = lambda text: 0.1 + (len(text) * 7 % 5) / 10
    lives(stage)
    assert rejected(stage) == {(poison, Reason.PROCESS_DIED): 1}
    assert stage.broker.committed == {partition(): 20}
    assert stage.extractor.calls.count(f"text {poison}") <= UNCLEAN_ENDS_MAX + 2


@pytest.mark.parametrize("seed", range(30), ids=lambda seed: f"seed-{seed}")
def test_no_innocent_is_rejected(seed: int) -> None:
    """Among any traffic on several partitions, exactly the deadly ones are rejected."""
    rng = random.Random(seed)
    stage = Stage(partitions=3)
    for n in range(60):
        stage.broker.append(f"text {n}", key=str(rng.randrange(9)), number=rng.randrange(3))
    deadly = {f"text {n}" for n in rng.sample(range(60), rng.choice([1, 1, 2]))}
    stage.extractor.deadly = deadly
    stage.extractor.latency_s = lambda _: rng.lognormvariate(-1, 1)
    for _ in range(60):
        if not stage.die(3600.0):
            break
    found = {
        (message.value or b"").decode()
        for message, outcome in stage.broker.published
        if isinstance(outcome, Rejected)
    }
    assert found == deadly
    assert sum(stage.broker.committed.values()) == 60


def test_suspects_run_one_at_a_time_and_nothing_beside_them() -> None:
    """Not even messages of other partitions, which might be what it dies of."""
    stage = Stage(partitions=2)
    for n in range(12):
        stage.broker.append(f"text {n}", number=n % 2)
    stage.extractor.deadly = {"text 0"}
    for _ in range(UNCLEAN_ENDS_MAX):
        assert stage.die(1000.0)
    stage.extractor.in_flight_max = 0
    stage.extractor.deadly = set()

    async def watch() -> None:
        await asyncio.sleep(0.35)
        assert stage.extractor.in_flight_max == 1

    stage.show(watch)


def test_a_suspect_waits_for_the_calls_that_run() -> None:
    """It comes while a message of another partition is in flight: it starts when that has ended."""
    stage = Stage(partitions=2)
    stage.broker.append("text 0", number=0)
    stage.extractor.deadly = {"text 0"}
    for _ in range(UNCLEAN_ENDS_MAX):
        assert stage.die(1000.0)
    stage.broker.stored.pop(partition(1))  # which was idle
    stage.broker.append("other", number=1)
    stage.extractor.deadly = set()
    stage.extractor.calls.clear()
    stage.extractor.in_flight_max = 0
    stage.extractor.latency_s = lambda text: 20.0 if text == "other" else 0.1

    async def watch() -> None:
        await stage.source.rebalance(fresh={partition(1)})
        await asyncio.sleep(1)
        await stage.source.rebalance(keep={partition(1)}, fresh={partition(0)})
        await asyncio.sleep(5)
        assert stage.extractor.in_flight == ["other"]
        assert stage.pipeline.status(SETTLED).queued == 1
        await asyncio.sleep(20)

    stage.show(watch)
    assert stage.extractor.calls == ["other", "text 0"]
    assert stage.extractor.in_flight_max == 1


def test_ends_in_order_are_no_deaths() -> None:
    """However often a worker is stopped or loses the partition without progress: no suspicion."""
    stage = Stage()
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 50.0

    async def lose() -> None:
        for _ in range(6):
            await asyncio.sleep(1)
            await stage.source.rebalance(fresh={partition()})

    for _ in range(3):
        stage.pipeline = stage.new_pipeline()
        stage.show(lose)
    assert stage.broker.stored[partition()].unclean_ends == 0
    assert stage.broker.stored[partition()].alone is None


def test_a_suspect_that_is_cut_off_in_order_has_not_died() -> None:
    """Stopped while a suspect runs alone: the next start calls it again, and does not reject it."""
    stage = Stage()
    stage.broker.append("slow")
    stage.extractor.deadly = {"slow"}
    for _ in range(UNCLEAN_ENDS_MAX):
        assert stage.die(1000.0)
    stage.extractor.deadly = set()
    stage.extractor.latency_s = lambda _: 100.0

    async def stop() -> None:
        await asyncio.sleep(5)
        assert stage.extractor.in_flight == ["slow"]
        assert stage.broker.stored[partition()].alone == 0

    stage.show(stop)
    assert stage.extractor.cancelled == ["slow"]
    stage.pipeline = stage.new_pipeline()
    stage.extractor.latency_s = lambda _: 0.1
    stage.show()
    assert stage.broker.texts() == ["slow"]
    assert not stage.rejected()


def test_a_suspect_waits_until_kafka_knows_that_it_runs() -> None:
    """While that cannot be stored it is not called: a death would be blamed on nobody."""
    stage = Stage()
    stage.broker.append("text")
    stage.extractor.deadly = {"text"}
    for _ in range(UNCLEAN_ENDS_MAX):
        assert stage.die(1000.0)
    called = len(stage.extractor.calls)
    stage.source.refuse_commits = 1000
    assert not stage.die(20.0)
    assert len(stage.extractor.calls) == called
    stage.source.refuse_commits = 0
    assert stage.die(1000.0)


def test_a_suspect_does_not_wait_for_the_commit_interval() -> None:
    """A refused commit holds everything up: nobody runs until it is stored who runs alone."""
    stage = Stage(bounds=replace(BOUNDS, commit_interval_s=300.0))
    stage.broker.append("text")
    stage.broker.stored[partition()] = Progress(0, unclean_ends=UNCLEAN_ENDS_MAX)
    stage.source.refuse_commits = 3

    async def wait() -> None:
        await asyncio.sleep(20)
        assert stage.broker.texts() == ["text"]

    stage.show(wait)
