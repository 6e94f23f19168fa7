"""`sluice check`: one line for each thing that a run needs: ✓, or what to do. It changes
nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias

from service.core.errors import CallFailure, CannotRun, ServiceFailure, Stop, WrongSettings
from service.core.messages import Extracted, Reason, Rejected
from service.core.words import how_many
from service.kafka.client.connection import reach
from service.kafka.client.groups_seen import look_at_group
from service.kafka.client.topics_seen import Operation, look_at_topics
from service.kafka.group.outlook import look_ahead
from service.kafka.provisioning import DEAD_LETTER_ROOM_BYTES
from service.kafka.sending.sizes import record_max_bytes
from service.kafka.sink import DEADLINE_FACTOR
from service.kafka.transactions.transactions import PREFIX, try_transactions
from service.llm.extractor import OpenAIExtractor
from service.llm.records import load_record_type
from service.llm.stores import look_at_store
from service.settings import Settings, warnings

SAMPLE = "Ada Lovelace was 36 years old."
"""The text of the real call that `--call` makes."""
SAMPLES_OWN = frozenset({Reason.INVALID, Reason.REFUSED, Reason.FILTERED, Reason.USER_CODE})
"""Reasons for which the sample may be rejected although the topic's own texts would not be."""

Say: TypeAlias = Callable[[str], None]
Look: TypeAlias = Callable[[Settings], Awaitable[tuple[str, ...]]]
"""Checks one thing. It returns a sentence on what works, then further remarks, and raises `Stop`
with what to do where something does not work."""


def check(settings: Settings, *, call: bool, origin: str = "defaults", say: Say = print) -> int:
    """Check everything in the order in which a run needs it; returns the exit code.

    `call` makes one real call to the model, which costs its tokens. `origin` says where the
    settings come from.
    """
    return asyncio.run(_check(settings, call, origin, say))


async def _check(settings: Settings, call: bool, origin: str, say: Say) -> int:
    report = _Report(say)
    report.good("settings", (f"understood: {origin}", *warnings(settings)))
    has_record = await report.look("record", _record, settings)
    in_kafka = _IN_KAFKA if settings.delivery.mode == "at_least_once" else (*_IN_KAFKA, _ONCE)
    if await report.look("broker", _broker, settings):
        for name, look in in_kafka:
            await report.look(name, look, settings)
    else:
        for name, _ in in_kafka:
            say(f"- {name:<12} not checked: no broker")
    if has_record:
        await report.look("model", _call if call else _model, settings)
    else:
        say(f"- {'model':<12} not checked: no record")
    if settings.cache.mode != "off":
        await report.look("cache", _cache, settings)
    if settings.telemetry.tracing:
        await report.look("traces", _traces, settings)
    return report.code


class _Report:
    """Prints a line for each thing and keeps the worst exit code."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.code = 0

    def good(self, name: str, lines: Iterable[str]) -> None:
        first, *besides = lines
        self._say(f"✓ {name:<12} {first}")
        for line in besides:
            self._say(f"! {name:<12} {line}")

    async def look(self, name: str, look: Look, settings: Settings) -> bool:
        try:
            self.good(name, await look(settings))
        except Stop as stop:
            self._say(f"✗ {name:<12} {stop}")
            self.code = max(self.code, 2 if isinstance(stop, WrongSettings) else 1)
            return False
        return True


async def _record(settings: Settings) -> tuple[str, ...]:
    extraction = settings.extraction
    record = load_record_type(extraction.record, extraction.cardinality, settings.output.key_field)
    fields = ", ".join(record.schema.get("properties", ())) or "no fields"
    many = "any number" if record.many else "one"
    return (f"{extraction.record}, {many} for each message: {fields}",)


# --- Kafka ------------------------------------------------------------------------------------


async def _broker(settings: Settings) -> tuple[str, ...]:
    await reach(settings.kafka)
    return (f"{settings.kafka.bootstrap_servers} lets us in",)


async def _topics(settings: Settings) -> tuple[str, ...]:
    topics = await look_at_topics(settings.kafka, _names(settings))
    missing = [topic.name for topic in topics.values() if not topic.partitions]
    if missing:
        raise CannotRun(
            f"missing: {', '.join(missing)}. Make them with `sluice topics create`, or correct the "
            "names"
        )
    counts = ", ".join(f"{topic.name} ({topic.partitions})" for topic in topics.values())
    return (f"all there, partitions in brackets: {counts}", *await _sizes(settings))


async def _sizes(settings: Settings) -> tuple[str, ...]:
    """A dead letter is larger than its message. Remarks on input topics whose messages may be too
    large for the dead letter topic."""
    letters = await record_max_bytes(settings.kafka, settings.dead_letters.topic)
    found = []
    for name in settings.input.topics:
        size = await record_max_bytes(settings.kafka, name)
        if size is not None and letters is not None and letters < size + DEAD_LETTER_ROOM_BYTES:
            found.append(
                f"{settings.dead_letters.topic} takes {letters} bytes and {name} up to {size}: a "
                "dead letter of a large message loses the model's answer, or waits; set "
                f"max.message.bytes to {size + DEAD_LETTER_ROOM_BYTES} or more"
            )
    return tuple(found)


async def _permissions(settings: Settings) -> tuple[str, ...]:
    topics = await look_at_topics(settings.kafka, _names(settings))
    wanted: list[tuple[str, Operation]] = [(name, "READ") for name in settings.input.topics]
    wanted += [(settings.output.topic, "WRITE"), (settings.dead_letters.topic, "WRITE")]
    if (retries := settings.retries.topic) is not None:
        wanted += [(retries, "READ"), (retries, "WRITE")]
    denied = [f"{need} on {name}" for name, need in wanted if not topics[name].allows(need)]
    if denied:
        raise CannotRun(f"missing: {', '.join(denied)}. Let an administrator grant them")
    if any(topic.may is None for topic in topics.values()):
        return ("nothing is refused, as far as this broker tells",)
    return ("the input may be read, output and dead letters written",)


async def _group(settings: Settings) -> tuple[str, ...]:
    group = await look_at_group(settings.kafka)
    name = settings.kafka.group_id
    if group.may is not None and "READ" not in group.may:
        raise CannotRun(f"missing: READ on group {name}. Let an administrator grant it")
    if group.members is None:
        return (f"{name} is not refused, as far as this broker tells",)
    present = await look_at_topics(settings.kafka, settings.topics_read)
    if not all(topic.partitions for topic in present.values()):
        return (f"{name} may be used; where it starts shows once its topics are there",)
    ahead = await look_ahead(settings)
    if ahead.problems:
        more = len(ahead.problems) - 1
        raise CannotRun(
            ahead.problems[0] + (f" And {how_many(more, 'more partition')}." if more else "")
        )
    if ahead.new and not group.members:
        return (
            f"{name} has no offsets: it starts at {settings.input.start} and reads what "
            f"is there now, {how_many(ahead.messages, 'message')}",
        )
    besides: tuple[str, ...] = ()
    if ahead.unknown:
        besides = (
            f"{name} has no offsets for {how_many(ahead.unknown, 'partition')}: what is there now "
            f"is read from the log's start, {how_many(ahead.messages, 'message')}",
        )
    if group.members:
        members = (
            f"{name} has {how_many(group.members, 'member')} now; partitions are shared with them"
        )
        return (members, *besides)
    return (f"{name} has no members now and goes on where it stopped", *besides)


async def _transactions(settings: Settings) -> tuple[str, ...]:
    kafka = settings.kafka
    await try_transactions(kafka, DEADLINE_FACTOR * kafka.request_timeout_s)
    return (f"allowed to {PREFIX}-{kafka.group_id}:…, and for as long as they may take",)


def _names(settings: Settings) -> tuple[str, ...]:
    return (*settings.topics_read, settings.output.topic, settings.dead_letters.topic)


_IN_KAFKA: tuple[tuple[str, Look], ...] = (
    ("topics", _topics),
    ("permissions", _permissions),
    ("group", _group),
)
_ONCE: tuple[str, Look] = ("transactions", _transactions)


# --- the model --------------------------------------------------------------------------------


async def _model(settings: Settings) -> tuple[str, ...]:
    async with _extractor(settings) as extractor:
        warning = await extractor.check()
        models = ", ".join(extractor.models)
    well = f"the endpoint answers ({models}; --call makes one real call)"
    return (well, *filter(None, (warning, _not_strict(extractor))))


async def _call(settings: Settings) -> tuple[str, ...]:
    began_s = time.monotonic()
    async with _extractor(settings) as extractor:
        if not extractor.models:
            await extractor.check()
        outcome = await extractor.call(SAMPLE, None)
        besides = tuple(filter(None, (_not_strict(extractor),)))
    match outcome:
        case Extracted(records=records, provenance=spent):
            return (
                f"{spent.model} made {how_many(len(records), 'record')} of a sample in "
                f"{time.monotonic() - began_s:.1f} s: {spent.tokens_input} tokens in, "
                f"{spent.tokens_output} out, "
                + ("price not known" if spent.calls_unpriced else f"{spent.cost_usd:.6f} USD"),
                *besides,
            )
        case Rejected(reason=reason) if reason in SAMPLES_OWN:
            return (
                f"answers; the sample {SAMPLE!r} was rejected as {reason.value}, which may be its "
                "own fault: it may hold nothing that the record asks for",
                *besides,
            )
        case Rejected(reason=reason, detail=detail):
            raise CannotRun(
                f"the sample {SAMPLE!r} was rejected as {reason.value}, and any text would be: "
                f"{detail}"
            )


def _not_strict(extractor: OpenAIExtractor) -> str | None:
    """A remark where no strict schema is used although the settings allow one, and why."""
    lost = extractor.why_not_strict
    if lost is None:
        return None
    return f"the schema is sent without strict, since a strict one would lose something: {lost}"


# --- the cache --------------------------------------------------------------------------------


async def _cache(settings: Settings) -> tuple[str, ...]:
    return await look_at_store(settings.cache)


@asynccontextmanager
async def _extractor(settings: Settings) -> AsyncIterator[OpenAIExtractor]:
    extractor = OpenAIExtractor(settings, observe=lambda _: None)
    await extractor.start()
    try:
        yield extractor
    except ServiceFailure as failure:
        raise CannotRun(failure.remedy) from None
    except CallFailure as failure:
        raise CannotRun(
            f"the endpoint is there but fails now ({failure.reason}); a run would wait for it"
        ) from None
    finally:
        await extractor.stop()


# --- traces -----------------------------------------------------------------------------------


async def _traces(settings: Settings) -> tuple[str, ...]:
    from service.telemetry.tracing import look_at_collector  # an extra

    return await look_at_collector()
