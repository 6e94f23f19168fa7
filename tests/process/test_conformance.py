"""Answers as providers give them, through the whole service (tests/conformance.py)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence

import pytest

from service.demo.broker import EmbeddedBroker
from tests.conformance import GOOD, Case, Got, cases, is_right
from tests.process.conftest import Scene
from tests.support.endpoint import Asked, Endpoint, Step
from tests.support.service import service


@pytest.fixture
async def scene(mock_kafka: EmbeddedBroker) -> AsyncIterator[Scene]:
    """On the embedded broker: nothing here is about Kafka."""
    async with Endpoint() as endpoint:
        made = Scene(mock_kafka.bootstrap_servers, endpoint)
        for topic in (made.input, made.output, made.dead_letters):
            mock_kafka.create_topic(topic, 1)
        yield made


GOOD_ONES = 200
PASSES = ("transient", "overloaded", "wait", "told", "works")
"""What is tried again or asked otherwise: each needs a time or an endpoint of its own."""


def about_one_message(mode: str) -> list[Case]:
    """Cases that concern nobody else, which one run can hold together."""
    return [
        case
        for case in cases()
        if case.mode == mode
        and (case.cardinality, case.streaming) == ("one", False)
        and not case.right.startswith(("service", "refresh", *PASSES))
    ]


def named(number: int) -> str:
    return f"Ann is 30, number {number}"


def script_of(chosen: Sequence[Case]) -> dict[str, Step]:
    return {
        named(number): Step(
            "given", status=case.status, headers=tuple(case.headers.items()), body=case.body
        )
        for number, case in enumerate(chosen)
    }


@pytest.mark.parametrize("mode", ["json_schema", "tools", "json"])
async def test_each_message_gets_what_its_answer_means(scene: Scene, mode: str) -> None:
    """Records and dead letters with their reasons, among others that are answered well; all of
    it in one run, which no answer stops."""
    chosen = about_one_message(mode)
    steps = script_of(chosen)
    scene.endpoint.script = lambda asked: steps.get(asked.text, Step())
    good = [f"{GOOD}, number {number}" for number in range(GOOD_ONES)]
    texts = [*good[: GOOD_ONES // 2], *steps, *good[GOOD_ONES // 2 :]]
    await scene.send(*(text.encode() for text in texts))
    await scene.catch_up(
        within_s=100,
        SLUICE_EXTRACTION__MODE=mode,
        SLUICE_DEAD_LETTERS__GUARD__SHARE_MAX="null",
        SLUICE_DEAD_LETTERS__GUARD__IN_A_ROW_MAX="null",
    )
    letters = {(letter.value or b"").decode(): letter.header for letter in await scene.letters()}
    outputs = len(await scene.outputs())
    wrong = []
    records = GOOD_ONES
    for number, case in enumerate(chosen):
        header, calls = letters.get(named(number)), scene.endpoint.calls[named(number)]
        if header is None:
            got = Got("record", calls=calls)
            records += 1
        else:
            detail = header["sluice.error.detail"]
            got = Got(header["sluice.error.reason"], detail, calls)
        if not is_right(case, got):
            wrong.append(f"{case.provider}: {case.case}: {case.right}, got {got}")
    assert wrong == []
    assert outputs == records
    assert await scene.lag() == 0


EVERYBODYS = [
    "anthropic: credit used up",
    "gemini: bad key",
    "vllm: schema refused",
    "deepseek: model not exist",
    "mistral: 422 stream_options",
]


@pytest.mark.parametrize("name", EVERYBODYS)
async def test_what_is_about_everybody_rejects_nobody(scene: Scene, name: str) -> None:
    """Not ready, with a sentence, and no dead letter; mended, it goes on alone."""
    [case] = [case for case in cases() if f"{case.provider}: {case.case}" == name]
    refused = Step("given", status=case.status, body=case.body)
    mended = False

    def script(_: Asked) -> Step:
        return Step() if mended else refused

    scene.endpoint.script = script
    await scene.send(*(f"Bo is {number}".encode() for number in range(100)))
    async with service(scene.environment) as running:
        reason = case.right.split()[1]
        async with asyncio.timeout(30):
            while f"({reason})" not in (await running.get("/readyz"))[1]:
                await asyncio.sleep(0.1)
        mended = True
        await running.until("sluice_messages_finished_total", 100)
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
    assert len(await scene.outputs()) == 100
    assert await scene.letters() == []
