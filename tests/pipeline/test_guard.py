"""The reject guard in the pipeline, under virtual time."""

import asyncio
from dataclasses import replace

from service.core.admission.guard import TRIES, TRY_EVERY_S, GuardBounds
from service.core.messages import Reason, Rejected
from service.core.status import State
from service.pipeline import Bounds
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import partition

GUARDED = replace(
    BOUNDS, guard=GuardBounds(share_max=0.5, window=20, outcomes_min=10, in_a_row_max=10)
)


def spoilt(messages: int = 200, bounds: Bounds = GUARDED) -> Stage:
    """A stage where the model's answers don't validate, for whatever reason."""
    stage = Stage(bounds=bounds)
    for n in range(messages):
        stage.broker.append(f"t{n}")
        stage.extractor.scripts[f"t{n}"] = [Rejected(Reason.INVALID, "")]
    return stage


def test_intake_stops_and_what_is_finished_is_kept() -> None:
    """Tripped, no call starts; what ran, or was on its way out, is published and committed; it
    says so everywhere."""
    stage = spoilt()

    async def look() -> None:
        await asyncio.sleep(TRY_EVERY_S - 1)
        status = stage.pipeline.status(SETTLED)
        assert status.reject_guard_tripped
        assert status.state is State.GUARDED
        [sentence] = status.not_ready
        assert "in a row, most of them invalid" in sentence
        rejected = len(stage.rejected())
        assert 10 <= rejected == len(stage.extractor.calls) <= 10 + 2 * BOUNDS.concurrency
        assert stage.broker.committed == {partition(): rejected}

    stage.show(look)


def test_little_is_spent_while_nobody_comes() -> None:
    """An hour later a few messages a minute have been tried, and the loop has kept polling."""
    stage = spoilt(2000)

    async def an_hour() -> None:
        await asyncio.sleep(3600)
        assert len(stage.rejected()) <= 15 + 60 * TRIES
        assert len(stage.rejected()) >= 15 + 50
        assert len(stage.source.polls) > 1000

    stage.show(an_hour)


def test_it_goes_on_by_itself() -> None:
    """Once messages are well again, a look finds out and all others follow, in order."""
    stage = spoilt()

    async def mended() -> None:
        await asyncio.sleep(TRY_EVERY_S / 2)
        stage.extractor.scripts.clear()
        await asyncio.sleep(TRY_EVERY_S)
        status = stage.pipeline.status(SETTLED)
        assert not status.reject_guard_tripped
        assert status.not_ready == ()
        assert stage.broker.committed == {partition(): 200}

    stage.show(mended)
    assert len(stage.rejected()) < 20


def test_messages_without_a_call_are_held_too() -> None:
    """A topic full of what cannot be read is not emptied into the dead letters either."""
    stage = Stage(bounds=GUARDED)
    for _ in range(1000):
        stage.broker.append("bad")

    async def look() -> None:
        await asyncio.sleep(600)
        assert len(stage.rejected()) <= 10 + BOUNDS.window + 11 * TRIES

    stage.show(look)


def test_a_run_that_ends_by_itself_ends() -> None:
    """`until` is given up where the guard has tripped: nobody would come to mend it."""
    stage = spoilt()
    assert stage.show()
    assert stage.pipeline.problem is not None
    assert 10 <= len(stage.rejected()) < 20


def test_a_stop_while_it_is_tripped() -> None:
    """What was taken and not called is let go at once; it comes again later."""
    stage = spoilt()

    async def stop() -> None:
        await asyncio.sleep(5)
        began_s = asyncio.get_running_loop().time()
        stage.pipeline.stop()
        await asyncio.sleep(1)
        assert asyncio.get_running_loop().time() - began_s < 2

    stage.show(stop)
    assert stage.broker.committed[partition()] == len(stage.rejected())


def test_a_full_window_goes_on_as_well() -> None:
    """With too little room for a poll, and no call left whose end would ask, those that wait are
    called as soon as it goes on."""
    stage = spoilt(400, replace(GUARDED, window=200))

    async def mended() -> None:
        await asyncio.sleep(TRY_EVERY_S / 2)
        waiting = [f"t{n}" for n in range(400) if f"t{n}" not in stage.extractor.calls]
        for text in waiting[2:]:  # so that only the last of the tries decides
            del stage.extractor.scripts[text]
        await asyncio.sleep(TRY_EVERY_S)
        assert stage.broker.committed == {partition(): 400}

    stage.show(mended)
