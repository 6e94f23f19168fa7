"""Cached answers in the pipeline: they say nothing of the provider, whose circuit they leave."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from service.core.errors import TransientFailure
from service.core.messages import Extracted, Rejected
from service.core.status import State
from service.llm.cache import CachedExtractor
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import FakeExtractor, extracted
from tests.unit.test_cache import Model, ScriptedStore


class KnowsSome(FakeExtractor):
    """Answers texts that begin with "known" from a cache, whatever the provider does."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        if not text.startswith("known"):
            return await super().call(text, progress)
        await asyncio.sleep(0.001)
        answer = extracted(text)
        return replace(answer, provenance=replace(answer.provenance, cached=True))


def test_hits_do_not_end_an_outage() -> None:
    """With the provider down for hours and a hit now and then, nothing is rejected as exhausted,
    and the provider is not asked more often."""
    stage = Stage(bounds=replace(BOUNDS, window=64))
    stage.extractor = KnowsSome()
    stage.pipeline = stage.new_pipeline()
    stage.extractor.always = TransientFailure("connection")
    for n in range(20):
        stage.broker.append(f"text {n}")

    async def outage() -> None:
        for n in range(200):
            stage.broker.append(f"known {n}")
            await asyncio.sleep(36)
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_PROVIDER
        assert len(stage.extractor.calls) < 800
        stage.extractor.always = None
        await asyncio.sleep(600)

    stage.show(outage)
    assert stage.rejected() == []
    assert len(stage.broker.texts()) == 220


def test_a_failure_of_many_is_one_failure() -> None:
    """Twelve messages wait for one call that fails once: the circuit, which opens at ten failures
    in a row, stays closed, and all are published after one further call."""
    stage = Stage(bounds=replace(BOUNDS, concurrency=12, window=24))
    model = Model()
    model.scripts["text"] = [TransientFailure("connection")]
    stage.extractor = CachedExtractor(  # type: ignore[assignment]
        model, ScriptedStore(), stage.events.append
    )
    stage.pipeline = stage.new_pipeline()
    for n in range(12):
        stage.broker.append("text", key=str(n))
    reasons: list[tuple[str, ...]] = []

    async def look() -> None:
        await stage.extractor.start()  # type: ignore[attr-defined]
        for _ in range(60):
            await asyncio.sleep(0.05)
            reasons.append(stage.pipeline.status(SETTLED).not_ready)
        stage.pipeline.stop()

    stage.show(look)
    assert set(reasons) == {()}
    assert len(stage.broker.texts()) == 12
    assert len(model.calls) == 2
