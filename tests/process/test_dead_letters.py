"""The reject guard, a redrive and the retry topic, as an operator meets them."""

from __future__ import annotations

import json
import signal

import pytest

from tests.process.conftest import Scene
from tests.support.endpoint import Asked, Step, script_in_text
from tests.support.service import run, service
from tests.support.topics import create_topic, read_topic

pytestmark = pytest.mark.timeout(240)

COUNT = 60


async def test_a_spoilt_prompt_and_its_repair(scene: Scene) -> None:
    """Everything is refused: the guard stops intake and says so. Mended, a redrive sends back what
    was rejected, and each message ends with one record under the id it always had."""
    scene.endpoint.script = lambda _: Step("refuse")
    await scene.send(*(b"Text number %d" % n for n in range(COUNT)))
    environment = {
        **scene.environment,
        "SLUICE_LIMITS__CONCURRENCY": "4",
        "SLUICE_DEAD_LETTERS__GUARD__IN_A_ROW_MAX": "10",
    }
    async with service(environment) as running:
        await running.until("sluice_reject_guard_tripped", 1)
        status, body = await running.get("/readyz")
        assert (status, json.loads(body)["state"]) == (503, "guarded")
        assert "in a row, most of them refused" in body
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
    rejected = len(await scene.letters())
    assert 10 <= rejected < COUNT
    # A job that is to end by itself says why it has not caught up.
    job = await run(environment, "run", "--until-caught-up")
    assert job.code == 1
    assert "too many messages are rejected" in job.printed.splitlines()[-1]
    rejected = len(await scene.letters())

    scene.endpoint.script = script_in_text
    listed = await run(environment, "dead-letters", "list", "--reason", "refused", "--json")
    assert len(listed.printed.splitlines()) == rejected
    redriven = await run(environment, "dead-letters", "redrive", "--yes")
    assert (redriven.code, f"sent again: {rejected} dead letter" in redriven.printed) == (
        0,
        True,
    )
    await scene.catch_up(**environment)
    ids = sorted(read.header["sluice.id"] for read in await scene.outputs())
    assert len(ids) == len(set(ids)) == COUNT
    first = {
        f"{m.topic}:{m.partition}:{m.offset}:0"
        for m in await read_topic(scene.servers, scene.input)
        if "sluice.id" not in m.header
    }
    assert set(ids) == first


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
async def test_an_exhausted_message_comes_back(scene: Scene, mode: str) -> None:
    """It waits in the retry topic until it is due, and then has its record, under its first id."""
    later = f"{scene.input}-later"
    await create_topic(scene.servers, later, 1)

    def script(asked: Asked) -> Step:
        return Step("500") if asked.text == "Bad" and asked.call == 1 else Step()

    scene.endpoint.script = script
    await scene.send(*(b"Text number %d" % n for n in range(30)))
    environment = {
        **scene.environment,
        "SLUICE_DELIVERY__MODE": mode,
        "SLUICE_DELIVERY__ORDERING": "none",
        "SLUICE_OUTPUT__TIMESTAMP": "now",
        "SLUICE_EXTRACTION__ATTEMPTS_MAX": "1",
        "SLUICE_RETRIES__TOPIC": later,
        "SLUICE_RETRIES__DELAY_S": "2",
    }
    async with service(environment) as running:
        await running.until("sluice_messages_finished_total", 30)
        await scene.send(b"Bad")
        await running.until("sluice_records_published_total", 31)
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
    [waited] = await read_topic(scene.servers, later)
    due_ms = int(waited.header["sluice.retry.due.at"])
    assert waited.header["sluice.attempts"] == "1"
    [record] = [
        read for read in await scene.outputs() if read.header["sluice.source.topic"] == later
    ]
    assert record.header["sluice.id"] == waited.header["sluice.id"] + ":0"
    assert waited.timestamp_ms + 1_000 <= due_ms <= record.timestamp_ms
    assert await scene.letters() == []
