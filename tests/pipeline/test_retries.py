"""Messages that wait in the retry topic, under virtual time: what the pipeline sends there."""

from dataclasses import replace

from service.core.errors import TransientFailure
from service.core.events import Finished
from service.core.history import History
from service.core.messages import Message, Postponed, Reason
from service.pipeline import Later
from tests.pipeline.test_way import BOUNDS, Stage
from tests.support.fakes import partition

LATER = replace(BOUNDS, ordering="none", later=Later(delay_s=300, attempts_max=2))


def poisoned(history: History | None = None, bounds: object = LATER) -> Stage:
    """One message fails for ever among many that are well."""
    stage = Stage(bounds=bounds)  # type: ignore[arg-type]
    carried = () if history is None else history.headers
    stage.broker.logs[partition()].append(b"poison", headers=(("own", b"\xff"), *carried))
    stage.extractor.scripts["poison"] = [TransientFailure("server_error") for _ in range(9)]
    for n in range(400):
        stage.broker.append(f"text {n}")
    stage.show()
    return stage


def postponed(stage: Stage) -> list[tuple[Message, Postponed]]:
    return [(m, each) for m, each in stage.broker.published if isinstance(each, Postponed)]


def test_what_is_exhausted_waits_and_is_finished() -> None:
    """Instead of a dead letter: its history with a due time, and its offset is committed."""
    stage = poisoned()
    [(message, outcome)] = postponed(stage)
    carried = History.of((*message.headers, *outcome.carries))
    assert carried is not None
    assert carried.origin == b"in:0:0"
    assert (carried.attempts, carried.retries) == (3, 1)
    assert 300_000 <= carried.due_ms < 400_000
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 401}
    assert "postponed" in {each.outcome for each in stage.events if isinstance(each, Finished)}


def test_it_is_bounded() -> None:
    """A message that has been there often enough is rejected as exhausted, as without a topic."""
    before = History(b"in:3:7", 5, attempts=6, first_failed_at_ms=9, retries=2)
    stage = poisoned(before)
    assert postponed(stage) == []
    [rejected] = stage.rejected()
    assert (rejected.reason, rejected.attempts) == (Reason.EXHAUSTED, 3)


def test_lives_are_counted_on() -> None:
    """Its second stay carries the origin, all attempts and the first failure."""
    before = History(b"in:3:7", 5, attempts=6, first_failed_at_ms=9, redrives=1, retries=1)
    [(_, outcome)] = postponed(poisoned(before))
    carried = History.of(outcome.carries)
    assert carried is not None
    assert (carried.origin, carried.timestamp_ms, carried.redrives) == (b"in:3:7", 5, 1)
    assert (carried.attempts, carried.first_failed_at_ms, carried.retries) == (9, 9, 2)


def test_without_a_retry_topic_nothing_waits() -> None:
    """The setting is optional: exhausted messages are rejected then."""
    stage = poisoned(bounds=replace(LATER, later=None))
    assert postponed(stage) == []
    assert [each.reason for each in stage.rejected()] == [Reason.EXHAUSTED]
