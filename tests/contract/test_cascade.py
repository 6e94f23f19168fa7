"""What leads from one call to the next (larger limits, shorter texts, stronger models); money."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.core.errors import ServiceFailure, TransientFailure, WrongSettings
from service.core.messages import Extracted, Provenance, Reason, Rejected
from service.llm.extractor import OpenAIExtractor
from service.llm.prompt import delimited
from service.settings import Settings
from tests.support.endpoint import Asked, Endpoint, Step
from tests.support.extractors import ADA, Events, calls, settings, started

PRICES = {
    "small": {"input": 1, "cached": 0.5, "output": 2},
    "large": {"input": 10, "output": 20},
}
CASCADE = ("small", "large")


pytestmark = pytest.mark.usefixtures("certificates_read_once")


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Endpoint]:
    async with Endpoint(models=CASCADE) as serving:
        monkeypatch.setenv("OPENAI_BASE_URL", serving.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield serving


def given(model: tuple[str, ...] = CASCADE, **extraction: Any) -> Settings:
    return Settings(
        extraction={"model": model, "call_timeout_s": 5, "reasks_max": 1, **extraction},
        prices=PRICES,
    )


def seen(events: Events) -> list[tuple[str, str, str]]:
    return [(event.model, event.result, event.purpose) for event in calls(events)]


def spent(outcome: Extracted | Rejected) -> Provenance:
    assert outcome.provenance is not None
    return outcome.provenance


# --- the cascade ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "results"),
    [
        ("refuse", ["refused"]),
        ("truncate", ["truncated"]),
        ("invalid", ["invalid", "invalid"]),
    ],
)
async def test_a_stronger_model_is_asked_where_one_cannot(
    endpoint: Endpoint, small: str, results: list[str]
) -> None:
    """Refused, cut off, or invalid after its re-asks: the next one starts anew with the text."""
    events: Events = []
    async with started(events, given()) as extractor:
        outcome = await extractor.call(f"{ADA} [[small: {small}; large: answer]]", None)
    assert isinstance(outcome, Extracted)
    assert outcome.provenance.model == "large"
    assert outcome.provenance.calls == len(results) + 1
    assert seen(events)[-1] == ("large", "validated", "next_model")
    assert [result for _, result, _ in seen(events)[:-1]] == results
    first, last = endpoint.requests[0].json, endpoint.requests[-1].json
    assert {**first, "model": "large"} == last


async def test_a_stronger_model_is_not_asked_where_one_can(endpoint: Endpoint) -> None:
    """One call, to the first model, and its name in the provenance."""
    async with started(given=given()) as extractor:
        outcome = await extractor.call(ADA, None)
    assert spent(outcome).model == "small"
    assert endpoint.total() == 1


@pytest.mark.parametrize("script", ["content_filter", "policy", "too_long"])
async def test_what_no_model_helps_goes_to_no_other(endpoint: Endpoint, script: str) -> None:
    """A request that is refused, a filter, a text too long: rejected at the first model."""
    async with started(given=given()) as extractor:
        outcome = await extractor.call(f"{ADA} [[{script}]]", None)
    assert isinstance(outcome, Rejected)
    assert endpoint.total() == 1


async def test_a_dead_letter_says_what_each_model_did(endpoint: Endpoint) -> None:
    """The last model's reason, and a line of the detail for each."""
    async with started(given=given()) as extractor:
        outcome = await extractor.call(f"{ADA} [[small: refuse; large: truncate]]", None)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == Reason.TRUNCATED
    assert outcome.detail.splitlines() == [
        "small: refused: I'm sorry, I can't help with that.",
        "large: truncated: the answer is longer than 2048 tokens",
    ]
    assert spent(outcome).model == "large"


async def test_what_passes_stays_on_its_step(endpoint: Endpoint) -> None:
    """After a failure in between, the model that was asked last is asked again, and no other."""
    events: Events = []
    text = f"{ADA} [[small: 500, refuse; large: 429, 401, cut]]"
    progress: object | None = None
    async with started(events, given()) as extractor:
        for kind in (TransientFailure, TransientFailure, ServiceFailure, TransientFailure):
            with pytest.raises(kind) as failed:
                await extractor.call(text, progress)
            progress = failed.value.progress
        endpoint.script = lambda _: Step()
        outcome = await extractor.call(text, progress)
    assert spent(outcome).calls == 6
    assert seen(events) == [
        ("small", "server_error", "first"),
        ("small", "refused", "first"),
        ("large", "rate_limited", "next_model"),
        ("large", "service", "next_model"),
        ("large", "connection", "next_model"),
        ("large", "validated", "repeat"),
    ]


async def test_an_unknown_model_further_on_is_named(endpoint: Endpoint) -> None:
    """What to do names the step's own model."""
    async with started(given=given()) as extractor:
        with pytest.raises(ServiceFailure) as failed:
            await extractor.call(f"{ADA} [[small: refuse; large: no_model]]", None)
    assert "'large'" in failed.value.remedy


async def test_a_validator_may_ask_for_the_next_model(endpoint: Endpoint) -> None:
    """service.NextModel: no re-ask, no user_code; after the last model, invalid with its text."""
    events: Events = []
    record = "tests.support.records:AsksForTheNext"
    endpoint.script = lambda asked: Step(
        content=None if asked.body["model"] == "small" else '{"name": "Ada", "age": 3}'
    )
    async with started(events, given(record=record)) as extractor:
        outcome = await extractor.call(ADA, None)
        only = await extractor.call("Bo is 5", None)
    assert isinstance(outcome, Extracted)
    assert outcome.records[0].json == b'{"name":"Ada","age":3}'
    assert spent(only).model == "small"
    assert [result for _, result, _ in seen(events)] == ["unsure", "validated", "validated"]
    async with started(given=given(("small",), record=record)) as extractor:
        alone = await extractor.call(ADA, None)
    assert isinstance(alone, Rejected)
    assert (alone.reason, alone.detail) == (Reason.INVALID, "NextModel: too old for this one")


@pytest.mark.parametrize(
    ("sure", "model"), [("0.7", "small"), ("0.69", "large"), ("null", "large")]
)
async def test_a_confidence_field_may_ask_for_the_next_model(
    endpoint: Endpoint, sure: str, model: str
) -> None:
    """Below the least, or not said; the last model's answer is taken as it is."""
    extraction = {
        "record": "tests.support.records:Sure",
        "confidence": {"field": "sure", "least": 0.7},
    }
    endpoint.script = lambda _: Step(content=f'{{"name": "Ada", "sure": {sure}}}')
    async with started(given=given(**extraction)) as extractor:
        outcome = await extractor.call(ADA, None)
    assert isinstance(outcome, Extracted)
    assert outcome.provenance.model == model


def test_a_confidence_field_that_is_none_is_a_sentence(endpoint: Endpoint) -> None:
    """Told before the first message, with the fields that there are."""
    with pytest.raises(WrongSettings, match=r"extraction\.confidence\.field.*name, age"):
        OpenAIExtractor(given(confidence={"field": "surely"}), [].append)


async def test_the_prompts_version_is_the_same_for_all_models(endpoint: Endpoint) -> None:
    """What is asked is the same: only the name of the model differs, and the limit of a retry."""
    async with started(given=given(truncated="retry")) as extractor:
        one = await extractor.call(ADA, None)
        two = await extractor.call(f"{ADA} [[small: truncate, refuse; large: answer]]", None)
    async with started(given=given(("other",))) as extractor:
        three = await extractor.call(ADA, None)
    assert spent(one).prompt_version == spent(two).prompt_version == spent(three).prompt_version


async def test_the_check_names_every_model_that_is_missing(endpoint: Endpoint) -> None:
    """Each model of the list is looked for."""
    async with started(given=given()) as extractor:
        assert await extractor.check() is None
    async with started(given=given(("small", "huge", "vast"))) as extractor:
        warning = await extractor.check()
    assert warning is not None
    assert "the models 'huge', 'vast'; it has: small, large." in warning


# --- answers cut off, texts too long -----------------------------------------------------------


async def test_an_answer_cut_off_may_be_asked_for_again(endpoint: Endpoint) -> None:
    """Once, with twice the limit, which its re-asks keep; counted and priced as a further call."""
    events: Events = []
    text = f"{ADA} [[truncate, invalid, answer]]"
    async with started(events, given(("small",), truncated="retry")) as extractor:
        outcome = await extractor.call(text, None)
    assert isinstance(outcome, Extracted)
    assert [purpose for _, _, purpose in seen(events)] == ["first", "longer", "reask"]
    assert [one.json["max_tokens"] for one in endpoint.requests] == [2048, 4096, 4096]
    assert endpoint.requests[1].json["messages"] == endpoint.requests[0].json["messages"]


async def test_an_answer_cut_off_twice_is_rejected(endpoint: Endpoint) -> None:
    """No third call; the dead letter names the larger limit."""
    async with started(given=given(("small",), truncated="retry")) as extractor:
        outcome = await extractor.call(f"{ADA} [[truncate]]", None)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == Reason.TRUNCATED
    assert outcome.detail == "the answer is longer than 4096 tokens"
    assert endpoint.total() == 2


LONG = "first " + "€uro " * 100 + "last"


@pytest.mark.parametrize(("side", "end"), [("cut_head", "last"), ("cut_tail", "first")])
async def test_a_text_over_the_context_may_be_cut_to_fit(
    endpoint: Endpoint, side: str, end: str
) -> None:
    """Half is kept until the endpoint takes it; the provenance says how much that was."""
    events: Events = []
    endpoint.context_chars = 150
    async with started(events, given(("small",), too_long=side)) as extractor:
        outcome = await extractor.call(LONG, None)
    assert isinstance(outcome, Extracted)
    assert seen(events) == [
        ("small", "too_long", "first"),
        ("small", "too_long", "shorter"),
        ("small", "validated", "shorter"),
    ]
    (*_, kept) = endpoint.calls
    assert kept.startswith(end) if side == "cut_tail" else kept.endswith(end)
    cut = spent(outcome).text_cut
    assert cut is not None
    assert cut == (len(kept.encode()), len(LONG.encode()))
    assert LONG.startswith(kept) or LONG.endswith(kept)  # no half characters


async def test_cutting_has_an_end(endpoint: Endpoint) -> None:
    """What is too long however short is rejected after eight halvings."""
    async with started(given=given(("small",), too_long="cut_tail")) as extractor:
        outcome = await extractor.call("[[too_long]]" + "x" * 10_000, None)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == Reason.TOO_LONG
    assert endpoint.total() == 9


@pytest.mark.parametrize("side", ["reject", "cut_head", "cut_tail"])
async def test_a_text_over_the_estimate_costs_no_call_to_learn(
    endpoint: Endpoint, side: str
) -> None:
    """extraction.text_tokens_max: rejected before any call, or cut before the first one."""
    bound = given(("small",), too_long=side, text_tokens_max=10)
    async with started(given=bound) as extractor:
        outcome = await extractor.call(LONG, None)
        fits = await extractor.call("x" * 40, None)
    assert spent(fits).text_cut is None
    if side == "reject":
        assert isinstance(outcome, Rejected)
        assert outcome.reason == Reason.TOO_LONG
        assert "about 178 tokens" in outcome.detail
        assert endpoint.total() == 1
    else:
        (kept, _) = endpoint.calls
        assert 36 < len(kept.encode()) <= 40
        assert spent(outcome).text_cut == (len(kept.encode()), len(LONG.encode()))


async def test_the_next_model_sees_the_whole_text_again(endpoint: Endpoint) -> None:
    """A stronger model may have the larger context; nothing says cut that was not."""

    def script(asked: Asked) -> Step:
        if asked.body["model"] == "large":
            return Step()
        return Step("too_long" if len(asked.text) > 300 else "refuse")

    endpoint.script = script
    async with started(given=given(too_long="cut_tail")) as extractor:
        outcome = await extractor.call(LONG, None)
    assert isinstance(outcome, Extracted)
    assert delimited(LONG) == endpoint.requests[-1].json["messages"][-1]["content"]
    assert spent(outcome).text_cut is None


# --- money ------------------------------------------------------------------------------------


async def test_every_kind_of_token_is_counted_and_priced(endpoint: Endpoint) -> None:
    """Cached ones at their own price, reasoning as output; by call and for the message."""
    events: Events = []
    async with started(events, given()) as extractor:
        outcome = await extractor.call(f"{ADA} [[answer cached=20 reasoning=4]]", None)
    (call,) = calls(events)
    assert (call.tokens_cached, call.tokens_reasoning) == (20, 4)
    expected = (call.tokens_input - 20) * 1 + 20 * 0.5 + call.tokens_output * 2
    assert call.cost_usd == pytest.approx(expected / 1e6)
    assert spent(outcome).cost_usd == call.cost_usd
    assert (spent(outcome).tokens_cached, spent(outcome).tokens_reasoning) == (20, 4)


async def test_each_step_is_priced_as_its_own_model(endpoint: Endpoint) -> None:
    """The message's cost is the sum over models and re-asks."""
    events: Events = []
    async with started(events, given()) as extractor:
        outcome = await extractor.call(f"{ADA} [[small: invalid; large: answer]]", None)
    assert [purpose for _, _, purpose in seen(events)] == ["first", "reask", "next_model"]
    last = calls(events)[-1]
    costs = [event.cost_usd or 0.0 for event in calls(events)]
    assert costs[-1] == pytest.approx((last.tokens_input * 10 + last.tokens_output * 20) / 1e6)
    assert spent(outcome).cost_usd == pytest.approx(sum(costs))


async def test_a_call_without_a_price_says_so(endpoint: Endpoint) -> None:
    """No price here, or no usage: unknown, not nothing. A failure that is not charged is 0."""
    events: Events = []
    async with started(events, settings(model="small")) as extractor:
        unpriced = await extractor.call(ADA, None)
        with pytest.raises(TransientFailure):
            await extractor.call(f"{ADA} [[429]]", None)
    async with started(events, given()) as extractor:
        untold = await extractor.call(f"{ADA} [[no_usage]]", None)
    assert [event.cost_usd for event in calls(events)] == [None, 0.0, None]
    assert spent(unpriced).calls_unpriced == spent(untold).calls_unpriced == 1
