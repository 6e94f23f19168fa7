"""Whose fault a refusal is, route by route: the real classification under virtual time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest

from service.core.admission.admission import Admission, Limits
from service.core.messages import Extracted, Reason
from service.core.status import State
from service.llm.extractor import PROBE_TEXT
from service.pipeline import Pipeline
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage
from tests.support.fakes import partition
from tests.support.judged import Judged, Told, good, refused_by_the_model

POISON = "poison"
FORBIDDEN = (403, "<html><h1>403 Forbidden</h1></html>")
LEGAL = (451, {"error": {"message": "Unavailable"}})
NOT_ACCEPTABLE = (406, "<html>Not Acceptable!</html>")
BUSY = (503, {"error": {"message": "Service Unavailable"}})
FAULT = (500, {"error": {"message": "The server had an error"}})
TOO_FAST = (429, {"error": {"message": "slow down"}})
KEY_EXPIRED = (
    400,
    {
        "error": {
            "code": 400,
            "message": "API key expired. Please renew the API key.",
            "status": "INVALID_ARGUMENT",
        }
    },
)
NO_CREDIT = (
    400,
    {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "Your credit balance is"
            " too low to access the Anthropic API. Please go to Plans & Billing.",
        },
    },
)
NO_FORMAT = (
    400,
    {
        "error": {
            "message": "This response_format type is unavailable now",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request_error",
        }
    },
)
NO_KEYWORD = (
    400,
    {
        "object": "error",
        "message": "The provided JSON schema contains features not supported by xgrammar.",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    },
)
NO_MODEL = (
    404,
    {
        "error": {
            "message": "The model `small` does not exist",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
    },
)


@pytest.fixture(autouse=True)
def _an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never reached: `Judged` answers instead."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://provider.invalid/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


class Routes(Stage):
    """A stage with the real extractor; its messages come one every `every_s`."""

    def __init__(self, slots: int = 50, model: str = "small", **settings: Any) -> None:
        self.slots, self.model, self.given = slots, model, settings
        bounds = replace(BOUNDS, concurrency=slots, window=4 * slots, attempts_max=8)
        super().__init__(bounds=bounds)

    def new_pipeline(self, **more: Any) -> Pipeline:
        self.admission = Admission(Limits(self.slots), lambda low, high: (low + high) / 2)
        self.judged = Judged(self.admission, self.model, **self.given)
        self.extractor = self.judged  # type: ignore[assignment]
        return super().new_pipeline(admission=self.admission, **more)

    async def arrive(self, texts: list[str], every_s: float) -> None:
        for text in texts:
            self.broker.append(text)
            self.arrived[text] = asyncio.get_running_loop().time()
            await asyncio.sleep(every_s)

    def spread(self, poison: Told | None, every_s: float) -> float:
        """The median time from arrival to output of 1,000 good messages, one of another kind
        among them."""
        self.arrived: dict[str, float] = {}
        texts = [f"text {n}" for n in range(1000)]
        if poison is not None:
            texts.insert(300, POISON)
            self.judged.provider = lambda text, model: (
                poison if text == POISON else good(text, model)
            )
        took: dict[str, float] = {}
        published = self.broker.published

        async def act() -> None:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch(published, took))
                await self.arrive(texts, every_s)
                await asyncio.sleep(90)
                watch.cancel()

        self.show(act)
        good_ones = sorted(took[text] for text in texts if text != POISON)
        assert len(good_ones) == 1000
        return good_ones[500]

    async def _watch(self, published: list[Any], took: dict[str, float]) -> None:
        seen = 0
        while True:
            for message, _ in published[seen:]:
                text = message.value.decode()
                took[text] = asyncio.get_running_loop().time() - self.arrived[text]
            seen = len(published)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("slots", [8, 50])
@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (FORBIDDEN, Reason.BAD_REQUEST),
        (LEGAL, Reason.BAD_REQUEST),
        (NOT_ACCEPTABLE, Reason.BAD_REQUEST),
        (BUSY, Reason.EXHAUSTED),
        (TOO_FAST, Reason.EXHAUSTED),
    ],
    ids=["403", "451", "406", "503", "429"],
)
def test_one_poisoned_text_slows_nobody(
    poison: Told, reason: Reason, slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One dead letter with its reason and one line; the others take no longer than without it, at
    nine tenths of what the slots can do."""
    every_s = 0.1 / (0.9 * slots)
    without_s = Routes(slots).spread(None, every_s)
    caplog.clear()
    stage = Routes(slots)
    assert stage.spread(poison, every_s) <= 1.2 * without_s
    assert [rejected.reason for rejected in stage.rejected()] == [reason]
    lines = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [line.getMessage().partition(" after ")[0] for line in lines] == [
        "in[0]@300 is given up"
    ]
    assert POISON not in caplog.text


ASKED_TO_WAIT = (429, {"error": {"message": "slow down, try again in 3s"}})


def pauses(refused: Callable[[str], Told | None], latency_s: float = 0.1) -> list[float]:
    """How many seconds passed without an answer to others, each time that it was at least
    the three that `ASKED_TO_WAIT` says. Messages come at half the speed that the slots allow.
    `refused` tells what a text is answered with; None: a good answer."""
    stage = Routes(8)
    stage.arrived = {}
    stage.judged.latency_s = latency_s
    at_s: list[float] = []

    def provider(text: str, model: str) -> Told:
        if text.startswith("text"):
            at_s.append(asyncio.get_running_loop().time())
        return refused(text) or good(text, model)

    stage.judged.provider = provider
    texts = [f"text {n}" for n in range(600)]
    texts.insert(100, POISON)

    async def act() -> None:
        await stage.arrive(texts, latency_s / (0.5 * 8))
        await asyncio.sleep(90)

    stage.show(act)
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.EXHAUSTED]
    assert len(stage.broker.texts()) == 600
    return [after - before for before, after in pairwise(at_s) if after - before >= 3.0]


@pytest.mark.parametrize("latency_s", [0.1, 2.0])
def test_one_text_that_is_asked_to_wait_makes_the_others_wait_once(latency_s: float) -> None:
    """Its first Retry-After is everybody's; the next ones are its own."""
    found = pauses(lambda text: ASKED_TO_WAIT if text == POISON else None, latency_s)
    assert len(found) == 1


def test_one_text_that_is_asked_to_wait_is_found_where_others_fail_now_and_then() -> None:
    """One call of fifty is turned away by chance: the text's refusals are its own all the same, as
    soon as chance does not explain them."""
    turns = count(1)

    def refused(text: str) -> Told | None:
        if text == POISON:
            return ASKED_TO_WAIT
        return BUSY if next(turns) % 50 == 0 else None

    assert 1 <= len(pauses(refused)) <= 2


def test_a_provider_that_asks_everybody_to_wait_is_obeyed_each_time() -> None:
    """It turns everybody away in three seconds of ten: once it has said so, no call begins before
    they are over; those under way are told too."""
    stage = Routes(8)
    stage.arrived = {}
    refused: Counter[int] = Counter()

    def provider(text: str, model: str) -> Told:
        period, second = divmod(asyncio.get_running_loop().time(), 10)
        if second >= 3:
            return good(text, model)
        refused[int(period)] += 1
        return ASKED_TO_WAIT

    stage.judged.provider = provider

    async def act() -> None:
        await stage.arrive([f"text {n}" for n in range(2000)], 0.1 / (0.5 * 8))
        await asyncio.sleep(90)

    stage.show(act)
    assert stage.rejected() == []
    assert len(refused) >= 5
    assert max(refused.values()) <= 8


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (KEY_EXPIRED, "OPENAI_API_KEY"),
        (NO_CREDIT, "add credit"),
        (NO_FORMAT, "extraction.mode"),
        (NO_KEYWORD, "extraction.mode or the record type"),
        (NO_MODEL, "extraction.model"),
        (FORBIDDEN, "what the key may do"),
    ],
    ids=["key", "credit", "format", "keyword", "model", "unknown"],
)
def test_a_lasting_fault_costs_no_message(fault: Told, named: str) -> None:
    """It comes under load: no dead letter, not ready with what to do, and all messages follow at
    full speed once it is mended."""
    stage = Routes()
    for n in range(3000):
        stage.broker.append(f"text {n}")

    async def fail_and_mend() -> None:
        await asyncio.sleep(1.05)
        before = stage.judged.calls.total()
        stage.judged.provider = lambda text, model: fault
        await asyncio.sleep(600)
        status = stage.pipeline.status(SETTLED)
        assert status.state is State.WAITING_FOR_PROVIDER
        [sentence] = status.not_ready
        assert named in sentence
        asked = stage.judged.calls.total() - before
        assert asked < 12 * stage.slots, "a storm"  # what is in flight may be asked otherwise
        stage.judged.provider = good
        while not stage.admission.routes.closed("small"):
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        before = stage.judged.calls.total()
        await asyncio.sleep(2)
        assert stage.judged.calls.total() - before >= 0.9 * 2 * 500
        await asyncio.sleep(60)

    stage.show(fail_and_mend)
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 3000}


def test_an_unknown_refusal_before_the_first_success_stops_intake() -> None:
    """Nobody knows whether the key was ever right: after one call it is said, and nothing is
    rejected; a guardrail that refuses the probe's text alone is found out by a message."""
    stage = Routes()
    for n in range(500):
        stage.broker.append(f"text {n}")
    stage.judged.provider = lambda text, model: FORBIDDEN

    async def mend() -> None:
        await asyncio.sleep(30)
        assert "what the key may do" in stage.pipeline.status(SETTLED).not_ready[0]
        messages = [text for text, _ in stage.judged.calls if text.startswith("text")]
        assert len(messages) > 50, "the first slots' and each third try's, each time another"
        stage.judged.provider = lambda text, model: (
            good(text, model) if text.startswith("text") else FORBIDDEN
        )
        await asyncio.sleep(60)

    stage.show(mend)
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 500}


def test_one_of_three_servers_that_refuses_everything_costs_no_third_of_the_topic() -> None:
    """A message is rejected only when it is refused again on a new connection: by chance of the
    same server, one in nine; and the circuit does not open for it."""
    stage = Routes()
    turns: dict[str, int] = defaultdict(int)

    def one_of_three(text: str, model: str) -> Told:
        turns[text] += 1
        broken = random.Random(f"{text} {turns[text]}").random() < 1 / 3
        return FORBIDDEN if broken else good(text, model)

    for n in range(900):
        stage.broker.append(f"text {n}")
    stage.judged.provider = one_of_three
    stage.show()
    assert len(stage.rejected()) < 900 * 0.16
    assert all(each.reason is Reason.BAD_REQUEST for each in stage.rejected())


def test_a_crowded_provider_rejects_nobody() -> None:
    """Nine calls of ten are turned away at random, for an hour: no message is its own fault."""
    stage = Routes()
    for n in range(60):
        stage.broker.append(f"text {n}")
    tries: dict[str, int] = defaultdict(int)

    def crowded(text: str, model: str) -> Told:
        tries[text] += 1
        return good(text, model) if random.Random(f"{text} {tries[text]}").random() < 0.1 else BUSY

    stage.judged.provider = crowded

    async def wait() -> None:
        await asyncio.sleep(4 * 3600)

    stage.show(wait)
    assert stage.rejected() == []
    assert max(tries.values()) >= 8
    assert stage.broker.committed == {partition(): 60}


def test_failures_at_random_reject_nobody_and_the_poison_among_them() -> None:
    """Six calls of ten end with a 500, whose text it is: as many as fail eight times in a row by
    chance are answered later. A text that always fails is found all the same."""
    stage = Routes(slots=20)
    for n in range(1500):
        stage.broker.append(POISON if n == 700 else f"text {n}")
    tries: dict[str, int] = defaultdict(int)

    def shaky(text: str, model: str) -> Told:
        tries[text] += 1
        fails = random.Random(f"{text} {tries[text]}").random() < 0.6
        return FAULT if fails or text == POISON else good(text, model)

    stage.judged.provider = shaky

    async def wait() -> None:
        await asyncio.sleep(1800)
        assert stage.broker.committed == {partition(): 1500}

    stage.show(wait)
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.EXHAUSTED]
    assert sum(count > 8 for text, count in tries.items() if text != PROBE_TEXT) > 10
    assert tries[POISON] < 60


def test_a_poisoned_text_alone_is_found_by_probes() -> None:
    """No other message comes: what the probes are told counts, and the next message goes at once
    in between."""
    stage = Routes()
    stage.judged.provider = lambda text, model: BUSY if text == POISON else good(text, model)
    stage.broker.append(POISON)

    async def wait() -> None:
        await asyncio.sleep(1800)
        assert [rejected.reason for rejected in stage.rejected()] == [Reason.EXHAUSTED]

    stage.show(wait)


@pytest.mark.parametrize("poison", [FORBIDDEN, BUSY, TOO_FAST], ids=["403", "503", "429"])
def test_a_stop_waits_for_no_poison(poison: Told) -> None:
    """What stands behind it in its lane and is paid for is published, within seconds."""
    stage = Routes()
    stage.broker.append("first", key="a")
    stage.judged.provider = lambda text, model: poison if text == POISON else good(text, model)

    async def stop() -> None:
        await asyncio.sleep(1)
        stage.broker.append(POISON, key="a")
        for n in range(20):
            stage.broker.append(f"behind {n}", key="a")
        await asyncio.sleep(1.0)
        stage.pipeline.stop()

        began_s = asyncio.get_running_loop().time()
        while stage.broker.committed != {partition(): 22}:
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() - began_s < 45

    stage.show(stop)


# --- a cascade -----------------------------------------------------------------------------------


def cascade(large: Told) -> Routes:
    """Every fifth message needs the second model, which answers so."""
    stage = Routes(slots=20, model="small,large")

    def provider(text: str, model: str) -> Told:
        if model == "large":
            return large
        hard = text.startswith("text") and int(text.split()[1]) % 5 == 0
        return refused_by_the_model(model) if hard else good(text, model)

    stage.judged.provider = provider
    for n in range(100):
        stage.broker.append(f"text {n}")
    return stage


@pytest.mark.parametrize(
    ("large", "named"),
    [
        (TOO_FAST, "rate_limited"),
        (NO_MODEL, "'large'"),
        ((401, {"error": {"message": "Incorrect API key provided"}}), "OPENAI_API_KEY"),
    ],
    ids=["429", "404", "401"],
)
def test_what_a_second_model_refuses_stops_nobody_else(large: Told, named: str) -> None:
    """The first one's messages go on; the others wait, with a sentence, and follow once it is
    mended; probes go to the second model, and none to the first."""
    stage = cascade(large)

    async def mend() -> None:
        await asyncio.sleep(60)
        assert len(stage.broker.texts()) == 80
        status = stage.pipeline.status(SETTLED)
        assert any("the model large" in each and named in each for each in status.not_ready)
        assert stage.admission.routes.closed("small")
        assert not stage.admission.routes.closed("large")
        assert stage.judged.probes("small") == 0
        assert stage.judged.probes("large") > 0
        for n in range(101, 105):
            stage.broker.append(f"text {n}")
        await asyncio.sleep(1)
        assert len(stage.broker.texts()) == 84
        stage.judged.provider = lambda text, model: (
            good(text, model) if model == "large" else cascade(large).judged.provider(text, model)
        )
        await asyncio.sleep(30)

    stage.show(mend)
    assert stage.rejected() == []
    assert len(stage.broker.texts()) == 104
    hard = [
        outcome
        for message, outcome in stage.broker.published
        if isinstance(outcome, Extracted) and outcome.provenance.model == "large"
    ]
    assert len(hard) == 20
    assert all(outcome.provenance.calls >= 2 for outcome in hard)
