"""The way of a message, under virtual time, against fakes that check every call."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from service.core.errors import (
    CommitFailed,
    OutputTooLarge,
    PublishFailed,
    ServiceFailure,
    TransientFailure,
)
from service.core.events import Abandoned, Event, Finished
from service.core.messages import Batch, Message, Outcome, Passed, Reason, Rejected, Skipped
from service.core.status import GroupStatus, State
from service.core.tracker import Progress
from service.pipeline import Bounds, Pipeline
from service.pipeline.commits import COMMIT_AGAIN_S, FINAL_COMMITS_S
from tests.support import virtual_time
from tests.support.fakes import FakeBroker, FakeExtractor, FakeSink, FakeSource, partition

BOUNDS = Bounds(
    concurrency=4,
    window=16,
    window_bytes=1_000_000,
    ordering="key",
    attempts_max=3,
    call_deadline_s=60,
    commit_interval_s=0.5,
    drain_timeout_s=30,
    rebalance_drain_s=5,
)
SETTLED = GroupStatus(settled=True, broker_answers=True)


def decode(message: Message) -> str | Outcome:
    match message.value:
        case None:
            return Passed()
        case b"skip":
            return Skipped()
        case b"bad":
            return Rejected(Reason.UNDECODABLE, "not UTF-8")
        case value:
            return value.decode()


class Stage:
    """A pipeline on fakes; `show` runs it to the end of what the broker holds."""

    def __init__(self, partitions: int = 1, bounds: Bounds = BOUNDS) -> None:
        self.broker = FakeBroker(partitions)
        self.source = FakeSource(self.broker)
        self.extractor = FakeExtractor()
        self.sink = FakeSink(self.broker, ordering=bounds.ordering)
        self.once_too_large: set[int] = set()  # offsets; of whatever partition
        self.events: list[Event] = []
        self.bounds = bounds
        self.pipeline = self.new_pipeline()

    def new_pipeline(self, **more: Any) -> Pipeline:
        """With what a stage of another kind adds."""
        return Pipeline(
            self.source,
            self.extractor,
            self.sink,
            decode,
            self.bounds,
            observe=self.observe,
            uniform=lambda low, high: high,
            wall_clock=lambda: asyncio.get_running_loop().time(),
            **more,
        )

    def observe(self, event: Event) -> None:
        self.events.append(event)

    def show(self, act: Callable[[], Awaitable[None]] | None = None) -> bool:
        """Run until caught up; `act` happens beside it. What `run` says in the end."""

        async def play() -> bool:
            self.source.assign(self.pipeline)
            ends = {p: log.end for p, log in self.broker.logs.items()}
            async with asyncio.TaskGroup() as tasks:
                run = tasks.create_task(self.pipeline.run(None if act else ends))
                if act is not None:
                    await act()
                    self.pipeline.stop()
            return run.result()

        return virtual_time.run(play())

    def die(self, after_s: float) -> bool:
        """Live at most this long, as a process that is killed then, or by a deadly text: nothing
        more is stored. Whether it was a text."""

        async def play() -> bool:
            self.source.assign(self.pipeline)
            self.extractor.died = asyncio.Event()
            run = asyncio.create_task(self.pipeline.run())
            died = asyncio.create_task(self.extractor.died.wait())
            await asyncio.wait([run, died], timeout=after_s, return_when="FIRST_COMPLETED")
            if run.done():
                run.result()
            of_a_text = died.done()
            for task in (run, died):
                task.cancel()
            await asyncio.wait([run, died])
            return of_a_text

        of_a_text = virtual_time.run(play())
        self.sink.forget()
        self.pipeline = self.new_pipeline()
        return of_a_text

    def finished(self) -> list[Finished]:
        return [event for event in self.events if isinstance(event, Finished)]

    def rejected(self) -> list[Rejected]:
        return [o for _, o in self.broker.published if isinstance(o, Rejected)]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_everything_is_published_and_committed(stage: Stage) -> None:
    """Each message gets one outcome and the commit ends at the end."""
    for n in range(100):
        stage.broker.append(f"text {n}", key=str(n % 7))
    stage.show()
    assert sorted(stage.broker.texts()) == sorted(f"text {n}" for n in range(100))
    assert stage.broker.committed == {partition(): 100}
    assert len(stage.extractor.calls) == 100


def test_slots_bound_the_calls(stage: Stage) -> None:
    """Never more calls in flight than slots, and all slots are used."""
    for n in range(50):
        stage.broker.append(f"text {n}")
    stage.show()
    assert stage.extractor.in_flight_max == 4


@pytest.mark.parametrize(
    ("ordering", "expected"),
    [
        ("key", ["a2", "b0", "b1", "b3"]),
        ("partition", ["b0", "b1", "a2", "b3"]),
        ("none", ["b3", "a2", "b1", "b0"]),
    ],
)
def test_order_is_restored_lane_by_lane(ordering: str, expected: list[str]) -> None:
    """With answers that come in the reverse order, each ordering publishes as it promises."""
    stage = Stage(bounds=replace(BOUNDS, ordering=ordering))
    latencies = {"b0": 4.0, "b1": 3.0, "a2": 2.0, "b3": 1.0}
    for text in latencies:
        stage.broker.append(text, key=text[0])
    stage.extractor.latency_s = latencies.__getitem__
    stage.show()
    assert stage.broker.texts() == expected


def test_what_order_costs_is_told(stage: Stage) -> None:
    """A message that has its answer waits in its lane for the slow one before it, and says so."""
    stage.broker.append("slow", key="k")
    stage.broker.append("quick", key="k")
    stage.extractor.latency_s = {"slow": 2.0, "quick": 0.5}.__getitem__
    stage.show()
    assert [event.lane_wait_s for event in stage.finished()] == [0.0, pytest.approx(1.5)]


def test_a_slow_message_holds_only_its_slot_and_lane() -> None:
    """One call of an hour does not keep the others from being published."""
    stage = Stage(bounds=replace(BOUNDS, window=40))
    stage.broker.append("slow", key="s")
    for n in range(30):
        stage.broker.append(f"text {n}", key=str(n))
    stage.extractor.latency_s = lambda text: 3600.0 if text == "slow" else 0.1
    stage.show()
    assert stage.broker.texts()[-1] == "slow"
    quick = [event for event in stage.finished() if event.end_to_end_s < 10]
    assert len(quick) == 30


def test_holes_do_not_hold_the_commit(stage: Stage) -> None:
    """Markers and compacted offsets between and after the messages end caught up, lag 0."""
    log = stage.broker.logs[partition()]
    stage.broker.append("one")
    log.hole()
    stage.broker.append("two")
    log.hole()
    log.hole()
    stage.show()
    assert stage.broker.committed == {partition(): 5}


def test_what_needs_no_call_makes_none(stage: Stage) -> None:
    """Tombstones, skipped and undecodable messages are finished without a call."""
    stage.broker.logs[partition()].append(None, b"k")
    stage.broker.append("skip", key="k")
    stage.broker.append("bad", key="k")
    stage.show()
    assert stage.extractor.calls == []
    outcomes = sorted(event.outcome for event in stage.finished())
    assert outcomes == ["passed", "rejected", "skipped"]
    assert stage.broker.committed == {partition(): 3}


def test_a_transient_failure_is_tried_again_in_its_place(stage: Stage) -> None:
    """The retry keeps its place in the lane, and gets back what its first attempt had."""
    stage.broker.append("first", key="k")
    stage.broker.append("second", key="k")
    stage.extractor.scripts["first"] = [TransientFailure("timeout", progress="paid answer")]
    stage.show()
    assert stage.broker.texts() == ["first", "second"]
    assert stage.extractor.progress == [None, None, "paid answer"]


def test_a_waiting_retry_holds_no_slot() -> None:
    """With one slot, others are called while a message waits for its next attempt."""
    stage = Stage(bounds=replace(BOUNDS, concurrency=1))
    stage.broker.append("waits")
    stage.broker.append("goes on")
    stage.extractor.scripts["waits"] = [TransientFailure("rate_limited", retry_after_s=None)]
    started: list[float] = []

    def latency(text: str) -> float:
        started.append(asyncio.get_running_loop().time())
        return 0.1

    stage.extractor.latency_s = latency
    stage.show()
    assert stage.extractor.calls == ["waits", "goes on", "waits"]
    assert started == pytest.approx([0.0, 0.1, 0.6], abs=0.01)


def test_retry_after_is_waited_by_all(stage: Stage) -> None:
    """After a Retry-After of 10 s no call starts for 10 s, whichever message it is for."""
    started: dict[str, float] = {}

    def latency(text: str) -> float:
        started[text] = asyncio.get_running_loop().time()
        return 0.1

    stage.extractor.latency_s = latency
    stage.extractor.scripts["t0"] = [TransientFailure("rate_limited", retry_after_s=10.0)]
    for n in range(8):
        stage.broker.append(f"t{n}")
    stage.show()
    assert all(at < 0.2 or at >= 10.0 for at in started.values())
    assert sum(at >= 10.0 for at in started.values()) >= 4


def test_poison_is_rejected_while_others_succeed(stage: Stage) -> None:
    """A message that keeps failing while others succeed is rejected as exhausted."""
    stage.extractor.scripts["poison"] = [TransientFailure("server_error") for _ in range(9)]
    stage.broker.append("poison")
    for n in range(400):
        stage.broker.append(f"text {n}")
    stage.show()
    [rejected] = stage.rejected()
    assert (rejected.reason, rejected.attempts) == (Reason.EXHAUSTED, 3)
    assert stage.extractor.calls.count("poison") == 3


def test_what_holds_the_source_up_is_said(stage: Stage) -> None:
    """The source's problem is a reason for not being ready, and goes with it."""
    troubled = GroupStatus(settled=True, broker_answers=True, problem="no topic texts")

    async def look() -> None:
        await asyncio.sleep(1)
        assert stage.pipeline.status(troubled).not_ready == ("no topic texts",)
        assert stage.pipeline.status(SETTLED).not_ready == ()

    stage.show(look)


def test_an_outage_rejects_nothing(stage: Stage) -> None:
    """When every call fails for an hour, nothing is rejected and nothing committed meanwhile."""
    for n in range(40):
        stage.broker.append(f"text {n}")
    stage.extractor.always = TransientFailure("connection")

    async def outage() -> None:
        await asyncio.sleep(3600)
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_PROVIDER
        assert stage.pipeline.status(SETTLED).not_ready
        assert not any(stage.broker.committed.values())
        calls = len(stage.extractor.calls)
        assert calls < 400, f"{calls} calls to a dead provider in an hour"
        stage.extractor.always = None
        await asyncio.sleep(60)
        assert stage.pipeline.status(SETTLED).not_ready == ()

    stage.show(outage)
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 40}


def test_poison_alone_does_not_keep_the_others_out(stage: Stage) -> None:
    """Messages that always fail open the circuit; a probe shows that it is not the provider, and
    they are rejected: others that come later get through."""
    for n in range(2):
        stage.broker.append(f"poison {n}")
        stage.extractor.scripts[f"poison {n}"] = [TransientFailure("server_error")] * 999
    stage.extractor.probe_fails = TransientFailure("connection")

    async def later() -> None:
        await asyncio.sleep(3600)
        assert stage.rejected() == [], "nothing has shown that the provider is there"
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_PROVIDER
        stage.extractor.probe_fails = None
        await asyncio.sleep(60)
        assert len(stage.rejected()) == 2
        for n in range(20):
            stage.broker.append(f"text {n}")
        await asyncio.sleep(600)

    stage.show(later)
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.EXHAUSTED] * 2
    assert stage.broker.committed == {partition(): 22}


def test_an_outage_takes_in_little(stage: Stage) -> None:
    """While the circuit is open nothing is taken, and nothing goes out but one try at a time: two
    probes, then a message that waits."""
    stage.broker.append("first")
    stage.extractor.always = TransientFailure("connection")

    async def outage() -> None:
        await asyncio.sleep(600)
        for n in range(100):
            stage.broker.append(f"text {n}")
        await asyncio.sleep(60)
        assert stage.pipeline.status(SETTLED).window_messages == 1
        calls, probes = len(stage.extractor.calls), stage.extractor.probes
        await asyncio.sleep(3600)
        assert stage.pipeline.status(SETTLED).window_messages == 1
        tries = len(stage.extractor.calls) - calls
        assert 250 < tries + stage.extractor.probes - probes < 400
        assert 2 * tries - 2 <= stage.extractor.probes - probes <= 2 * tries + 2
        stage.pipeline.force()

    stage.show(outage)
    assert stage.extractor.in_flight_max == 1


def test_a_quota_rejects_nothing_and_is_used() -> None:
    """Under a hidden quota of 10 calls a second nothing is rejected, no message is tried more
    than ten times, and the quota is used to nine tenths."""
    stage = Stage(bounds=replace(BOUNDS, concurrency=50, window=200))
    for n in range(1000):
        stage.broker.append(f"text {n}")
    bucket, refilled_s = 10.0, 0.0

    def refuse(text: str) -> float:
        nonlocal bucket, refilled_s
        now_s = asyncio.get_running_loop().time()
        bucket, refilled_s = min(10.0, bucket + (now_s - refilled_s) * 10), now_s
        if bucket < 1:
            wait_s = (1 - bucket) / 10
            stage.extractor.scripts[text] = [TransientFailure("rate_limited", retry_after_s=wait_s)]
            return 0.01
        bucket -= 1
        return 0.3

    stage.extractor.latency_s = refuse
    ended_s = 0.0

    async def wait() -> None:
        nonlocal ended_s
        while stage.broker.committed.get(partition(), 0) < 1000:
            await asyncio.sleep(0.5)
        ended_s = asyncio.get_running_loop().time()

    stage.show(wait)
    assert stage.rejected() == []
    assert max(Counter(stage.extractor.calls).values()) <= 10
    assert ended_s < 1000 / 10 / 0.9


def test_a_service_failure_stops_intake_at_once_and_heals(stage: Stage) -> None:
    """With refused credentials only probes are sent; mended, everything goes through."""
    for n in range(200):
        stage.broker.append(f"text {n}")
    stage.extractor.always = ServiceFailure("unauthorized", remedy="check OPENAI_API_KEY")

    async def mend() -> None:
        await asyncio.sleep(300)
        assert any("OPENAI_API_KEY" in s for s in stage.pipeline.status(SETTLED).not_ready)
        assert len(stage.extractor.calls) < 40
        stage.extractor.always = None
        await asyncio.sleep(120)

    stage.show(mend)
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 200}


def test_a_failed_send_is_sent_again_in_order(stage: Stage) -> None:
    """After a failed send the lane stops; everything lands in order, committed only then."""
    for n in range(6):
        stage.broker.append(f"text {n}", key="k")
    stage.sink.failures[2] = [PublishFailed(), PublishFailed()]
    stage.show()
    assert stage.broker.outcomes() == list(range(6))
    assert stage.broker.committed == {partition(): 6}


def test_a_lane_is_handed_over_by_one_task(stage: Stage) -> None:
    """While the sink makes one outcome wait, the next of its lane does not pass it."""
    stage.broker.append("first", key="k")
    stage.broker.append("second", key="k")
    stage.extractor.latency_s = lambda text: 0.1 if text == "first" else 0.5
    stage.sink.buffer_s = 1.0

    async def free() -> None:
        await asyncio.sleep(0.3)
        stage.sink.buffer_s = 0.0
        await asyncio.sleep(5)

    stage.show(free)
    assert stage.sink.handed == [0, 1]


def test_a_lane_rests_after_a_failed_send(stage: Stage) -> None:
    """An answer that comes meanwhile does not make the lane try again before its time."""
    stage.broker.append("first", key="k")
    stage.broker.append("second", key="k")
    stage.extractor.latency_s = lambda text: 0.1 if text == "first" else 0.3
    stage.sink.failures[0] = [PublishFailed()]

    async def look() -> None:
        await asyncio.sleep(0.5)
        assert stage.sink.handed == [0]
        await asyncio.sleep(5)

    stage.show(look)
    assert stage.sink.handed == [0, 0, 1]


def test_an_output_too_large_becomes_a_dead_letter(stage: Stage) -> None:
    """Only the guilty message is rejected, once, without another call."""
    stage.broker.append("large", key="k")
    stage.broker.append("small", key="k")
    stage.sink.failures[0] = [OutputTooLarge()]
    stage.show()
    [rejected] = stage.rejected()
    assert rejected.reason is Reason.OUTPUT_TOO_LARGE
    assert stage.broker.texts() == ["small"]
    assert sorted(stage.extractor.calls) == ["large", "small"]


def test_a_tombstone_too_large_becomes_a_dead_letter(stage: Stage) -> None:
    """A tombstone that the output topic does not take (its key, its headers) holds nothing up."""
    stage.broker.logs[partition()].append(None, b"k")
    stage.sink.failures[0] = [OutputTooLarge()]
    stage.show()
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.OUTPUT_TOO_LARGE]
    assert stage.broker.committed == {partition(): 1}


def test_a_dead_letter_that_cannot_be_published_holds_its_offset(stage: Stage) -> None:
    """While sends fail, the offset stays; nothing is dropped, and it goes on when they work."""
    stage.broker.append("bad")
    stage.sink.down = True

    async def later() -> None:
        await asyncio.sleep(600)
        assert stage.broker.committed.get(partition(), 0) == 0
        stage.sink.down = False
        await asyncio.sleep(60)

    stage.show(later)
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.UNDECODABLE]
    assert stage.broker.committed == {partition(): 1}


def test_the_window_bounds_what_is_taken(stage: Stage) -> None:
    """With calls that never end, no more than the window is taken and polling goes on."""
    for n in range(100):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda _: 1e9

    async def look() -> None:
        await asyncio.sleep(100)
        status = stage.pipeline.status(SETTLED)
        assert (status.window_messages, status.slots_busy, status.queued) == (16, 4, 12)
        polls = len(stage.source.polls)
        await asyncio.sleep(100)
        assert len(stage.source.polls) - polls > 50
        stage.pipeline.force()

    stage.show(look)


def test_waiting_retries_stay_within_the_window(stage: Stage) -> None:
    """Messages that fail while others succeed fill the window, which then takes nothing."""
    for n in range(80):
        stage.broker.append(f"text {n}")
        if n % 2:
            stage.extractor.scripts[f"text {n}"] = [TransientFailure("overloaded")] * 6
    largest = retrying = 0

    async def look() -> None:
        nonlocal largest, retrying
        while stage.broker.committed.get(partition(), 0) < 80:
            await asyncio.sleep(0.5)
            assert asyncio.get_running_loop().time() < 3600
            status = stage.pipeline.status(SETTLED)
            retrying = max(retrying, status.retrying)
            largest = max(largest, status.window_messages)

    stage.show(look)
    assert retrying > 4
    assert largest == BOUNDS.window


def test_window_bytes_bound_what_is_taken() -> None:
    """Intake stops once the bytes are reached; one poll may overshoot."""
    stage = Stage(bounds=replace(BOUNDS, window=1000, window_bytes=500))
    for n in range(3000):
        stage.broker.append(f"text {n:05}")
    stage.show()
    assert stage.broker.committed == {partition(): 3000}
    assert max(stage.source.polls) <= 1000
    taken = [event.messages for event in stage.events if type(event).__name__ == "Taken"]
    assert len(taken) <= 4


def test_a_crowded_map_closes_its_partition_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a slow message no more is taken than its map can hold; once it is done, all comes."""
    monkeypatch.setattr("service.core.window.MAP_FULL", 1e-6)  # by the first that finishes
    stage = Stage(partitions=2, bounds=replace(BOUNDS, window=100))
    stage.broker.append("slow", number=0)
    for n in range(200):
        stage.broker.append(f"text {n}", number=0)
        stage.broker.append(f"other {n}", number=1)
    stage.extractor.latency_s = lambda text: 300.0 if text == "slow" else 0.1

    async def look() -> None:
        await asyncio.sleep(200)
        calls = Counter(text.split()[0] for text in stage.extractor.calls)
        assert calls["other"] == 200
        assert calls["text"] <= 100
        await asyncio.sleep(200)

    stage.show(look)
    assert stage.broker.committed == {partition(0): 201, partition(1): 200}


def test_stop_lets_go_of_what_costs_nothing(stage: Stage) -> None:
    """A stop finishes the calls in flight, makes no new ones, and commits behind them."""
    for n in range(100):
        stage.broker.append(f"text {n}", key=str(n))
    stage.extractor.latency_s = lambda _: 10.0

    async def stop() -> None:
        await asyncio.sleep(5)

    stage.show(stop)
    assert sorted(stage.broker.outcomes()) == [0, 1, 2, 3]
    assert stage.broker.committed == {partition(): 4}
    assert len(stage.extractor.calls) == 4
    assert not [event for event in stage.events if isinstance(event, Abandoned)]


def test_what_a_poll_brings_after_the_stop_is_not_taken(stage: Stage) -> None:
    """A message that was let go leaves its place in the lane: one of the same key that came in
    behind it would be called, paid for, and wait for its turn until the drain's deadline."""
    for n in range(4):
        stage.broker.append(f"slow {n}", key=str(n))
    stage.broker.append("let go", key="k")
    stage.extractor.latency_s = lambda _: 5.0

    async def stop() -> None:
        await asyncio.sleep(1.1)  # a poll is waiting
        stage.pipeline.stop()
        await asyncio.sleep(0.01)
        stage.broker.append("came late", key="k")
        stage.broker.append("came late too", key="0")

    stage.show(stop)
    assert stage.extractor.calls == [f"slow {n}" for n in range(4)]
    assert stage.broker.committed == {partition(): 4}
    assert not [event for event in stage.events if isinstance(event, Abandoned)]


def test_stop_waits_for_acknowledgements(stage: Stage) -> None:
    """What was handed to the producer is not left to chance: it is committed in the end."""
    stage.broker.append("text")
    stage.sink.ack_s = 10.0

    async def stop() -> None:
        await asyncio.sleep(1)

    assert stage.show(stop)
    assert stage.broker.published
    assert stage.broker.committed == {partition(): 1}


def test_stop_does_not_wait_for_a_retry_that_the_map_steps_over(stage: Stage) -> None:
    """Finished messages of other lanes behind it are stored with it, so that none is repeated."""
    stage.extractor.scripts["text 0"] = [TransientFailure("timeout", retry_after_s=8.0)]
    for n in range(4):
        stage.broker.append(f"text {n}", key=str(n))
    ended_s = 0.0

    async def stop() -> None:
        nonlocal ended_s
        await asyncio.sleep(2)
        stage.pipeline.stop()
        await asyncio.sleep(1)
        ended_s = asyncio.get_running_loop().time()

    stage.show(stop)
    assert ended_s == 3
    assert stage.broker.stored == {partition(): Progress(0, runs=(1, 3))}
    stage.pipeline = stage.new_pipeline()
    stage.show()
    assert stage.broker.committed == {partition(): 4}
    assert stage.extractor.calls == [*(f"text {n}" for n in range(4)), "text 0"]


def test_stop_finishes_a_retry_that_paid_answers_of_its_lane_wait_for(stage: Stage) -> None:
    """They could not be published before it, and would be paid for again."""
    stage.extractor.scripts["text 0"] = [TransientFailure("timeout", retry_after_s=8.0)]
    for n in range(4):
        stage.broker.append(f"text {n}", key="k")

    async def stop() -> None:
        await asyncio.sleep(2)

    stage.show(stop)
    assert stage.broker.committed == {partition(): 4}
    assert len(stage.extractor.calls) == 5


def test_a_drain_goes_on_polling_and_takes_nothing(stage: Stage) -> None:
    """A member that stopped polling would not hear of a rebalance, and hold its partitions."""
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 25.0

    async def stop() -> None:
        await asyncio.sleep(1)
        stage.pipeline.stop()
        stage.broker.append("later")
        before = len(stage.source.polls)
        await asyncio.sleep(20)
        assert set(stage.source.polls[before:]) == {0}
        assert len(stage.source.polls) - before > 10

    stage.show(stop)
    assert stage.extractor.calls == ["slow"]
    assert stage.broker.committed == {partition(): 1}


def test_a_drain_ends_at_its_deadline(stage: Stage) -> None:
    """A call that never returns is called off at the deadline and counted as abandoned."""
    stage.broker.append("quick")
    stage.broker.append("hangs")
    stage.extractor.latency_s = lambda text: 1e9 if text == "hangs" else 0.1
    ended = 0.0

    async def stop() -> None:
        nonlocal ended
        await asyncio.sleep(1)
        stage.pipeline.stop()
        await asyncio.sleep(31)
        ended = asyncio.get_running_loop().time()

    stage.show(stop)
    assert stage.extractor.cancelled == ["hangs"]
    assert [e.calls for e in stage.events if isinstance(e, Abandoned)] == [1]
    assert stage.broker.committed == {partition(): 1}


def test_force_ends_a_drain_at_once(stage: Stage) -> None:
    """A second signal abandons what is in flight, and still commits what is finished."""
    stage.broker.append("quick")
    stage.broker.append("hangs")
    stage.extractor.latency_s = lambda text: 1e9 if text == "hangs" else 0.1

    async def stop() -> None:
        await asyncio.sleep(0.2)
        stage.pipeline.stop()
        await asyncio.sleep(0.1)
        stage.pipeline.force()
        await asyncio.sleep(0.1)
        assert stage.broker.committed == {partition(): 1}

    stage.show(stop)


def test_a_refused_commit_is_made_good(stage: Stage) -> None:
    """Refused commits, the last one included, are tried again before the run ends."""
    for n in range(20):
        stage.broker.append(f"text {n}")
    stage.source.refuse_commits = 4
    assert stage.show()
    assert stage.broker.committed == {partition(): 20}


def test_a_last_commit_that_fails_is_said(stage: Stage) -> None:
    """A run whose commits are refused to the end says so, as its exit code will."""
    stage.broker.append("text")
    stage.source.refuse_commits = 1000
    assert not stage.show()
    assert stage.broker.committed == {}


@pytest.mark.parametrize("interval_s", [0.5, 300.0])
def test_last_commits_do_not_wait_for_the_commit_interval(interval_s: float) -> None:
    """A stop whose commits are refused to the end takes seconds, whatever the interval is; one
    that is refused twice is made good."""
    for refused, committed in ((1000, False), (2, True)):
        stage = Stage(bounds=replace(BOUNDS, commit_interval_s=interval_s))
        stage.broker.append("text")
        assert stopped_after_s(stage, stage.pipeline.stop, refused) <= FINAL_COMMITS_S
        assert stage.broker.committed == ({partition(): 1} if committed else {})


def test_a_forced_stop_tries_one_commit_and_does_not_wait(stage: Stage) -> None:
    """A second signal asks for the end at once."""
    stage.broker.append("text")
    assert stopped_after_s(stage, stage.pipeline.force, refused=1000) == 0


def test_a_second_signal_ends_the_last_commits(stage: Stage) -> None:
    """Whoever forces a stop between two of them is not made to wait for the rest."""
    stage.broker.append("text")

    def stop_and_force() -> None:
        stage.pipeline.stop()
        asyncio.get_running_loop().call_later(COMMIT_AGAIN_S / 2, stage.pipeline.force)

    assert stopped_after_s(stage, stop_and_force, refused=1000) == COMMIT_AGAIN_S / 2


def test_last_commits_that_nobody_answers_are_bounded(stage: Stage) -> None:
    """A coordinator that hangs costs the source's own bound twice at the most."""
    stage.broker.append("text")

    async def nobody() -> None:
        await asyncio.sleep(5.0)
        raise CommitFailed("no answer")

    stage.source.before_storing = nobody
    assert stopped_after_s(stage, stage.pipeline.stop, refused=0) <= FINAL_COMMITS_S + 5.0


def stopped_after_s(stage: Stage, stop: Callable[[], None], refused: int) -> float:
    """How long a stop takes at which nothing is in flight and so many commits are refused."""

    async def play() -> float:
        stage.source.refuse_commits = 1000
        stage.source.assign(stage.pipeline)
        run = asyncio.create_task(stage.pipeline.run())
        await asyncio.sleep(10)
        stage.source.refuse_commits = refused
        stop()
        await run
        return asyncio.get_running_loop().time() - 10

    return round(virtual_time.run(play()), 1)


def test_a_bug_ends_the_run_uncommitted(stage: Stage) -> None:
    """An unexpected exception ends the run with its offset uncommitted."""
    stage.broker.append("fine")
    stage.broker.append("boom")
    stage.extractor.scripts["boom"] = [RuntimeError("bug")]
    with pytest.raises(ExceptionGroup) as caught:
        stage.show()
    assert caught.group_contains(RuntimeError, match="bug")
    assert stage.broker.committed.get(partition(), 0) <= 1


def test_nothing_is_started_in_the_moment_in_which_a_bug_ends_the_run(stage: Stage) -> None:
    """Between the failure and the run's end timers and answers still come: what they would start
    is not born, none of it is left unawaited, and the bug is all that the run ends with."""
    stage.broker.append("text 0")
    stage.extractor.scripts["text 0"] = [RuntimeError("bug")]
    told: list[object] = []

    async def act() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))

        def taken(turn: int) -> None:
            """A message that needs no call: a task hands it over, as one does behind a timer."""
            epoch = stage.source.epochs[partition()]
            late = Message(partition(), turn, epoch, None, b"bad", (), 0)
            stage.pipeline._intake._take(Batch((late,)))
            if turn < 20:
                loop.call_soon(taken, turn + 1)

        loop.call_at(0.1, taken, 1)
        await asyncio.sleep(10)

    with pytest.raises(ExceptionGroup) as caught:
        stage.show(act)
    assert caught.group_contains(RuntimeError, match="bug")
    gc.collect()
    assert told == []
    assert stage.pipeline._admission.busy == 0


def test_a_bug_in_a_callback_ends_the_run(stage: Stage) -> None:
    """An acknowledgement that brings what nobody foresaw is not swallowed by the event loop."""
    stage.broker.append("fine")
    stage.sink.failures[0] = [RuntimeError("bug")]
    with pytest.raises(ExceptionGroup) as caught:
        stage.show()
    assert caught.group_contains(RuntimeError, match="bug")
    assert stage.broker.committed.get(partition(), 0) == 0


def test_a_bug_ends_the_run_with_backlog_in_order(stage: Stage) -> None:
    """When the run ends by a bug no further call starts, nothing else fails, and it is told."""
    for n in range(40):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda text: 0.1 if text == "text 0" else 5.0
    stage.extractor.scripts["text 0"] = [RuntimeError("bug")]
    unheard: list[dict[str, object]] = []

    async def hear() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unheard.append(context))
        await asyncio.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        stage.show(hear)
    assert unheard == []
    [run] = caught.value.exceptions
    assert isinstance(run, ExceptionGroup)
    assert [str(each) for each in run.exceptions] == ["bug"]
    assert len(stage.extractor.calls) == 4


@pytest.mark.parametrize("where", ["call", "publish", "poll", "commit"])
def test_a_cancellation_from_within_ends_the_run(stage: Stage, where: str) -> None:
    """A library that raises its own cancellation does not end a task unnoticed."""
    for n in range(2):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda text: 5.0 if text == "text 1" else 0.1

    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    owners = {"call": stage.extractor, "publish": stage.sink}
    setattr(owners.get(where, stage.source), where, cancelled)
    with pytest.raises(ExceptionGroup) as caught:
        stage.show()
    assert caught.group_contains(RuntimeError, match="not by us")
    assert stage.broker.committed.get(partition(), 0) == 0


def test_states_tell_idle_running_and_kafka_apart(stage: Stage) -> None:
    """The state is one word for what is going on."""

    async def look() -> None:
        await asyncio.sleep(1)
        assert stage.pipeline.status(SETTLED).state is State.IDLE
        stage.extractor.latency_s = lambda _: 5.0
        stage.broker.append("text")
        await asyncio.sleep(2)
        assert stage.pipeline.status(SETTLED).state is State.RUNNING
        stage.sink.ack_s = 30.0
        await asyncio.sleep(10)
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_KAFKA
        assert stage.pipeline.status(GroupStatus()).state is State.WAITING_FOR_KAFKA
        await asyncio.sleep(30)

    stage.show(look)


@pytest.mark.parametrize(("free", "full"), [(25, False), (24, True), (0, True)])
def test_the_window_is_full_when_less_is_free_than_is_polled_for(free: int, full: bool) -> None:
    """Of 200 places an eighth has to be free; one rule for the poll and for the metric."""
    assert replace(BOUNDS, window=200).room_worth_a_poll(free) is not full
