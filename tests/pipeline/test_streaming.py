"""Records that go out while the model writes, under virtual time: what is closed, what is not."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from service.core.errors import PublishFailed, TransientFailure
from service.core.events import Finished, Streamed
from service.core.messages import Aborted, Extracted, Part, Publishable, Reason, Rejected
from service.core.status import State
from service.pipeline import Pipeline
from service.pipeline.record_stream import UNACKNOWLEDGED_MAX
from service.pipeline.streaming import CLOSE_S
from service.ports import Publish
from tests.chaos.reader import first_complete_sets
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import FakeStreams, partition


class Streaming(Stage):
    """A stage whose model is streamed."""

    def __init__(self, records: int = 4, record_s: float = 1.0) -> None:
        self.streams = FakeStreams(records, record_s)
        super().__init__(bounds=replace(BOUNDS, ordering="none"))
        self.sink.streaming = True

    def new_pipeline(self, **more: Any) -> Pipeline:
        return super().new_pipeline(streams=self.streams, **more)

    @property
    def published(self) -> list[Publishable]:
        return [outcome for _, outcome in self.broker.published]

    def kinds(self) -> list[str]:
        return [_kind(each) for each in self.published]

    def sets(self) -> list[list[str]]:
        """What a reader keeps."""
        read = [each for n, piece in enumerate(self.published) for each in _read(n, piece)]
        return [[each.text for each in found] for found in first_complete_sets(read)]


def _kind(piece: Publishable) -> str:
    match piece:
        case Part(index=index):
            return str(index)
        case Extracted(records=()):
            return "end"
        case Extracted():
            return "last"
        case Aborted(records=records):
            return f"aborted {records}"
        case _:
            return "letter"


@dataclass
class Read:
    header: dict[str, str]
    text: str = ""


def _read(number: int, piece: Publishable) -> list[Read]:
    match piece:
        case Part(record, index, answer):
            return [Read(_header(answer, str(index)), record.json.decode())]
        case Extracted((record,), _, answer, earlier):
            count = {"sluice.record.count": str(earlier + 1)}
            return [Read(_header(answer, str(earlier)) | count, record.json.decode())]
        case Aborted(answer, records):
            marked = {"sluice.record.aborted": str(records)}
            return [Read(_header(answer, "aborted") | marked)]
        case _:
            return []


def _header(answer: str, index: str) -> dict[str, str]:
    return {
        "sluice.id": f"{answer.split()[0]}:{index}",
        "sluice.answer.id": answer,
        "sluice.record.index": index,
    }


@pytest.fixture
def stage() -> Streaming:
    return Streaming()


def test_records_are_out_before_the_call_has_ended(stage: Streaming) -> None:
    """Each record lands a moment after it was written; the message finishes behind the last."""
    stage.broker.append("a")

    async def look() -> None:
        await asyncio.sleep(2.5)
        assert stage.kinds() == ["0", "1"]
        assert stage.finished() == []
        assert stage.broker.committed == {}
        await asyncio.sleep(10)

    stage.show(look)
    assert stage.kinds() == ["0", "1", "2", "last", "end"]
    assert stage.sets() == [["a 1 0", "a 1 1", "a 1 2", "a 1 3"]]
    assert stage.broker.committed == {partition(): 1}
    told = [event for event in stage.events if isinstance(event, Streamed)]
    assert sum(event.records for event in told) == 4
    assert [event.first_after_s for event in told] == [pytest.approx(1, abs=0.1), None, None, None]
    assert [event.records for event in stage.events if isinstance(event, Finished)] == [0]


def test_an_empty_list_publishes_nothing() -> None:
    """The message finishes, and readers see as much of it as without streaming."""
    stage = Streaming(records=0)
    stage.broker.append("a")
    stage.show()
    assert stage.kinds() == ["end"]
    assert stage.broker.committed == {partition(): 1}


def test_a_failure_half_way_closes_the_set_and_tries_anew(stage: Streaming) -> None:
    """The marker says how many went out; the next attempt has another id, and is kept."""
    stage.broker.append("a")
    stage.streams.breaks = [(2, TransientFailure("connection"))]
    stage.show()
    assert stage.kinds() == ["0", "1", "aborted 2", "0", "1", "2", "last", "end"]
    assert stage.sets() == [["a 2 0", "a 2 1", "a 2 2", "a 2 3"]]
    assert stage.rejected() == []


def test_a_marker_counts_what_has_landed(stage: Streaming) -> None:
    """Where acknowledgements take longer than the model, the marker waits for them."""
    stage.broker.append("a")
    stage.sink.ack_s = 7.0
    stage.streams.breaks = [(2, TransientFailure("connection"))]
    stage.show()
    assert stage.kinds()[:3] == ["0", "1", "aborted 2"]


def test_a_failure_before_the_first_record_needs_no_marker(stage: Streaming) -> None:
    """Nothing is closed that was never begun."""
    stage.broker.append("a")
    stage.streams.breaks = [(0, TransientFailure("connection"))]
    stage.show()
    assert stage.kinds() == ["0", "1", "2", "last", "end"]


def test_a_re_ask_closes_the_answer_before(stage: Streaming) -> None:
    """What the first answer has published is closed before the second answer's first record."""
    stage.broker.append("a")
    stage.streams.breaks = [(3, None)]
    stage.show()
    assert stage.kinds()[:5] == ["0", "1", "2", "aborted 3", "0"]
    assert stage.sets() == [["a 2 0", "a 2 1", "a 2 2", "a 2 3"]]


def test_a_rejected_message_says_how_many_went_out(stage: Streaming) -> None:
    """Over all its answers; marker and records stand before the dead letter."""
    stage.broker.append("a")
    stage.streams.breaks = [
        (1, TransientFailure("connection")),
        (2, None),
        (1, Rejected(Reason.INVALID, "no")),
    ]
    stage.show()
    assert stage.kinds() == ["0", "aborted 1", "0", "1", "aborted 2", "0", "aborted 1", "letter"]
    [rejected] = stage.rejected()
    assert rejected.records_out == 4
    assert stage.sets() == []
    assert stage.broker.committed == {partition(): 1}


def test_an_exhausted_message_says_it_too(stage: Streaming) -> None:
    """One that keeps failing half way while others succeed ends with all its sets closed."""
    stage.broker.append("a")

    async def others() -> None:
        for _ in range(6):
            await asyncio.sleep(8)
            stage.broker.append("b")

    original = stage.streams.stream

    async def stream(text: str, progress: object, publish: object) -> Extracted | Rejected:
        if text == "a":
            stage.streams.breaks.append((1, TransientFailure("server_error")))
        return await original(text, progress, publish)  # type: ignore[arg-type]

    stage.streams.stream = stream  # type: ignore[method-assign]
    stage.show(others)
    [rejected] = stage.rejected()
    assert rejected.reason == Reason.EXHAUSTED
    assert rejected.records_out == stage.kinds().count("aborted 1") >= 3


@pytest.mark.parametrize("known", [True, False])
def test_a_record_too_large_ends_the_answer(stage: Streaming, known: bool) -> None:
    """Of the last record as of any: the set is closed and the message rejected."""
    stage.sink.record_max_bytes, stage.sink.limit_known = len("a 1 0"), known
    stage.broker.append("a")
    stage.streams.records = 12  # "a 1 10" is longer
    stage.show()
    assert stage.kinds() == [*map(str, range(10)), "aborted 10", "letter"]
    [rejected] = stage.rejected()
    assert (rejected.reason, rejected.records_out) == (Reason.OUTPUT_TOO_LARGE, 10)


def test_a_last_record_too_large_leaves_no_whole_set(stage: Streaming) -> None:
    """The message is rejected, as one whose earlier record was."""
    stage.sink.record_max_bytes = len("a 1 0")
    stage.broker.append("a")
    stage.streams.records = 11
    stage.show()
    assert stage.kinds() == [*map(str, range(10)), "aborted 10", "letter"]
    assert stage.sets() == []


def test_what_is_not_acknowledged_is_sent_again(stage: Streaming) -> None:
    """A send that fails or is unknown goes again; the message waits for all of it."""
    stage.broker.append("a")
    stage.sink.failures[0] = [PublishFailed(), PublishFailed()]
    unheard = iter([False, True])
    stage.sink.loses_acknowledgement = lambda: next(unheard, False)
    stage.show()
    assert stage.sets() == [["a 1 0", "a 1 1", "a 1 2", "a 1 3"]]
    assert stage.broker.committed == {partition(): 1}


def test_back_pressure() -> None:
    """While Kafka acknowledges nothing, a bounded number of records is out and the model's answer
    waits; that is Kafka's time, and no overdue call."""
    stage = Streaming(records=10 * UNACKNOWLEDGED_MAX, record_s=0.01)
    stage.broker.append("a")
    stage.sink.ack_s = 500.0

    async def look() -> None:
        await asyncio.sleep(400)
        assert len(stage.sink.handed) == UNACKNOWLEDGED_MAX + 1
        status = stage.pipeline.status(SETTLED)
        assert status.state is State.WAITING_FOR_KAFKA
        assert status.call_overdue_s == 0
        stage.sink.ack_s = 0.01
        await asyncio.sleep(400)

    stage.show(look)
    assert len(stage.sets()[0]) == 10 * UNACKNOWLEDGED_MAX


def lost(act: Callable[[Streaming], Awaitable[None]], stage: Streaming) -> None:
    """The partition goes while the second of four records has landed."""

    async def lose() -> None:
        await asyncio.sleep(2.5)
        await act(stage)
        await asyncio.sleep(30)

    stage.show(lose)


def test_a_lost_partition_gets_nothing_more() -> None:
    """Neither a late record nor a marker comes after the assignment; the set never closes, and
    the reader keeps the one that the next holder publishes."""
    stage = Streaming(records=20)
    stage.broker.append("a")

    async def rebalance(stage: Streaming) -> None:
        await stage.source.revoke()
        before = len(stage.published)
        await asyncio.sleep(3)
        assert len(stage.published) == before, "published while nobody knew whose it was"
        stage.source.hold(fresh={partition()})

    lost(rebalance, stage)
    assert stage.streams.cancelled == 1
    answers = [each.answer_id for each in stage.published if isinstance(each, Part)]
    assert answers == sorted(answers), "a late record of the answer before"
    assert not any(isinstance(each, Aborted) for each in stage.published)
    assert stage.sets() == [[f"a 2 {n}" for n in range(20)]]


def test_a_kept_partition_goes_on_in_the_middle() -> None:
    """What waited for the assignment goes out under the same answer id."""
    stage = Streaming(records=20)
    stage.broker.append("a")

    async def rebalance(stage: Streaming) -> None:
        await stage.source.revoke()
        await asyncio.sleep(3)
        stage.source.hold(keep={partition()})

    lost(rebalance, stage)
    assert stage.sets() == [[f"a 1 {n}" for n in range(20)]]


def test_no_marker_for_a_lost_partition() -> None:
    """An answer that fails between revoke and assignment is not closed by who lost it."""
    stage = Streaming(records=20)
    stage.streams.breaks = [(8, TransientFailure("connection"))]
    stage.broker.append("a")

    async def rebalance(stage: Streaming) -> None:
        await stage.source.revoke()  # five seconds later the sixth record waits
        stage.source.hold()
        assert stage.kinds() == [str(n) for n in range(7)]

    lost(rebalance, stage)
    assert not any(isinstance(each, Aborted) for each in stage.published)


def test_a_drain_lets_an_answer_end(stage: Streaming) -> None:
    """A stop in the middle waits for the rest of the answer."""
    stage.broker.append("a")

    async def soon() -> None:
        await asyncio.sleep(1.5)

    assert stage.show(soon)
    assert stage.sets() == [["a 1 0", "a 1 1", "a 1 2", "a 1 3"]]
    assert stage.broker.committed == {partition(): 1}


def test_a_drain_that_ends_too_early_closes_nothing() -> None:
    """What is cut off stays unfinished: it is asked again, and the half set is dropped."""
    stage = Streaming(records=100)
    stage.broker.append("a")

    async def soon() -> None:
        await asyncio.sleep(1.5)

    stage.show(soon)
    assert "last" not in stage.kinds()
    assert not any(isinstance(each, Aborted) for each in stage.published)
    assert stage.broker.committed == {}
    assert stage.sets() == []


def test_a_death_in_the_middle_costs_a_repeat() -> None:
    """Killed half way, the message is asked again and a reader sees one whole set."""
    stage = Streaming()
    stage.broker.append("a")
    stage.die(after_s=2.5)
    stage.show()
    assert stage.sets() == [["a 2 0", "a 2 1", "a 2 2", "a 2 3"]]


class Overstaying(Streaming):
    """Messages `b…` write one record in 0.1 s; "a" writes one each second, and is too slow."""

    def __init__(self) -> None:
        super().__init__(records=30, record_s=1.0)
        self.bounds = replace(self.bounds, message_timeout_s=5.5)
        self.sink.ack_s = 0.001
        self.others = FakeStreams(records=1, record_s=0.1)
        self.pipeline = self.new_pipeline()

    def new_pipeline(self, **more: Any) -> Pipeline:
        return Stage.new_pipeline(self, streams=self, **more)

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        streams = self.streams if text == "a" else self.others
        return await streams.stream(text, progress, publish)

    async def keep_busy(self, seconds: int) -> None:
        for n in range(seconds):
            self.broker.append(f"b{n}")
            await asyncio.sleep(1)

    def of_a(self) -> list[Publishable]:
        return [outcome for message, outcome in self.broker.published if message.value == b"a"]


def test_a_message_that_is_cut_off_closes_its_set() -> None:
    """Its records are out: a marker says that no more will come, and the letter how many did."""
    stage = Overstaying()
    stage.broker.append("a")
    stage.show(lambda: stage.keep_busy(20))
    *records, marker, letter = stage.of_a()
    assert len(records) == 5
    assert isinstance(marker, Aborted)
    assert marker.records == 5
    assert isinstance(letter, Rejected)
    assert (letter.reason, letter.records_out, letter.attempts) == (Reason.EXHAUSTED, 5, 1)
    assert stage.streams.cancelled == 1


def test_a_message_that_is_cut_off_while_kafka_is_down_ends_all_the_same() -> None:
    """The marker is waited for so and so long; the letter goes out once Kafka takes it."""
    stage = Overstaying()
    stage.broker.append("a")

    async def act() -> None:
        await stage.keep_busy(4)
        stage.sink.down = True
        await asyncio.sleep(CLOSE_S + 10)
        assert stage.pipeline.status(SETTLED).slots_busy == 0
        stage.sink.down = False
        await stage.keep_busy(70)

    stage.show(act)
    letter = stage.of_a()[-1]
    assert isinstance(letter, Rejected)
    assert letter.records_out == sum(isinstance(each, Part) for each in stage.of_a())


def test_a_message_that_is_cut_off_and_lost_closes_nothing() -> None:
    """Whoever holds the partition now writes the message's records: no marker of ours any more."""
    stage = Overstaying()
    stage.broker.append("a")

    async def act() -> None:
        await stage.keep_busy(5)
        stage.sink.ack_s = 3.0  # the marker waits for the record before it
        await asyncio.sleep(1)
        before = len(stage.of_a())
        stage.source.give_anew(partition())
        assert not any(isinstance(each, Aborted | Rejected) for each in stage.of_a())
        await asyncio.sleep(4)
        assert not any(isinstance(each, Aborted | Rejected) for each in stage.of_a()[before:])
        stage.pipeline.force()

    stage.show(act)


def test_an_answer_that_waits_for_kafka_only_is_not_cut_off() -> None:
    """Its set may be complete: cut off, the message would be out and a dead letter as well."""
    stage = Overstaying()
    stage.streams.records = 5
    stage.broker.append("a")

    async def act() -> None:
        await stage.keep_busy(4)
        await asyncio.sleep(0.5)
        stage.sink.ack_s = 20.0
        await stage.keep_busy(40)

    stage.show(act)
    assert not stage.rejected()
    assert isinstance(stage.of_a()[-1], Extracted)
