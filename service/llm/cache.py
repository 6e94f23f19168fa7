"""The result cache: a text that has an answer is not asked for again, and one in flight only once.

It stands around an extractor and is one itself. Keys are hashes of the text together with all
else that decides an answer, so that no text can be read from a store; values hold the records'
JSON in clear and deserve what the output topic deserves. Only validated answers are kept, never
rejections, and an answer is stored before its message can be published: a replay after a crash
finds it.

Single flight: messages of the same text that are called at once wait for one call, in a task of
its own which goes on when the message that began it is revoked, and is cut off when nobody waits
any more. The first of those that still wait takes the cost on itself, so that headers add up to
what was paid; the others cost nothing. Each of them holds the slot that it was admitted to. That
can't deadlock, since the call itself needs no slot and its end frees them all, and there are
never more calls than slots, since every call has somebody who waits; but a burst of one text
keeps as many slots from others as it has messages, for the time of one call at most.

Answer ids: each message gets one of its own, each time that it is given an answer. A reader
(docs/guarantees.md, "Reading each outcome once") collects records by answer id and drops repeats
by message: two messages with one id would be mixed into one set. A replay under a new id is a
complete set of its own, which is taken where the crash had cut the first one short, and dropped
otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from service.core.admission.budgets import Estimate
from service.core.errors import CallFailure, NoRoom, ServiceFailure, TransientFailure, Unclear
from service.core.events import CacheLooked, CacheLookup, CacheWritten, Observe
from service.core.messages import Extracted, Provenance, Rejected
from service.llm.records import new_answer_id
from service.llm.stores import Store, StoreFailed, open_store
from service.ports import Extractor
from service.settings import CacheSettings

FORMAT = b"1"
"""Of keys and values: raise it with any change that an older version would misread."""
_SEAL_BYTES = 16
"""128 bits: enough that damage is found; it is no defence against whoever may write the store."""


class ModelExtractor(Extractor, Protocol):
    """An extractor with a life, and a name for all that decides its answers beside the text."""

    @property
    def identity(self) -> str: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def check(self) -> str | None: ...


def cached(inner: ModelExtractor, settings: CacheSettings, observe: Observe) -> ModelExtractor:
    """`inner`, with the cache around it that the settings ask for. Raises `WrongSettings`."""
    if settings.mode == "off":
        return inner
    return CachedExtractor(inner, open_store(settings, observe), observe)


@dataclass(eq=False, slots=True)
class _Flight:
    """One text that is being looked up or asked for, and who waits for what comes of it."""

    landed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    paid: bool = False  # the answer is there: cutting the flight off would save nothing
    claimed: bool = False  # a message has taken cost and progress
    outcome: Extracted | Rejected | Exception | None = None

    def hand_out(self, progress: object | None) -> Extracted | Rejected:
        """What one message gets of it; raises what the call raised. The first gets it whole."""
        first, self.claimed = not self.claimed, True
        match self.outcome:
            case None:
                raise asyncio.CancelledError  # from within: the pipeline takes it for a fault
            case CallFailure() as failure:
                raise failure if first else _theirs(failure, progress)
            case Exception() as error:
                raise error
            case outcome if first:
                return outcome
            case Extracted() as outcome:
                return replace(
                    outcome, provenance=free(outcome.provenance), answer_id=new_answer_id()
                )
            case Rejected() as outcome:
                spent = outcome.provenance
                return replace(outcome, provenance=None if spent is None else free(spent))


class CachedExtractor:
    """`pipeline.Extractor` around another one. `start` and `stop` belong to one task."""

    def __init__(self, inner: ModelExtractor, store: Store, observe: Observe) -> None:
        self._inner, self._store, self._observe = inner, store, observe
        self._flights: dict[str, _Flight] = {}
        self._tasks = asyncio.TaskGroup()

    @property
    def identity(self) -> str:
        return self._inner.identity

    @cached_property
    def _keys(self) -> hashlib._Hash:
        """What all keys begin with; made at the first, as the start may find out the model."""
        return hashlib.sha256(FORMAT + _framed(self.identity))

    async def start(self) -> None:
        await self._tasks.__aenter__()  # left in `stop`: an app's life is no one block
        await self._inner.start()
        await self._store.start()

    async def stop(self) -> None:
        """Cut off what still flies; what is paid for is stored first, which is bounded."""
        for key, flight in tuple(self._flights.items()):
            self._cut_off(key, flight)
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            await self._store.stop()
            await self._inner.stop()

    async def check(self) -> str | None:
        return await self._inner.check()

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """As the extractor within, whose failures it passes on, each message with its progress.

        Cancellation leaves the call to the others who wait for it. An answer from the store
        counts nothing of what earlier, failed attempts of its message may have cost.
        """
        key = self._key(text)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._take_off(key, text, progress)
        else:
            self._observe(CacheLooked("shared"))
        flight.waiting += 1
        try:
            await flight.landed.wait()
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                self._cut_off(key, flight)
        return flight.hand_out(progress)

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """A call's; what comes from the store is given back when it has come."""
        return self._inner.estimate(text, progress)

    def route(self, progress: object | None) -> str:
        return self._inner.route(progress)

    async def probe(self, route: str) -> None:
        await self._inner.probe(route)

    def _key(self, text: str) -> str:
        key = self._keys.copy()
        key.update(_framed(text))
        return key.hexdigest()

    # --- flights ---------------------------------------------------------------------------------

    def _take_off(self, key: str, text: str, progress: object | None) -> _Flight:
        flight = self._flights[key] = _Flight()
        flight.task = self._tasks.create_task(self._fly(flight, key, text, progress))
        return flight

    def _cut_off(self, key: str, flight: _Flight) -> None:
        """Nobody waits for it; a later message of this text begins anew."""
        if flight.paid:
            return
        assert flight.task is not None, "took off without a task"
        flight.task.cancel()
        self._land(key, flight)

    def _land(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fly(self, flight: _Flight, key: str, text: str, progress: object | None) -> None:
        try:
            flight.outcome = await self._outcome(flight, key, text, progress)
        except Exception as error:  # raised again by everyone who waits
            flight.outcome = error
        finally:
            flight.paid = True
            self._land(key, flight)
            flight.landed.set()

    async def _outcome(
        self, flight: _Flight, key: str, text: str, progress: object | None
    ) -> Extracted | Rejected:
        if (stored := await self._look_up(key)) is not None:
            return stored
        outcome = await self._inner.call(text, progress)
        flight.paid = True
        if isinstance(outcome, Extracted):
            await self._keep(key, outcome)
        return outcome

    # --- the store -------------------------------------------------------------------------------

    async def _look_up(self, key: str) -> Extracted | None:
        """A store that fails, and a value that is not ours, are as good as nothing."""
        found: Extracted | None = None
        result: CacheLookup = "miss"
        try:
            value = await self._store.get(key)
        except StoreFailed:
            result = "error"
        else:
            if value is not None:
                found = unpacked(key, value)
                result = "damaged" if found is None else "hit"
        self._observe(CacheLooked(result))
        return found

    async def _keep(self, key: str, outcome: Extracted) -> None:
        try:
            kept = await self._store.put(key, packed(key, outcome))
        except StoreFailed:
            self._observe(CacheWritten("error"))
        else:
            self._observe(CacheWritten("stored" if kept else "too_large"))


def _theirs(failure: CallFailure, progress: object | None) -> CallFailure:
    """The same failure for another message: its own progress, nothing spent, told before."""
    spent = None if failure.provenance is None else free(failure.provenance)
    other: CallFailure
    if isinstance(failure, ServiceFailure):
        kind = Unclear if isinstance(failure, Unclear) else ServiceFailure
        other = kind(failure.reason, remedy=failure.remedy, progress=progress, provenance=spent)
    elif isinstance(failure, NoRoom):
        other = NoRoom(progress=progress, provenance=spent)
    else:
        other = TransientFailure(
            failure.reason,
            retry_after_s=failure.retry_after_s,
            progress=progress,
            provenance=spent,
        )
    other.shared, other.route = True, failure.route
    return other


def _framed(text: str) -> bytes:
    """With its length before it, so that no two lists of texts are the same bytes."""
    encoded = text.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(encoded), encoded)


# --- what a value looks like -------------------------------------------------------------------

_ANSWER = TypeAdapter(Extracted)

_COSTS: dict[str, Any] = {
    each.name: each.default
    for each in fields(Provenance)
    if each.name.startswith(("calls", "tokens", "cost")) and each.default is not MISSING
}


def free(provenance: Provenance) -> Provenance:
    """The same origin, at no cost."""
    return replace(provenance, **_COSTS, cached=True)


def packed(key: str, answer: Extracted) -> bytes:
    """A seal over key and content, a space, the answer as JSON; without its id and its cost."""
    kept = replace(answer, provenance=free(answer.provenance), answer_id="")
    content = _ANSWER.dump_json(kept)
    return _seal(key, content) + b" " + content


def unpacked(key: str, value: bytes) -> Extracted | None:
    """The answer under an id of its own; None for what is damaged, foreign or another key's."""
    seal, _, content = value.partition(b" ")
    if seal != _seal(key, content):
        return None
    try:
        answer = _ANSWER.validate_json(content, strict=True)
    except ValidationError:
        return None  # sealed by a version whose answers have another shape
    return replace(answer, answer_id=new_answer_id())


def _seal(key: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(content, digest_size=_SEAL_BYTES, key=key.encode(), person=FORMAT)
    return digest.hexdigest().encode()
