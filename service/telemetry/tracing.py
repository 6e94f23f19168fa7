"""Traces with OpenTelemetry: a span for each message, for its calls and for its publishes.

Rules of this file: no other file imports OpenTelemetry, whose packages are the extra `tracing`.
Where they are missing, importing this file raises `WrongSettings`, so it is imported only where
tracing is on. No text of a message or an answer, no key and no header but the trace's own goes into
a span. Names are those of the semantic conventions for messaging and gen_ai; names of our own begin
with `sluice.`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace

from service.core.errors import WrongSettings
from service.core.events import Called, Event, outcome_word
from service.core.messages import (
    Extracted,
    Headers,
    Message,
    Outcome,
    Postponed,
    Publishable,
    Rejected,
    Skipped,
)
from service.ports import Sink
from service.settings import Settings

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.propagators.textmap import Getter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
    from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
    from opentelemetry.semconv.attributes.service_attributes import SERVICE_NAME
    from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    raise WrongSettings(
        "telemetry.tracing needs OpenTelemetry, which is not installed: "
        "pip install 'kafka-sluice[tracing]'."
    ) from None

FLUSH_TIMEOUT_S = 3.0
"""How many seconds the stop waits until the last spans are sent, also where the endpoint is
gone."""

CHECK_TIMEOUT_S = 3.0
"""How many seconds `sluice check` waits for the collector, the exporter's own retries included."""

NO_ERRORS = frozenset({"validated", "unsure"})
"""Results that are no errors in a call's span; after an unsure answer the next model is asked."""

FINISH_REASONS: Mapping[str, str] = {"truncated": "length", "filtered": "content_filter"}
"""The finish reasons that follow from a call's result. For other results it is not known whether it
was `stop` or `tool_calls`, so none is set."""

log = logging.getLogger(__name__)

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of one process. The pipeline calls `follow` for each message; `observe` makes
    the spans of calls from events."""

    def __init__(self, settings: Settings, processor: SpanProcessor | None = None) -> None:
        """The SDK reads endpoint, headers, sampler and batches from OTEL_* variables.

        Raises `WrongSettings` where it cannot use them. With a `processor` the spans go to it and
        not to the thread that exports them.
        """
        self._output_topic = settings.output.topic
        self._dead_letter_topic = settings.dead_letters.topic
        self._retry_topic = settings.retries.topic or ""
        self._group = settings.kafka.group_id
        try:
            self._processor = processor or BatchSpanProcessor(OTLPSpanExporter())
            # `stop` shuts it down, in order and bounded; it must not happen again at exit.
            provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        except ValueError as error:
            why = str(error).rstrip(".")
            raise WrongSettings(
                f"telemetry.tracing: an OTEL_* environment variable has no usable value: {why}."
            ) from None
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("sluice")
        self._current: ContextVar[MessageTrace | None] = ContextVar("message", default=None)

    def follow(self, message: Message) -> MessageTrace:
        """Begin the span of a message, as a child of the span that its headers name."""
        span = self._tracer.start_span(
            f"process {message.partition.topic}",
            _PROPAGATOR.extract(message.headers, Context(), getter=_HEADERS),
            SpanKind.CONSUMER,
            {
                **_messaging("process", message.partition.topic),
                "messaging.consumer.group.name": self._group,
                "messaging.destination.partition.id": str(message.partition.partition),
                "messaging.kafka.offset": message.offset,
                "messaging.message.body.size": len(message.value or b""),
            },
        )
        return MessageTrace(self, span)

    def observe(self, event: Event) -> None:
        """Make a span for a call that ended. It belongs to the message whose task reports the
        event."""
        trace = self._current.get()
        if trace is not None and isinstance(event, Called):
            self._called(trace, event)

    def trace_id(self) -> str | None:
        """The trace id of the message in whose task this is called, for exemplars; None: its trace
        is not recorded."""
        trace = self._current.get()
        if trace is None or not trace.span.is_recording():
            return None
        return format_trace_id(trace.span.get_span_context().trace_id)

    async def stop(self) -> None:
        """Send the remaining spans within `FLUSH_TIMEOUT_S`; those not sent by then are lost."""
        # The SDK's own shutdown waits for half a minute and takes no other bound. So it runs in a
        # daemon thread, which the end of the process does not wait for.
        flush = threading.Thread(target=self._processor.shutdown, name="flush", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_TIMEOUT_S)
        if flush.is_alive():
            log.warning("the last spans could not be sent within %g s", FLUSH_TIMEOUT_S)

    @contextmanager
    def asking(self, trace: MessageTrace) -> Iterator[None]:
        """A context in which events belong to the message, also those of tasks started in it."""
        token = self._current.set(trace)
        try:
            yield
        finally:
            self._current.reset(token)

    def _called(self, trace: MessageTrace, called: Called) -> None:
        """Make the span of a call that has ended already; its start is dated back."""
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            f"chat {called.model}",
            trace.context,
            SpanKind.CLIENT,
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "openai",
                "gen_ai.request.model": called.model,
                "sluice.call.purpose": called.purpose,
                "sluice.call.result": called.result,
            },
            start_time=now_ns - int(called.duration_s * 1e9),
        )
        if called.tokens_input or called.tokens_output:
            span.set_attribute("gen_ai.usage.input_tokens", called.tokens_input)
            span.set_attribute("gen_ai.usage.output_tokens", called.tokens_output)
        if (reason := FINISH_REASONS.get(called.result)) is not None:
            span.set_attribute("gen_ai.response.finish_reasons", (reason,))
        if called.result not in NO_ERRORS:
            _failed(span, called.result)
        span.end(now_ns)

    def sending(self, trace: MessageTrace, outcome: Publishable) -> Span:
        """The span of one publish, from the hand-over to the acknowledgement."""
        topic = self._topic(outcome)
        attributes = _messaging("send", topic)
        if isinstance(outcome, Extracted) and len(outcome.records) != 1:
            attributes["messaging.batch.message_count"] = len(outcome.records)
        return self._tracer.start_span(
            f"send {topic}", trace.context, SpanKind.PRODUCER, attributes
        )

    def _topic(self, outcome: Publishable) -> str:
        match outcome:
            case Rejected():
                return self._dead_letter_topic
            case Postponed():
                return self._retry_topic
            case _:
                return self._output_topic


class MessageTrace:
    """`pipeline.Trace`: the span of one message."""

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing, self.span = tracing, span
        self.context = set_span_in_context(span, Context())

    def asking(self) -> AbstractContextManager[None]:
        return self._tracing.asking(self)

    async def publish(
        self, sink: Sink, message: Message, outcome: Publishable
    ) -> asyncio.Future[None]:
        """Publish so that the outputs name the span of this publish. A postponed message keeps its
        own headers."""
        if isinstance(outcome, Skipped):
            return await sink.publish(message, outcome)
        span = self._tracing.sending(self, outcome)
        try:
            acknowledged = await sink.publish(_carrying(message, span), outcome)
        except BaseException as error:
            _failed(span, type(error).__name__)
            span.end()
            raise
        acknowledged.add_done_callback(lambda future: _acknowledged(span, future))
        return acknowledged

    def ended(self, outcome: Outcome | None) -> None:
        word = "let_go" if outcome is None else outcome_word(outcome)
        self.span.set_attribute("sluice.outcome", word)
        if isinstance(outcome, Rejected):
            _failed(self.span, outcome.reason.value)
        self.span.end()


async def look_at_collector() -> tuple[str, ...]:
    """Sends an empty batch of spans to the configured collector, for `sluice check`. Returns what
    works, then what else to know."""
    exporter = OTLPSpanExporter(timeout=CHECK_TIMEOUT_S)
    result = await asyncio.to_thread(exporter.export, ())
    if result is SpanExportResult.SUCCESS:
        return ("a collector takes spans",)
    return (
        "OpenTelemetry is installed",
        "no collector takes spans: start one, or correct OTEL_EXPORTER_OTLP_ENDPOINT. A run works "
        "without one.",
    )


class _Headers(Getter[Headers]):
    """Reads a message's headers; the last one of a name counts, as everywhere in Kafka."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        for name, value in reversed(carrier):
            if name == key and value is not None:
                return [value.decode("ascii", "replace")]
        return None

    def keys(self, carrier: Headers) -> list[str]:
        return [name for name, _ in carrier]


_HEADERS = _Headers()


def _resource() -> Resource:
    """The service's name: OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES, else `sluice`."""
    given = OTELResourceDetector().detect()
    return Resource({SERVICE_NAME: "sluice"}).merge(given)


def _messaging(operation: str, topic: str) -> dict[str, str | int]:
    return {
        "messaging.system": "kafka",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": topic,
    }


def _carrying(message: Message, span: Span) -> Message:
    """The message with this span in its trace headers, so that its outputs continue from it."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    return replace(message, trace=tuple((name, value.encode()) for name, value in carrier.items()))


def _acknowledged(span: Span, future: asyncio.Future[None]) -> None:
    if future.cancelled():
        _failed(span, "cancelled")
    elif (failure := future.exception()) is not None:
        _failed(span, type(failure).__name__)
    span.end()


def _failed(span: Span, error: str) -> None:
    span.set_attribute(ERROR_TYPE, error)
    span.set_status(StatusCode.ERROR)
