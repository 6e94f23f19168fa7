"""A message's trace, under virtual time: its spans, and what stands in its outputs."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, messaging_attributes
from opentelemetry.trace import SpanKind, StatusCode

from service.core.errors import PublishFailed, TransientFailure, WrongSettings
from service.core.events import Called, CallResult, Event, Purpose
from service.core.messages import Extracted, Headers, Rejected
from service.pipeline import Pipeline
from service.settings import Settings
from service.telemetry.tracing import Tracing
from tests.pipeline.test_way import BOUNDS, Stage
from tests.support.fakes import FakeExtractor, FakeStreams, partition

CANARY = "canary"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN: Headers = (
    ("traceparent", f"00-{TRACE}-{PARENT}-01".encode()),
    ("tracestate", b"vendor=1"),
)


class TellingExtractor(FakeExtractor):
    """Tells of each call as the real one does, from within it."""

    observe: Callable[[Event], None]
    result: CallResult = "validated"
    purpose: Purpose = "first"

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        result: CallResult = "server_error"
        try:
            answer = await super().call(text, progress)
            result = self.result
            return answer
        finally:
            self.observe(Called("m", result, 0.1, 7, 3, purpose=self.purpose))

    async def probe(self, route: str = "") -> None:
        self.observe(Called("m", "validated", 0.1, purpose="probe"))
        await super().probe()


class Traced(Stage):
    """A stage whose messages are followed; spans are kept in memory."""

    def __init__(self, partitions: int = 1) -> None:
        self.exporter = InMemorySpanExporter()
        settings = Settings.model_validate(
            {
                "kafka": {"group_id": "readers"},
                "input": {"topics": ["in"]},
                "output": {"topic": "out"},
                "dead_letters": {"topic": "dead"},
                "extraction": {"model": "m", "record": "service.demo.records:Person"},
            }
        )
        self.tracing = Tracing(settings, SimpleSpanProcessor(self.exporter))
        self.trace_ids: list[str | None] = []
        self.streams: FakeStreams | None = None
        super().__init__(partitions, BOUNDS)

    def new_pipeline(self, **more: Any) -> Pipeline:
        self.telling = self.extractor = TellingExtractor()
        self.telling.observe = self.observe
        own = {"streams": self.streams, "follow": self.tracing.follow}
        return super().new_pipeline(**own, **more)

    def observe(self, event: Event) -> None:
        super().observe(event)
        self.tracing.observe(event)
        if isinstance(event, Called):
            self.trace_ids.append(self.tracing.trace_id())

    def append(self, text: str, headers: Headers = (), number: int = 0) -> None:
        self.broker.logs[partition(number)].append(text.encode(), CANARY.encode(), headers)

    def spans(self, start: str = "") -> list[ReadableSpan]:
        found = self.exporter.get_finished_spans()
        return [span for span in found if span.name.startswith(start)]

    def span(self, start: str) -> ReadableSpan:
        [found] = self.spans(start)
        return found

    def traces(self) -> list[Headers]:
        """What outcomes were published with."""
        return [message.trace for message, _ in self.broker.published]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    stage = Traced()
    yield stage
    spans = stage.spans()
    written = "".join(span.to_json() for span in spans)
    assert CANARY not in written, "a text or a key of a message is in a span"
    known = {
        value
        for module in (messaging_attributes, gen_ai_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    used = {name for span in spans for name in span.attributes or ()}
    assert {n for n in used if n.startswith(("messaging.", "gen_ai."))} <= known


def identity(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_a_producers_trace_goes_through(traced: Traced) -> None:
    """message under the producer's span, call and publish under the message's, and the output
    names the publish; the vendor's state goes along."""
    traced.append(f"a text {CANARY}", GIVEN)
    assert traced.show()
    message, call, send = traced.span("process"), traced.span("chat"), traced.span("send")
    assert {TRACE} == {identity(span)[0] for span in (message, call, send)}
    assert [PARENT, identity(message)[1], identity(message)[1]] == list(
        map(parent, (message, call, send))
    )
    assert [span.kind for span in (message, call, send)] == [
        SpanKind.CONSUMER,
        SpanKind.CLIENT,
        SpanKind.PRODUCER,
    ]
    assert traced.traces() == [
        (
            ("traceparent", f"00-{TRACE}-{identity(send)[1]}-01".encode()),
            ("tracestate", b"vendor=1"),
        )
    ]
    assert traced.trace_ids == [TRACE]


def test_spans_say_what_the_conventions_say(traced: Traced) -> None:
    """Each span's attributes, complete."""
    traced.append("a text")
    traced.show()
    kafka = {"messaging.system": "kafka"}
    assert attributes(traced.span("process in")) == kafka | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "in",
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": "readers",
        "messaging.kafka.offset": 0,
        "messaging.message.body.size": 6,
        "sluice.outcome": "extracted",
    }
    assert attributes(traced.span("chat m")) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "sluice.call.purpose": "first",
        "sluice.call.result": "validated",
    }
    assert attributes(traced.span("send out")) == kafka | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "out",
    }
    assert traced.span("chat").resource.attributes["service.name"] == "sluice"


@pytest.mark.parametrize(
    "headers", [(), (("traceparent", b"00-\xff-1"),), (("traceparent", None),)]
)
def test_a_message_without_a_trace_begins_one(traced: Traced, headers: Headers) -> None:
    """No header, or none that can be read: a trace of its own, and each message another."""
    traced.append("one", headers)
    traced.append("two", headers)
    traced.show()
    messages = traced.spans("process")
    assert list(map(parent, messages)) == [None, None]
    assert len({identity(span)[0] for span in messages}) == 2


def test_a_trace_that_is_not_sampled_goes_on_unseen(traced: Traced) -> None:
    """The producer's decision holds: no span, no exemplar, and outputs still carry its trace."""
    traced.append("a text", (("traceparent", f"00-{TRACE}-{PARENT}-00".encode()),))
    traced.show()
    assert traced.spans() == []
    assert traced.trace_ids == [None]
    [((_, value), *_)] = traced.traces()
    assert value is not None
    assert value.startswith(f"00-{TRACE}-".encode())
    assert value.endswith(b"-00")


def test_a_failed_call_and_its_repetition_are_two_spans(traced: Traced) -> None:
    """Each attempt is a call of the same message, the failed one with the reason."""
    traced.append("a text")
    traced.extractor.scripts["a text"] = [TransientFailure("server_error")]
    traced.show()
    first, second = traced.spans("chat")
    assert attributes(first)["error.type"] == "server_error"
    assert first.status.status_code is StatusCode.ERROR
    assert "error.type" not in attributes(second)
    assert parent(first) == parent(second) == identity(traced.span("process"))[1]


def test_calls_belong_to_their_own_messages(traced: Traced) -> None:
    """Calls that run at once, and calls begun by another's end, keep to their messages."""
    for n in range(12):
        traced.append(f"text {n}")
    traced.show()
    messages = {identity(span)[1] for span in traced.spans("process")}
    assert len(messages) == 12
    assert sorted(messages) == sorted(str(parent(span)) for span in traced.spans("chat"))
    assert sorted(messages) == sorted(str(parent(span)) for span in traced.spans("send"))


def test_calls_in_tasks_of_their_own_are_found_too() -> None:
    """With a time limit or a second call beside the first, each is a call of the message."""
    traced = Traced()
    traced.bounds = replace(BOUNDS, hedge_after_s=1.0, message_timeout_s=60.0)
    traced.pipeline = traced.new_pipeline()
    for n in range(60):  # hedges are a share of the calls
        traced.append(f"text {n}")
    traced.extractor.latency_s = lambda text: 5.0 if text == "text 59" else 0.1
    traced.show()
    slow = next(
        identity(span)[1]
        for span in traced.spans("process")
        if attributes(span)["messaging.kafka.offset"] == 59
    )
    assert [parent(span) for span in traced.spans("chat")].count(slow) == 2


def test_a_cut_answer_tells_why_it_ended(traced: Traced) -> None:
    """The finish reason is said where the result tells it."""
    traced.telling.result = "truncated"
    traced.append("a text")
    traced.show()
    assert attributes(traced.span("chat"))["gen_ai.response.finish_reasons"] == ("length",)


def test_a_dead_letter_carries_the_trace(traced: Traced) -> None:
    """A rejected message's span says why, and its letter names the publish to its topic."""
    traced.append("bad", GIVEN)
    traced.show()
    message, send = traced.span("process"), traced.span("send dead")
    assert attributes(message)["error.type"] == "undecodable"
    assert attributes(message)["sluice.outcome"] == "rejected"
    assert traced.traces()[0][0] == (
        "traceparent",
        f"00-{TRACE}-{identity(send)[1]}-01".encode(),
    )


def test_a_skipped_message_has_no_publish(traced: Traced) -> None:
    """Nothing is sent, so no span says so."""
    traced.append("skip")
    traced.show()
    assert [attributes(span)["sluice.outcome"] for span in traced.spans()] == ["skipped"]


def test_a_failed_publish_and_the_next_are_two_spans(traced: Traced) -> None:
    """The output names the one that landed."""
    traced.append("a text")
    traced.sink.failures[0] = [PublishFailed("down")]
    traced.show()
    first, second = traced.spans("send")
    assert attributes(first)["error.type"] == "PublishFailed"
    assert f"-{identity(second)[1]}-".encode() in (traced.traces()[-1][0][1] or b"")


def test_what_is_lost_ends_unfinished(traced: Traced) -> None:
    """A partition that goes takes its messages' spans to their end; none is kept."""
    traced.append("a text")
    traced.extractor.latency_s = lambda _: 100.0

    async def lose() -> None:
        await asyncio.sleep(1)
        await traced.source.rebalance()
        assert attributes(traced.span("process"))["sluice.outcome"] == "let_go"

    traced.show(lose)
    assert traced.pipeline._publishing.traces == {}


def test_what_is_let_go_of_at_the_stop_ends_too(traced: Traced) -> None:
    """Queued messages are forgotten at a stop and their spans are not, before the drain's end."""
    for n in range(8):
        traced.append(f"text {n}")

    async def stop_soon() -> None:
        await asyncio.sleep(0.05)

    traced.show(stop_soon)
    outcomes = [attributes(span)["sluice.outcome"] for span in traced.spans("process")]
    assert outcomes == ["let_go"] * 4 + ["extracted"] * 4


def test_calls_outside_of_messages_are_no_spans(traced: Traced) -> None:
    """A probe stands for nobody, even where the end of a message's call has started it."""
    traced.append("a text")
    traced.extractor.scripts["a text"] = [TransientFailure("connection")] * 8
    traced.show()
    probes = [e for e in traced.events if isinstance(e, Called) and e.purpose == "probe"]
    assert probes, "the circuit never opened"
    assert all(attributes(each)["sluice.call.purpose"] != "probe" for each in traced.spans("chat"))
    told = [e for e in traced.events if isinstance(e, Called)]
    at_probes = [i for i, e in zip(traced.trace_ids, told, strict=True) if e.purpose == "probe"]
    assert set(at_probes) == {None}


def test_records_of_a_stream_carry_the_trace_each() -> None:
    """With streaming there is a publish for each record, each named by its own output."""
    traced = Traced()
    traced.streams = FakeStreams(records=3)
    traced.bounds = replace(BOUNDS, ordering="none")
    traced.sink.streaming = True
    traced.pipeline = traced.new_pipeline()
    traced.append("a text", GIVEN)
    traced.show()
    sent = [identity(span)[1].encode() for span in traced.spans("send")]
    named = [(trace[0][1] or b"").split(b"-")[2] for trace in traced.traces()]
    assert len(sent) >= 3
    assert sorted(sent) == sorted(named)


def test_an_endpoint_that_hangs_does_not_hold_the_stop(
    traced: Traced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop is bounded, and says that spans were lost."""
    monkeypatch.setattr("service.telemetry.tracing.FLUSH_TIMEOUT_S", 0.05)
    hanging = threading.Event()
    monkeypatch.setattr(traced.tracing._processor, "shutdown", lambda: hanging.wait(30) and None)
    with caplog.at_level(logging.WARNING):
        asyncio.run(traced.tracing.stop())
    hanging.set()
    assert "could not be sent" in caplog.text


def test_an_unusable_variable_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the SDK cannot read of OTEL_* is a wrong setting, not a stack trace."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(WrongSettings, match=r"OTEL_.*positive integer\.$"):
        Tracing(Settings.model_construct())
