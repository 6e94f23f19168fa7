"""Seeded simulations: random latencies, failures and rebalances; the fakes check every call.

A seed that fails is replayed with `pytest -k 'seed-17'`.
"""

import asyncio
import random
from collections import defaultdict
from dataclasses import replace

import pytest

from service.core.completed import finished_ranges
from service.core.errors import OutputTooLarge, TransientFailure
from service.core.messages import Message, Partition, Reason, Rejected
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import FakeTransactions, partition

PARTITIONS = 3
MESSAGES = 200


def scene(rng: random.Random) -> Stage:
    """Random traffic with holes, keys, poison, flaky sends and refused commits."""
    ordering = rng.choice(["key", "partition", "none"])
    concurrency = rng.choice([1, 3, 10])
    bounds = replace(
        BOUNDS,
        ordering=ordering,
        concurrency=concurrency,
        window=concurrency * rng.choice([1, 4, 16]),
        rebalance_drain_s=rng.choice([0.0, 0.5, 5.0]),
    )
    stage = Stage(partitions=PARTITIONS, bounds=bounds)
    for n in range(MESSAGES):
        number = rng.randrange(PARTITIONS)
        if rng.random() < 0.1:
            stage.broker.logs[partition(number)].hole()
        key = None if rng.random() < 0.2 else f"{number}-{rng.randrange(5)}"
        stage.broker.append(f"text {n}", key=key, number=number)
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            stage.extractor.scripts[f"text {n}"].append(
                TransientFailure("timeout", retry_after_s=rng.choice([None, None, 1.0]))
            )
        if rng.random() < 0.05:
            stage.extractor.scripts[f"text {n}"].append(Rejected(Reason.INVALID, "no"))
    stage.extractor.latency_s = lambda _: rng.lognormvariate(-1, 1)
    share = rng.choice([0.0, 0.02])
    stage.sink.flaky = lambda: rng.random() < share
    if rng.random() < 0.3:
        stage.once_too_large = {rng.randrange(20)}
        stage.sink.failures.update({offset: [OutputTooLarge()] for offset in stage.once_too_large})
    stage.source.refuse_commits = rng.randrange(4)
    return stage


def lane_of(stage: Stage, message: Message) -> tuple[object, ...]:
    if stage.bounds.ordering == "partition":
        return ()
    return (message.offset,) if message.key is None else (message.key,)


def check(stage: Stage) -> None:
    """Everything has an outcome, everything is committed, keys are in order."""
    for where, log in stage.broker.logs.items():
        assert set(log.values) <= stage.broker.acknowledged[where], f"lost in {where}"
        assert stage.broker.committed.get(where, 0) == log.end, f"{where} did not catch up"
    if stage.bounds.ordering == "none":
        return
    first: dict[tuple[object, ...], list[int]] = defaultdict(list)
    # A dead letter goes to another topic: it has no order with the outputs of its lane.
    seen = {m.coordinates for m, outcome in stage.broker.published if isinstance(outcome, Rejected)}
    for message, _ in stage.broker.published:
        # Nor has an output whose dead letter was on its way when its partition went: the next
        # holder's answer is small enough here, and comes behind those that did not wait for it.
        if message.coordinates in seen or message.offset in stage.once_too_large:
            continue
        seen.add(message.coordinates)
        first[(message.partition, *lane_of(stage, message))].append(message.offset)
    for lane, offsets in first.items():
        assert offsets == sorted(offsets), f"out of order in {lane}"


async def until_committed(stage: Stage) -> None:
    """Wait until everything that the logs hold is committed."""
    while any(
        stage.broker.committed.get(where, 0) < log.end for where, log in stage.broker.logs.items()
    ):
        assert asyncio.get_running_loop().time() < 3600, stage.pipeline.status(SETTLED)
        await asyncio.sleep(5)


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}")
def test_nothing_lost_in_order_whatever_happens(seed: int) -> None:
    """With random faults and no rebalance, each message is published once it can be."""
    rng = random.Random(seed)
    stage = scene(rng)

    async def wait() -> None:
        await until_committed(stage)

    stage.show(wait)
    check(stage)
    published = [message.coordinates for message, _ in stage.broker.published]
    assert len(published) == len(set(published)), "published twice without a rebalance"


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}")
def test_nothing_lost_through_rebalances(seed: int) -> None:
    """With partitions lost, kept and given back at random, nothing is lost nor out of order."""
    rng = random.Random(1000 + seed)
    stage = scene(rng)
    everything = {partition(n) for n in range(PARTITIONS)}
    stage.sink.loses_acknowledgement = lambda: rng.random() < 0.01

    async def shake() -> None:
        for _ in range(rng.randrange(1, 8)):
            await asyncio.sleep(rng.uniform(0, 5))
            held = stage.source.epochs.keys()
            mine = {p for p in everything if rng.random() < 0.7}
            kept = {p for p in mine & held if rng.random() < 0.6}
            await stage.source.rebalance(keep=kept, fresh=mine - kept)
            if rng.random() < 0.5:
                stage.source.fetch_again()
        await stage.source.rebalance(
            keep=everything & stage.source.epochs.keys(),
            fresh=everything - stage.source.epochs.keys(),
        )
        await until_committed(stage)

    stage.show(shake)
    check(stage)


@pytest.mark.parametrize("seed", range(30), ids=lambda seed: f"seed-{seed}")
def test_a_stop_at_any_moment_repeats_nothing(seed: int) -> None:
    """Stopped at a random moment and started again: one outcome each, no call made twice."""
    rng = random.Random(2000 + seed)
    stage = scene(rng)
    stage.sink.flaky = lambda: False
    stage.extractor.scripts.clear()

    async def stop() -> None:
        await asyncio.sleep(rng.uniform(0, 20))

    stage.show(stop)
    stage.pipeline = stage.new_pipeline()
    stage.show()
    check(stage)
    published = [message.coordinates for message, _ in stage.broker.published]
    assert len(published) == len(set(published)) == MESSAGES
    assert len(stage.extractor.calls) == len(set(stage.extractor.calls)) == MESSAGES


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}")
def test_a_crash_repeats_only_what_no_map_held(seed: int) -> None:
    """Killed at random moments: what is called again was taken and not in what was stored last."""
    rng = random.Random(3000 + seed)
    stage = scene(rng)
    stage.sink.flaky = lambda: False
    stage.sink.failures.clear()
    stage.extractor.scripts.clear()
    for _ in range(rng.randrange(1, 4)):
        lived_s = rng.uniform(0, 12)
        stage.die(lived_s)
        called = set(stage.extractor.calls)
        held = {text_at(stage, *each) for each in held_by_kafka(stage)}
        before = len(stage.extractor.calls)
        stage.die(lived_s)
        again = set(stage.extractor.calls[before:]) & called
        assert not again & held, "called again although a stored map held it"
    stage.show()
    check(stage)


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}")
def test_exactly_once_whatever_happens(seed: int) -> None:
    """With outcome and progress in one transaction, whatever fails, is lost or dies: each message
    is published once."""
    rng = random.Random(4000 + seed)
    stage = scene(rng)
    flaky, failures = stage.sink.flaky, stage.sink.failures
    stage.sink = FakeTransactions(stage.source, ordering=stage.bounds.ordering)
    stage.sink.flaky, stage.sink.failures = flaky, failures
    everything = {partition(n) for n in range(PARTITIONS)}
    stage.pipeline = stage.new_pipeline()
    for _ in range(rng.randrange(3)):
        stage.die(rng.uniform(0, 10))

    async def shake() -> None:
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(rng.uniform(0, 5))
            mine = {p for p in everything if rng.random() < 0.7}
            kept = {p for p in mine & stage.source.epochs.keys() if rng.random() < 0.6}
            await stage.source.rebalance(keep=kept, fresh=mine - kept)
        kept = everything & stage.source.epochs.keys()
        await stage.source.rebalance(keep=kept, fresh=everything - kept)
        await until_committed(stage)

    stage.show(shake)
    check(stage)
    published = [message.coordinates for message, _ in stage.broker.published]
    assert len(published) == len(set(published)) == MESSAGES


def held_by_kafka(stage: Stage) -> set[tuple[Partition, int]]:
    """What the stored offsets and maps say is finished."""
    found = set()
    for where, progress in stage.broker.stored.items():
        ranges = (
            range(progress.next_offset),
            *finished_ranges(progress.next_offset, progress.runs),
        )
        found |= {(where, o) for o in stage.broker.logs[where].values for r in ranges if o in r}
    return found


def text_at(stage: Stage, where: Partition, offset: int) -> str:
    return (stage.broker.logs[where].values[offset].value or b"").decode()
