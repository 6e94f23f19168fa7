"""From an outcome to the headers of its outputs: pure functions."""

from typing import TypeAlias

from service.core.history import (
    ID_HEADER,
    TOPIC_ID_HEADER,
    first_timestamp_ms,
    origin,
    origin_topic_id,
)
from service.core.messages import Aborted, Extracted, Headers, Message, Part, Provenance

HeaderList: TypeAlias = list[tuple[str, bytes | None]]

OUR_PREFIXES = ("sluice.", "__dlq.errors.")
"""Header names that begin so are ours to write; an input's own are not carried into outputs."""
TRACE_HEADERS = ("traceparent", "tracestate")
"""The W3C gives these names. Both headers are replaced where there is a trace of ours, which
follows the input's."""
AT_THE_END = ("sluice.record.count", "sluice.tokens", "sluice.cost")
"""The names of headers that are known only once an answer has ended begin so."""


def record_headers(message: Message, extracted: Extracted, index: int) -> HeaderList:
    """The headers of record `index` of a message: the input's own, then where it came from."""
    provenance = extracted.provenance
    headers = _carried(message)
    headers += (
        (ID_HEADER, b"%b:%d" % (origin(message), extracted.earlier + index)),
        ("sluice.answer.id", extracted.answer_id.encode()),
        *_source_headers(message),
        ("sluice.record.index", b"%d" % (extracted.earlier + index)),
        ("sluice.record.count", b"%d" % (extracted.earlier + len(extracted.records))),
        *provenance_headers(provenance),
    )
    return headers


def provenance_headers(provenance: Provenance) -> HeaderList:
    """Where an answer came from and what it cost; the cost only where all of it is known."""
    headers: HeaderList = [
        ("sluice.model", provenance.model.encode()),
        ("sluice.prompt.version", provenance.prompt_version.encode()),
        ("sluice.schema.version", provenance.schema_version.encode()),
        ("sluice.tokens.input", b"%d" % provenance.tokens_input),
        ("sluice.tokens.output", b"%d" % provenance.tokens_output),
        ("sluice.tokens.cached", b"%d" % provenance.tokens_cached),
        ("sluice.tokens.reasoning", b"%d" % provenance.tokens_reasoning),
        ("sluice.cached", b"true" if provenance.cached else b"false"),
    ]
    if not provenance.calls_unpriced:
        headers.append(("sluice.cost.usd", _dollars(provenance.cost_usd)))
        if len(provenance.cost_by_model) > 1:
            parts = (f"{model}={_dollars(usd).decode()}" for model, usd in provenance.cost_by_model)
            headers.append(("sluice.cost.models", ", ".join(parts).encode()))
    if provenance.text_cut is not None:
        headers.append(("sluice.text.cut", str(provenance.text_cut).encode()))
    return headers


def _dollars(cost_usd: float) -> bytes:
    """Without an exponent: a single cheap token costs about a hundred millionth."""
    return f"{cost_usd:.10f}".rstrip("0").rstrip(".").encode()


def part_headers(message: Message, part: Part) -> HeaderList:
    """As `record_headers`, without what only the end of the answer tells: it makes the last
    record the one with a count."""
    alone = Extracted((part.record,), part.provenance, part.answer_id, earlier=part.index)
    headers = record_headers(message, alone, 0)
    return [header for header in headers if not header[0].startswith(AT_THE_END)]


def aborted_headers(message: Message, aborted: Aborted) -> HeaderList:
    """The headers of a closing marker: `sluice.record.aborted` says how many records went out."""
    return [
        *_carried(message),
        *_source_headers(message),
        (ID_HEADER, origin(message) + b":aborted"),
        ("sluice.answer.id", aborted.answer_id.encode()),
        ("sluice.record.aborted", b"%d" % aborted.records),
    ]


def tombstone_headers(message: Message) -> HeaderList:
    """The headers of a tombstone that is handed on: no model has seen it."""
    return [
        *_carried(message),
        (ID_HEADER, b"%b:0" % origin(message)),
        *_source_headers(message),
    ]


def _source_headers(message: Message) -> HeaderList:
    """Where the message stands; the topic's id is that of the topic in `sluice.id`."""
    topic_id = origin_topic_id(message)
    return [
        *(((TOPIC_ID_HEADER, topic_id),) if topic_id else ()),
        ("sluice.source.topic", message.partition.topic.encode()),
        ("sluice.source.partition", b"%d" % message.partition.partition),
        ("sluice.source.offset", b"%d" % message.offset),
        ("sluice.source.timestamp", b"%d" % first_timestamp_ms(message)),
    ]


def _carried(message: Message) -> HeaderList:
    """The message's own headers, in the trace of what was done with it, where there is one."""
    headers = own_headers(message.headers)
    if not message.trace:
        return headers
    return [*(each for each in headers if each[0] not in TRACE_HEADERS), *message.trace]


def own_headers(headers: Headers) -> HeaderList:
    """An input's headers without ours, so that a second pass does not pile them up."""
    return [header for header in headers if not header[0].startswith(OUR_PREFIXES)]
