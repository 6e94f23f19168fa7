"""Streamed answers against an endpoint that cuts, stalls, errs and gets elements wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.core.errors import OutputTooLarge, ServiceFailure, TransientFailure
from service.core.events import Called, Event
from service.core.messages import Extracted, Part, Reason, Rejected
from service.llm import streaming
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.endpoint import MODEL, Endpoint, Step

PEOPLE = ", ".join(f"{name} is {age}" for age, name in enumerate(("Ada", "Bo", "Cy", "Di"), 36))
ALL = [
    b'{"name":"Ada","age":36}',
    b'{"name":"Bo","age":37}',
    b'{"name":"Cy","age":38}',
    b'{"name":"Di","age":39}',
]


class Reader:
    """Keeps what was published, and when."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.events: list[Event] = []
        self.at_s: list[float] = []

    async def publish(self, part: Part) -> None:
        self.parts.append(part)
        self.at_s.append(time.monotonic())

    @property
    def results(self) -> list[str]:
        return [event.result for event in self.events if isinstance(event, Called)]

    @property
    def out(self) -> list[bytes]:
        return [part.record.json for part in self.parts]


@asynccontextmanager
async def started(reader: Reader, **extraction: Any) -> AsyncIterator[OpenAIExtractor]:
    own = {"model": MODEL, "call_timeout_s": 5, "cardinality": "many", "streaming": True}
    settings = Settings(extraction={**own, **extraction}, delivery={"ordering": "none"})
    extractor = OpenAIExtractor(settings, reader.events.append)
    await extractor.start()
    try:
        yield extractor
    finally:
        await extractor.stop()


@pytest.mark.parametrize("mode", ["json_schema", "tools", "json"])
async def test_records_go_out_while_the_model_writes(endpoint: Endpoint, mode: str) -> None:
    """All but the last one, in order, under one id; the outcome holds the last, and the cost."""
    reader = Reader()
    async with started(reader, mode=mode) as extractor:
        outcome = await extractor.stream(f"{PEOPLE} [[answer piece_ms=5]]", None, reader.publish)
        ended_s = time.monotonic()
    assert isinstance(outcome, Extracted)
    assert reader.out == ALL[:3]
    assert [(part.index, part.answer_id) for part in reader.parts] == [
        (n, outcome.answer_id) for n in range(3)
    ]
    assert ([record.json for record in outcome.records], outcome.earlier) == (ALL[3:], 3)
    assert outcome.provenance.tokens_input > 0
    assert outcome.provenance.tokens_output > 0
    assert ended_s - reader.at_s[0] > 0.04, "they came all at once"
    [event] = reader.events
    assert isinstance(event, Called)
    assert (event.result, event.tokens_output) == ("validated", outcome.provenance.tokens_output)


async def test_records_behind_a_validator_stream_too(endpoint: Endpoint) -> None:
    """Each element is validated by itself, as strictly and as generously as a whole answer."""
    looked = '{"name":"Ann","on":"2026-01-31","tags":["a"],"kind":"talk"}'
    endpoint.script = lambda _: Step(content=f'{{"records":[{looked},{looked}]}}')
    reader = Reader()
    async with started(reader, record="tests.support.records:Looked") as extractor:
        outcome = await extractor.stream(PEOPLE, None, reader.publish)
    assert isinstance(outcome, Extracted)
    assert [*reader.out, *(record.json for record in outcome.records)] == [looked.encode()] * 2


async def test_none_and_one(endpoint: Endpoint) -> None:
    """An empty list publishes nothing; a single record waits for the end of its answer."""
    reader = Reader()
    async with started(reader) as extractor:
        none = await extractor.stream("Nobody here.", None, reader.publish)
        one = await extractor.stream("Ada is 36", None, reader.publish)
    assert isinstance(none, Extracted)
    assert isinstance(one, Extracted)
    assert (none.records, none.earlier) == ((), 0)
    assert ([record.json for record in one.records], one.earlier) == (ALL[:1], 0)
    assert reader.parts == []


async def test_an_endpoint_that_does_not_stream_will_do(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole answer instead of a stream is read as one."""
    monkeypatch.setattr("tests.support.endpoint._streams", lambda body: False)
    reader = Reader()
    async with started(reader) as extractor:
        outcome = await extractor.stream(PEOPLE, None, reader.publish)
    assert isinstance(outcome, Extracted)
    assert [*reader.out, *(record.json for record in outcome.records)] == ALL


async def test_a_probe_asks_as_messages_do(endpoint: Endpoint) -> None:
    """It is streamed as they are, since an endpoint may answer only that, and read as a stream:
    it ends with the answer, and its failures are raised as a call's."""
    steps = iter([Step(), Step("no_json"), Step("503"), Step("late_error")])
    endpoint.script = lambda _: next(steps)
    endpoint.record = True
    reader = Reader()
    async with started(reader) as extractor:
        await extractor.probe(MODEL)
        await extractor.probe(MODEL)
        for reason in ("overloaded", "broken_answer"):
            with pytest.raises(TransientFailure) as failed:
                await extractor.probe(MODEL)
            assert failed.value.reason == reason
    assert [bool(request.json.get("stream")) for request in endpoint.requests] == [True] * 4
    assert reader.parts == []


async def test_a_call_that_is_read_as_a_whole_asks_for_no_stream(endpoint: Endpoint) -> None:
    """`sluice check --call` hands nothing on: its answer is a whole one, with all records."""
    endpoint.record = True
    async with started(Reader()) as extractor:
        outcome = await extractor.call(PEOPLE, None)
    assert isinstance(outcome, Extracted)
    assert ([record.json for record in outcome.records], outcome.earlier) == (ALL, 0)
    [request] = endpoint.requests
    assert request.json.keys().isdisjoint({"stream", "stream_options"})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("cut", "connection"),
        ("cut_list", "broken_answer"),
        ("late_error", "broken_answer"),
        ("stall", "timeout"),
        ("cut_at_once", "connection"),
        ("html", "broken_answer"),
        ("cut_body", "broken_answer"),
        ("500", "server_error"),
        ("429 retry_after=7", "rate_limited"),
    ],
)
async def test_a_failure_half_way_is_transient(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    """What went out stays under its id; the next attempt has another one, and all records."""
    monkeypatch.setattr(streaming, "IDLE_MAX_S", 0.3)
    reader = Reader()
    text = f"{PEOPLE} [[{script}, answer]]"
    # Longer than a test may take: what stands still is found before.
    async with started(reader, call_timeout_s=600) as extractor:
        with pytest.raises(TransientFailure) as failed:
            await extractor.stream(text, None, reader.publish)
        assert failed.value.reason == reason
        before = list(reader.parts)
        assert len(before) == (1 if script in {"cut", "cut_list", "late_error", "stall"} else 0)
        outcome = await extractor.stream(text, failed.value.progress, reader.publish)
    assert isinstance(outcome, Extracted)
    assert outcome.earlier == 3
    assert outcome.provenance.calls == 2
    assert outcome.answer_id not in {part.answer_id for part in before}
    assert reader.results == [reason, "validated"]


async def test_a_refused_key_is_a_service_failure(endpoint: Endpoint) -> None:
    """Statuses mean in a stream what they mean without."""
    reader = Reader()
    async with started(reader) as extractor:
        with pytest.raises(ServiceFailure):
            await extractor.stream(f"{PEOPLE} [[401]]", None, reader.publish)


async def test_an_invalid_element_is_asked_again_with_a_new_id(endpoint: Endpoint) -> None:
    """Nothing behind it goes out; the model is told what was wrong, and where; the tokens of the
    first answer are known."""
    reader = Reader()
    async with started(reader) as extractor:
        text = f"{PEOPLE} [[bad_element at=2, answer]]"
        outcome = await extractor.stream(text, None, reader.publish)
    assert isinstance(outcome, Extracted)
    assert reader.out == [*ALL[:2], *ALL[:3]]
    ids = [part.answer_id for part in reader.parts]
    assert len(set(ids[:2])) == 1
    assert set(ids[2:]) == {outcome.answer_id} != set(ids[:2])
    assert "records.2.name" in str(endpoint.requests[1].json["messages"][-1])
    assert reader.results == ["invalid", "validated"]
    spent = [event.tokens_output for event in reader.events if isinstance(event, Called)]
    assert outcome.provenance.tokens_output == sum(spent)
    assert all(spent)


@pytest.mark.parametrize(
    ("script", "reason", "out"),
    [
        ("bad_element at=1", Reason.INVALID, 1),
        ("truncate", Reason.TRUNCATED, 1),
        ("refuse", Reason.REFUSED, 0),
        ("content_filter", Reason.FILTERED, 0),
        ("no_json", Reason.INVALID, 0),
        ("invalid", Reason.INVALID, 0),
        ("policy", Reason.FILTERED, 0),
    ],
)
async def test_what_fails_for_good_is_rejected(
    endpoint: Endpoint, script: str, reason: Reason, out: int
) -> None:
    """With the reason that it has without streaming, and what was published stays unfinished."""
    reader = Reader()
    async with started(reader, reasks_max=0) as extractor:
        outcome = await extractor.stream(f"{PEOPLE} [[{script}]]", None, reader.publish)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == reason
    assert len(reader.parts) == out


@pytest.mark.parametrize(
    "content",
    [
        '{"records": [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 37}]} {"records": []}',
        '{"records": [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 37}]} or {} perhaps',
        '{"records": [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 37},]}',
        '{"records": [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 37}], "records": []}',
    ],
)
async def test_a_list_in_no_proper_answer_is_invalid(endpoint: Endpoint, content: str) -> None:
    """The whole is looked at before the last record goes out."""
    endpoint.script = lambda _: Step(content=content)
    reader = Reader()
    async with started(reader, reasks_max=0) as extractor:
        outcome = await extractor.stream(PEOPLE, None, reader.publish)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == Reason.INVALID


async def test_a_validator_that_raises_rejects_the_message(endpoint: Endpoint) -> None:
    """The user's code, and not the model, is at fault."""
    reader = Reader()
    record = "tests.support.records:RaisesInValidator"
    async with started(reader, record=record) as extractor:
        outcome = await extractor.stream(PEOPLE, None, reader.publish)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == Reason.USER_CODE


async def test_the_calls_time_counts_to_the_last_byte(endpoint: Endpoint) -> None:
    """A model that writes all the time, but too slowly, is cut off in the middle of its answer."""
    reader = Reader()
    async with started(reader, call_timeout_s=0.5) as extractor:
        with pytest.raises(TransientFailure, match="timeout"):
            await extractor.stream(f"{PEOPLE} [[answer piece_ms=60]]", None, reader.publish)


def _slowly(reader: Reader) -> Callable[[Part], Awaitable[None]]:
    async def publish(part: Part) -> None:
        await asyncio.sleep(0.4)
        await reader.publish(part)

    return publish


async def test_waiting_for_kafka_is_not_the_models_time(endpoint: Endpoint) -> None:
    """A publish that waits longer than a call may take ends no call."""
    reader = Reader()
    async with started(reader, call_timeout_s=0.8) as extractor:
        outcome = await extractor.stream(PEOPLE, None, _slowly(reader))
    assert isinstance(outcome, Extracted)
    assert outcome.earlier == 3


async def test_what_publish_raises_ends_the_call(endpoint: Endpoint) -> None:
    """It passes through unchanged, and the connection is let go."""
    reader = Reader()

    async def refuse(part: Part) -> None:
        raise OutputTooLarge

    async with started(reader) as extractor:
        with pytest.raises(OutputTooLarge):
            await extractor.stream(f"{PEOPLE} [[answer piece_ms=20]]", None, refuse)
        async with asyncio.timeout(5):
            while endpoint.in_flight:
                await asyncio.sleep(0.01)
    assert reader.results == ["cancelled"]


async def test_the_next_model_answers_under_an_id_of_its_own(endpoint: Endpoint) -> None:
    """What the first model had published belongs to no set that is completed; each record says
    whose it is."""
    reader = Reader()
    async with started(reader, model=["small", "large"], reasks_max=0) as extractor:
        text = f"{PEOPLE} [[small: bad_element at=2; large: answer]]"
        outcome = await extractor.stream(text, None, reader.publish)
    assert isinstance(outcome, Extracted)
    assert [part.provenance.model for part in reader.parts] == ["small"] * 2 + ["large"] * 3
    assert outcome.provenance.model == "large"
    assert outcome.answer_id not in {part.answer_id for part in reader.parts[:2]}
    assert reader.results == ["invalid", "validated"]


async def test_a_stream_is_not_read_beyond_its_bound(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A line without end, or content without end in proper events: a broken answer, said once."""
    line = b"data: " + b"x" * 10_000
    event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 400)
    events = (("content-type", "text/event-stream"),)
    for body in (line, event * 20):
        endpoint.script = lambda _, b=body: Step("given", body=b, headers=events)
        reader = Reader()
        async with started(reader, answer_max_bytes=4096) as extractor:
            for _ in range(2):
                with pytest.raises(TransientFailure, match="broken_answer"):
                    await extractor.stream(PEOPLE, None, reader.publish)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "answer_max_bytes" in caplog.text
