"""Exactly once behind a message that takes long: nothing is committed that the map cannot hold.

The real tracker, window, holdings, transactions and writers; Kafka's clients alone are stand-ins.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import window as window_module
from service.core.completed import Runs, encode, finished_ranges, fits_for_sure
from service.core.errors import PublishFailed
from service.core.messages import Message, Skipped
from service.core.tracker import Given, Progress
from service.core.window import Holding, Window
from service.kafka.client import stored as stored_module
from service.kafka.client.stored import read
from service.kafka.group import holdings as holdings_module
from service.kafka.sink import KafkaSink
from service.kafka.transactions import outbox as outgoing_module
from service.kafka.transactions.writer import HELD_BACK_S
from tests.support import sources, virtual_time
from tests.support.hand_over import OneWorker, P
from tests.support.transactions import output


class Reader:
    """Takes messages of P, hands over their outcomes and sees on each commit what it holds."""

    def __init__(self, worker: OneWorker, progress: Progress) -> None:
        self.worker = worker
        window = Window("none", suspects=1)
        window.assign({P: Given(1, progress)})
        self.holding: Holding = window.held[P]
        self._committed: set[int] = set()
        self._waiting: dict[asyncio.Future[None], int] = {}
        self.failed: list[int] = []
        self.quiet = 0
        """Outcomes without outputs that finished by themselves."""
        worker.pipeline.progress = self.progress  # type: ignore[method-assign]
        worker.pipeline.has_room = lambda _: self.holding.has_room()  # type: ignore[method-assign]
        worker.pipeline.stored = self._look  # type: ignore[method-assign]

    def progress(self, _: object, finishing: frozenset[int] = frozenset()) -> Progress:
        return self.holding.progress(clean=False, finishing=finishing)

    def take(self, offsets: Iterable[int]) -> None:
        for offset in offsets:
            self.holding.tracker.deliver(offset, 0)

    def hand_over(self, offset: int, *, quiet: bool = False) -> None:
        """`quiet`: an outcome without outputs, as the sink treats it."""
        if quiet and self.worker.transactions.has_room(P):
            self.holding.tracker.finish(offset)
            self.quiet += 1
            return
        outputs = [] if quiet else [(0, output("out", b"1"))]
        future = self.worker.transactions.hand_over(P, offset, outputs, lambda: None)
        self._waiting[future] = offset
        future.add_done_callback(self._settled)

    @property
    def waiting(self) -> set[int]:
        return set(self._waiting.values())

    def _settled(self, future: asyncio.Future[None]) -> None:
        offset = self._waiting.pop(future)
        if isinstance(future.exception(), PublishFailed):
            self.failed.append(offset)
            return
        self.holding.tracker.finish(offset)
        self._committed.add(offset)

    def _look(self, *_: object) -> None:
        """Of earlier transactions; the next commit looks at what goes with this one."""
        stored = self.worker.group.stored[P]
        found = read(stored)
        assert found is not None
        self._committed = {offset for offset in self._committed if offset >= stored.offset}
        held = finished_ranges(stored.offset, found[0].runs)
        assert self._committed <= set().union(*held), "committed, and not in what Kafka holds"


def play(scene: Callable[[Reader], Awaitable[None]], runs: Runs = ()) -> None:
    async def whole() -> None:
        async with asyncio.TaskGroup() as tasks:
            worker = OneWorker(tasks)
            await worker.given(P)
            await scene(Reader(worker, Progress(0, runs)))

    virtual_time.run(whole())


async def settle(reader: Reader) -> None:
    """As many transactions as there may be."""
    before = None
    while before != (before := (len(reader.waiting), len(reader.failed))):
        for _ in range(40):
            await asyncio.sleep(0)


@pytest.mark.parametrize("messages", [24_000, 60_000])
def test_a_large_window_in_random_order_loses_nothing_from_the_map(messages: int) -> None:
    """The oldest message is slow and the others end in any order: more than the map holds waits,
    nothing of what is committed is left out, and at the end everything is finished."""

    async def scene(reader: Reader) -> None:
        reader.take(range(messages))
        order = list(range(1, messages))
        random.Random(messages).shuffle(order)
        held_back = 0
        for at in range(0, len(order), 3_000):
            for offset in order[at : at + 3_000]:
                reader.hand_over(offset)
            await asyncio.sleep(0.5)
            held_back = max(held_back, len(reader.waiting) + len(reader.failed))
        assert held_back > messages // 50, "the map held everything: the test shows nothing"
        reader.hand_over(0)
        while reader.waiting or reader.failed:
            for offset in sorted(reader.failed):
                reader.hand_over(offset)
            reader.failed.clear()
            await asyncio.sleep(1.0)
        assert reader.holding.progress(clean=False).next_offset == messages

    play(scene)


def small_map(stack: ExitStack, chars: int) -> None:
    """Everything that takes 3,700 characters for granted has these, and small transactions."""
    patch = pytest.MonkeyPatch()
    stack.callback(patch.undo)
    bits = 6 * chars - 16
    patch.setattr(window_module, "SPAN_SURE", bits)
    patch.setattr(window_module, "RUNS_SURE", bits // 8 // 5)
    patch.setattr(holdings_module, "MAP_CHARS_MAX", chars)
    ours = len("sluice1:0123456789abcdef:g1:u1:m")
    patch.setattr(stored_module, "METADATA_CHARS_MAX", ours + chars)
    patch.setattr(outgoing_module, "TRANSACTION_MESSAGES_MAX", 5)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_committed_is_in_the_map_and_everything_finishes(data: st.DataObject) -> None:
    """With room for a few dozen messages: any order, with holes, outcomes without outputs,
    messages taken in between, and the map of an earlier holder."""
    chars = data.draw(st.integers(6, 20), label="chars")
    runs: Runs = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4), label="earlier"))
    runs = runs[: len(runs) // 2 * 2]
    if len(encode(runs, chars)) == 0:
        runs = ()
    seed = data.draw(st.integers(0, 2**20), label="seed")

    async def scene(reader: Reader) -> None:
        rng = random.Random(seed)
        taken: list[int] = []
        offset = 0
        left = rng.randrange(1, 250)
        while left or taken or reader.waiting or reader.failed:
            again, reader.failed = reader.failed, []
            taken += again
            for _ in range(min(left, rng.randrange(60))):
                offset += rng.choice([0, 0, 0, 0, 1, 3])
                tracker = reader.holding.tracker
                before = tracker.unfinished
                reader.take([offset])
                taken += [offset] if tracker.unfinished > before else []
                offset, left = offset + 1, left - 1
            for _ in range(rng.randrange(40)):
                if taken:
                    # The oldest one is mostly slow.
                    index = rng.randrange(len(taken)) if rng.random() < 0.98 else 0
                    index = index or rng.randrange(min(2, len(taken)))
                    reader.hand_over(taken.pop(index), quiet=rng.random() < 0.3)
            await asyncio.sleep(rng.choice([0.0, 0.1, 1.0]))
        assert reader.holding.tracker.unfinished == 0

    with ExitStack() as stack:
        small_map(stack, chars)
        play(scene, runs)


def test_what_is_held_back_waits_for_the_oldest_message_and_goes_with_it() -> None:
    """And what somebody wants stored, or what fits, does not wait with it."""

    async def scene(reader: Reader) -> None:
        with ExitStack() as stack:
            small_map(stack, 8)
            reader.take(range(200))
            for offset in range(1, 200, 2):
                reader.hand_over(offset)
            await settle(reader)
            assert reader.waiting
            assert min(reader.waiting) > 1
            await reader.worker.transactions.commit([P])
            waiting = len(reader.waiting)
            reader.hand_over(0)
            await settle(reader)
            assert 0 not in reader.waiting
            assert len(reader.waiting) < waiting
            for offset in range(2, 200, 2):
                reader.hand_over(offset)
            await settle(reader)
            assert not reader.waiting
            assert not reader.failed

    play(scene)


def test_an_outcome_without_outputs_needs_room_in_the_map_too() -> None:
    """Where there is room for whatever ends it finishes at once; else with the others, since it
    would push what they have committed out of the map."""

    async def scene(reader: Reader) -> None:
        with ExitStack() as stack:
            small_map(stack, 8)
            worker = reader.worker
            exactly_once = {"mode": "exactly_once", "ordering": "none"}
            where = sources.Kafka("127.0.0.1:1")
            sink = KafkaSink(
                sources.settings(where, P.topic, "g", delivery=exactly_once), lambda _: None
            )
            sink._started, sink.transactions = True, worker.transactions
            reader.take(range(10))
            assert (await sink.publish(message(4), Skipped())).done()
            reader.take(range(10, 200))
            outcome = await sink.publish(message(150), Skipped())
            assert not outcome.done()
            await outcome
            assert read(worker.group.stored[P])[0].runs[:1] == (150,)  # type: ignore[index]

    play(scene)


def message(offset: int) -> Message:
    return Message(P, offset, 1, b"k", b"text", (), 0)


def test_nobody_waits_for_room_for_ever() -> None:
    """The oldest message has failed and its lane waits until what was handed over behind it is
    settled: that fails after a while, and comes again behind it."""

    async def scene(reader: Reader) -> None:
        with ExitStack() as stack:
            small_map(stack, 8)
            reader.take(range(200))
            for offset in range(1, 200, 2):
                reader.hand_over(offset)
            await settle(reader)
            assert reader.waiting
            await asyncio.sleep(HELD_BACK_S + 1.0)
            assert not reader.waiting
            assert reader.failed
            reader.hand_over(0)
            await settle(reader)
            assert not reader.waiting

    play(scene)


def test_an_earlier_map_that_is_too_large_stops_nobody() -> None:
    """It became short text by its pattern alone: its first message goes, whatever is left of it
    then."""
    runs = (1, 1, 2, 3) * 100

    async def scene(reader: Reader) -> None:
        with ExitStack() as stack:
            small_map(stack, len(encode(runs, 4_000)))
            assert not fits_for_sure(runs, len(encode(runs, 4_000)))
            offset = 0
            while reader.holding.progress(clean=False).next_offset < sum(runs):
                before = reader.holding.tracker.unfinished
                reader.take([offset])
                if reader.holding.tracker.unfinished > before:
                    reader.hand_over(offset)
                    await settle(reader)
                    assert not reader.waiting
                offset += 1

    play(scene, runs)
