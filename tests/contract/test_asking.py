"""What is sent to the endpoint: parameters, headers, keys, the form of the question."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.core.errors import NotReachable, ServiceFailure, WrongSettings
from service.core.messages import Extracted, Rejected
from service.llm.endpoint import Key
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.endpoint import MODEL, Asked, Endpoint, Step
from tests.support.extractors import ADA, started

pytestmark = pytest.mark.usefixtures("certificates_read_once")


def refuses(*forms: str) -> Callable[[Asked], Step]:
    """Refuses these ways of asking as providers do, by name."""

    def script(asked: Asked) -> Step:
        form = form_of(asked.body)
        if form not in forms:
            return Step()
        name = "tools" if form == "tools" else "response_format"
        error = {"message": f"{name} is not supported by this model", "param": name}
        return Step("given", status=400, body=json.dumps({"error": error}).encode())

    return script


def form_of(body: Any) -> str:
    form = body.get("response_format", {})
    if form.get("json_schema", {}).get("strict"):
        return "strict"
    return {"json_schema": "json_schema", "json_object": "json"}.get(form.get("type"), "tools")


# --- parameters and headers ----------------------------------------------------------------------


async def test_parameters_go_into_the_body_as_they_are(endpoint: Endpoint) -> None:
    """All names and types of the endpoint's own; a model's own win, name by name."""
    given = {"reasoning_effort": "low", "seed": 7, "chat_template_kwargs": {"thinking": False}}
    async with started(
        parameters=given, model_parameters={MODEL: {"seed": 8, "top_p": 0.5}}
    ) as extractor:
        assert isinstance(await extractor.call(ADA, None), Extracted)
    sent = endpoint.requests[0].json
    assert {name: sent.get(name) for name in (*given, "top_p")} == {
        **given,
        "seed": 8,
        "top_p": 0.5,
    }


@pytest.mark.parametrize(
    "name",
    ["model", "messages", "response_format", "tools", "tool_choice", "stream", "max_tokens", "n"],
)
def test_what_is_ours_is_refused_by_name(name: str) -> None:
    """With the setting that decides it instead."""
    for place in ({"parameters": {name: 1}}, {"model_parameters": {"m": {name: 1}}}):
        with pytest.raises(ValueError, match=f"{name} cannot be set as a parameter: "):
            Settings(extraction=place)


async def test_headers_go_with_every_request(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the settings and those of a file; ours stay ours."""
    file = tmp_path / "headers.json"
    file.write_text('{"x-gateway-key": "a gateway\'s secret"}')
    monkeypatch.setenv("OPENAI_API_KEY", "sk-main")
    async with started(headers={"X-Team": "sales"}, headers_file=file) as extractor:
        await extractor.check()
        await extractor.call(ADA, None)
    for request in endpoint.requests:
        assert request.headers["x-team"] == "sales"
        assert request.headers["x-gateway-key"] == "a gateway's secret"
        assert request.headers["authorization"] == "Bearer sk-main"


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"Authorization": "Bearer x"}, "looks like a secret"),
        ({"X-Api-Key": "x"}, "looks like a secret"),
        ({"Ocp-Apim-Subscription-Key": "x"}, "looks like a secret"),
        ({"Content-Length": "3"}, "cannot be set"),
        ({"x y": "z"}, "no name of a header"),
        ({"x-team": "a\r\nx: b"}, "on one line"),
    ],
)
def test_headers_that_cannot_stand_in_settings(headers: dict[str, str], why: str) -> None:
    """Secrets belong into a file; a value is not repeated."""
    with pytest.raises(ValueError, match=why):
        Settings(extraction={"headers": headers})


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', '{"host": "x"}'])
def test_a_file_of_headers_is_one_object_of_texts(
    text: str, tmp_path: Path, endpoint: Endpoint
) -> None:
    """A sentence names the setting and the file."""
    file = tmp_path / "headers.json"
    file.write_text(text)
    with pytest.raises(WrongSettings, match=r"extraction.headers_file: "):
        extractor_of(headers_file=file)


def extractor_of(**extraction: Any) -> OpenAIExtractor:
    return OpenAIExtractor(Settings(extraction={"model": MODEL, **extraction}), lambda _: None)


async def test_a_models_own_endpoint_gets_nothing_of_the_main_one(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model lives elsewhere, with a key of its own; each is asked where it is."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-main")
    key = tmp_path / "key"
    key.write_text("sk-other\n")
    async with Endpoint(models=("large",)) as other:
        elsewhere = {"large": {"base_url": other.url, "key_file": key}}
        async with started(
            model=(MODEL, "large"), endpoints=elsewhere, headers={"x-team": "sales"}
        ) as extractor:
            assert await extractor.check() is None
            outcome = await extractor.call(f"{ADA} [[{MODEL}: refuse; large: answer]]", None)
        assert isinstance(outcome, Extracted)
        assert outcome.provenance.model == "large"
        assert {request.headers["authorization"] for request in other.requests} == {
            "Bearer sk-other"
        }
        assert not any("x-team" in request.headers for request in other.requests)
    assert {request.headers["authorization"] for request in endpoint.requests} == {"Bearer sk-main"}


# --- the key's file ------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_key_is_read_anew_when_it_is_refused(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """A token that has expired costs its message nothing: the new one is there already."""
    file = tmp_path / "key"
    file.write_text("sk-first")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(file))
    monkeypatch.setattr("service.llm.endpoint.KEY_LOOK_S", 3600.0)
    valid = "sk-first"

    def script(_: Asked) -> Step:
        sent = endpoint.requests[-1].headers["authorization"]
        return Step() if sent == f"Bearer {valid}" else Step("401")

    endpoint.script = script
    many = {"cardinality": "many", "streaming": True} if streaming else {}
    given = Settings(extraction={"model": MODEL, **many}, delivery={"ordering": "none"})

    async def publish(_: object) -> None:
        return None

    async with started(given=given) as extractor:
        for key in ("sk-first", "sk-second"):
            valid = key
            file.write_text(key)
            outcome = await extractor.call(ADA, None, publish if streaming else None)
            assert isinstance(outcome, Extracted)
        valid = "sk-third"
        with pytest.raises(ServiceFailure) as failed:
            await extractor.call(ADA, None)
        assert failed.value.reason == "credentials"
    assert "sk-" not in failed.value.remedy


def test_a_changed_file_is_seen_without_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at once a second; a file that is just being written leaves the old key."""
    file = tmp_path / "key"
    file.write_text("sk-first\n")
    now_s = 0.0
    monkeypatch.setattr("service.llm.endpoint.time.monotonic", lambda: now_s)
    key = Key("OPENAI_API_KEY_FILE", file=file)
    assert (key.changed(), key.value) == (False, "sk-first")
    file.write_text("")
    now_s = 2.0
    assert (key.changed(), key.value) == (False, "sk-first")
    file.write_text("sk-second")
    assert (key.changed(), key.value) == (False, "sk-first")  # within the same second
    now_s = 4.0
    assert (key.changed(), key.value) == (True, "sk-second")
    assert key.secrets == (b"sk-first", b"sk-second")


def test_a_key_or_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once, or a file that is not there, are wrong settings."""
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(WrongSettings, match=r"OPENAI_API_KEY_FILE: .*cannot be read"):
        extractor_of()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-main")
    with pytest.raises(WrongSettings, match="not both"):
        extractor_of()


# --- which model ---------------------------------------------------------------------------------


async def test_the_only_model_there_is_is_asked(endpoint: Endpoint) -> None:
    """Where the settings name none; records and identity say which it was."""
    async with started(model=()) as extractor:
        assert await extractor.check() is None
        assert extractor.models == (MODEL,)
        outcome = await extractor.call(ADA, None)
    assert isinstance(outcome, Extracted)
    assert outcome.provenance.model == endpoint.requests[-1].json["model"] == MODEL
    assert MODEL in extractor.identity


async def test_among_several_models_a_person_chooses(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence with the first ten; nothing is guessed."""
    async with Endpoint(models=tuple(f"m{number}" for number in range(12))) as many:
        monkeypatch.setenv("OPENAI_BASE_URL", many.url)
        async with started(model=()) as extractor:
            with pytest.raises(WrongSettings, match=r"m0, m1.* m9 and 2 more") as wrong:
                await extractor.check()
    assert "extraction.model is not set" in str(wrong.value)


async def test_an_endpoint_that_is_down_says_nothing_of_models(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a wrong setting: the start waits for it."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    async with started(model=()) as extractor:
        with pytest.raises(NotReachable):
            await extractor.check()
        assert extractor.models == ()


# --- how the schema is asked for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "found"),
    [
        ((), "strict"),
        (("strict",), "json_schema"),
        (("strict", "json_schema"), "tools"),
        (("strict", "json_schema", "tools"), "json"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_auto_finds_what_the_endpoint_takes(
    endpoint: Endpoint,
    caplog: pytest.LogCaptureFixture,
    refused: tuple[str, ...],
    found: str,
    streaming: bool,
) -> None:
    """By refusals that name it, once; all of a burst are answered, and it is one prompt."""
    endpoint.script = refuses(*refused)
    many = {"cardinality": "many", "streaming": True} if streaming else {}
    given = Settings(extraction={"model": MODEL, **many}, delivery={"ordering": "none"})

    async def publish(_: object) -> None:
        return None

    publishes = publish if streaming else None
    async with started(given=given) as extractor:
        before = extractor.identity
        outcomes = await asyncio.gather(
            *(extractor.call(f"{ADA} {number}", None, publishes) for number in range(8))
        )
        refusals = endpoint.total() - 8
        outcomes.append(await extractor.call(ADA, None, publishes))
        assert extractor.identity == before
    assert all(isinstance(outcome, Extracted) for outcome in outcomes)
    assert len({one.provenance.prompt_version for one in outcomes if one.provenance}) == 1
    assert form_of(endpoint.requests[-1].json) == found
    assert endpoint.total() == 8 + refusals + 1, "what was found out is asked again"
    assert refusals <= 8 * len(refused)
    said = [record for record in caplog.records if "does not take the schema" in record.message]
    assert len(said) == len(refused)


async def test_an_endpoint_that_takes_none_is_a_setting(endpoint: Endpoint) -> None:
    """Intake stops with a sentence; once it is mended the first form is found again."""
    endpoint.script = refuses("strict", "json_schema", "tools", "json")
    async with started() as extractor:
        for _ in range(2):
            with pytest.raises(ServiceFailure) as failed:
                await extractor.call(ADA, None)
            assert failed.value.reason == "setting"
            assert "extraction.mode" in failed.value.remedy
        endpoint.script = refuses()
        assert isinstance(await extractor.call(ADA, None), Extracted)
    assert form_of(endpoint.requests[-1].json) == "strict"


async def test_a_mode_that_is_set_is_kept(endpoint: Endpoint) -> None:
    """Only strictness may fall away, which `strict: auto` says."""
    endpoint.script = refuses("strict", "json_schema")
    async with started(mode="json_schema") as extractor:
        with pytest.raises(ServiceFailure):
            await extractor.call(ADA, None)
    assert {form_of(one.json) for one in endpoint.requests} == {"strict", "json_schema"}


async def test_a_null_that_stands_for_a_default_is_the_default(endpoint: Endpoint) -> None:
    """The strict schema asks for every field; the record is the original type's."""
    endpoint.script = lambda _: Step(content='{"name": "Ada", "nick": null, "tags": null}')
    async with started(record="tests.support.records:WithDefaults") as extractor:
        outcome = await extractor.call(ADA, None)
    schema = endpoint.requests[0].json["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["required"] == ["name", "nick", "tags"]
    assert isinstance(outcome, Extracted)
    assert outcome.records[0].json == b'{"name":"Ada","nick":"none","tags":[]}'


async def test_a_cache_breakpoint_stands_behind_what_is_the_same(endpoint: Endpoint) -> None:
    """Where a provider wants to be told up to where it is to keep what it has read."""
    breakpoint = {"type": "ephemeral"}
    async with started(parameters={"cache_control": breakpoint}) as extractor:
        assert isinstance(await extractor.call(ADA, None), Extracted | Rejected)
    sent = endpoint.requests[0].json
    assert "cache_control" not in sent
    *stable, text = sent["messages"]
    assert stable[-1]["content"][-1]["cache_control"] == breakpoint
    assert isinstance(text["content"], str)


# --- what it costs -------------------------------------------------------------------------------


def limited(**settings: Any) -> OpenAIExtractor:
    given = {"extraction": {"model": MODEL}, "limits": {"spend_usd_per_hour": 1.0}, **settings}
    return OpenAIExtractor(Settings.model_validate(given), lambda _: None)


def test_a_limit_of_dollars_needs_a_price(endpoint: Endpoint) -> None:
    """Without one nothing would ever be counted; the sentence names the ways out."""
    with pytest.raises(WrongSettings, match="no price is known") as wrong:
        limited()
    for way in (f"prices: {{{MODEL}: {{input:", f"prices: {{{MODEL}: gateway}}"):
        assert way in str(wrong.value)
    limited(prices={MODEL: {"input": 1, "output": 2}})
    limited(prices={MODEL: "gateway"})
    with pytest.raises(WrongSettings, match="'large'"):
        limited(extraction={"model": [MODEL, "large"]}, prices={MODEL: {"input": 1, "output": 2}})


async def test_a_limit_of_dollars_needs_a_price_of_the_model_that_was_found(
    endpoint: Endpoint,
) -> None:
    """Also where only the endpoint says which model there is."""
    extractor = limited(extraction={})
    await extractor.start()
    try:
        with pytest.raises(WrongSettings, match="no price is known"):
            await extractor.check()
    finally:
        await extractor.stop()


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_a_gateway_says_is_what_it_costs(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """By its header, with an answer at once and with one in pieces."""
    endpoint.script = lambda _: Step(headers=(("x-litellm-response-cost", "0.25"),))
    many = {"cardinality": "many", "streaming": True} if streaming else {}
    given = Settings(
        extraction={"model": MODEL, **many},
        delivery={"ordering": "none"},
        prices={MODEL: "gateway"},
    )

    async def publish(_: object) -> None:
        return None

    async with started(given=given) as extractor:
        outcome = await extractor.call(ADA, None, publish if streaming else None)
    assert isinstance(outcome, Extracted)
    assert outcome.provenance.cost_usd == 0.25
