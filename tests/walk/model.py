"""The model, and what pays for it: each message brings its own script of answers.

It sees what nobody else can: that an answer that was paid for is never asked for again while its
message is in the same hands.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from bisect import insort
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from service.core.admission.admission import Admission
from service.core.admission.budgets import Estimate
from service.core.errors import CallFailure, NoRoom, ServiceFailure, TransientFailure
from service.core.messages import Extracted, Part, Provenance, Reason, Record, Rejected
from service.ports import Publish
from tests.walk.ledger import Ledger
from tests.walk.loop import Violation

PROVENANCE = Provenance("walk", "p", "s", calls=1)
PROBE_S = 0.05

TURNS_BEHIND = 8
"""Turns of the loop at one instant by which the end of a call is put off at most: a restore needs
some from a broker's last answer to its end."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one call comes to: `kind` after `latency_s`; `retry_after_s` where it asks for that."""

    kind: str
    latency_s: float = 0.05
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """The calls of one message in order; after them it answers with `records` records."""

    uid: int
    records: int
    keys: tuple[bytes | None, ...]
    latency_s: float
    steps: tuple[Step, ...] = ()


class Provider:
    """What all workers ask: scripts, and outages."""

    def __init__(self, rng: random.Random, ledger: Ledger) -> None:
        self.rng, self.ledger = rng, ledger
        self.scripts: dict[int, Script] = {}
        self.asked: dict[int, int] = defaultdict(int)
        self.down_until_s = 0.0
        self.down_as = "outage"
        self.calm = self.aligned = False
        self._ends_s: list[float] = []  # of the calls that run, where answers are aligned
        self.die: Callable[[Any], None] = lambda _: None

    def failure(self) -> CallFailure | None:
        """What everybody hears while it is down."""
        if asyncio.get_running_loop().time() >= self.down_until_s:
            return None
        if self.down_as == "credentials":
            return ServiceFailure("credentials", remedy="mend them", provenance=PROVENANCE)
        retry_after_s = 2.0 if self.down_as == "rate_limited" else None
        return TransientFailure(self.down_as, retry_after_s=retry_after_s, provenance=PROVENANCE)

    async def until_its_end(self, latency_s: float) -> None:
        """A call's time. Where answers are aligned, its end is known to the brokers, and comes
        some turns of the loop later in that moment."""
        if not self.aligned:
            return await asyncio.sleep(latency_s)
        end_s = asyncio.get_running_loop().time() + latency_s
        insort(self._ends_s, end_s)
        try:
            await asyncio.sleep(latency_s)
            for _ in range(self.rng.randrange(TURNS_BEHIND)):
                await asyncio.sleep(0)
        finally:
            self._ends_s.remove(end_s)

    def next_end_s(self, now_s: float) -> float | None:
        """When the next call ends."""
        return next((each for each in self._ends_s if each >= now_s), None)

    def next_step(self, uid: int) -> Step:
        script = self.scripts[uid]
        turn = self.asked[uid]
        self.asked[uid] += 1
        if turn < len(script.steps):
            step = script.steps[turn]
            if not (self.calm and step.kind in ("dies", "slow")):
                return step
        return Step("answer", script.latency_s)


class Model:
    """One worker's way to the provider: `Extractor` and `Streams` in one."""

    def __init__(self, provider: Provider, worker: Any, admission: Admission) -> None:
        self._provider, self._worker, self._admission = provider, worker, admission
        self._answers = itertools.count(1)
        self.running: dict[int, int] = defaultdict(int)  # calls, by message
        self.probing = 0
        self.paid: dict[Any, tuple[float, object]] = {}  # when, and in which attempt, by entry

    def estimate(self, text: str, progress: object | None) -> Estimate:
        return Estimate(0, 0)

    def route(self, progress: object | None) -> str:
        return ""

    async def probe(self, route: str) -> None:
        self.probing += 1
        try:
            if self.probing > 1:
                raise Violation("two probes at once")
            await asyncio.sleep(PROBE_S)
        finally:
            self.probing -= 1
        if (failure := self._provider.failure()) is not None:
            raise failure

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        return await self._ask(text, None)

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        return await self._ask(text, publish)

    async def _ask(self, text: str, publish: Publish | None) -> Extracted | Rejected:
        uid = int(text.split()[0])
        entry = self._worker.entry_of(uid)
        if entry in self.paid:
            paid_s, attempt = self.paid[entry]
            # A second call of the same attempt may be begun in the very moment of the answer.
            late = paid_s < asyncio.get_running_loop().time()
            if late or attempt is not self._worker.attempt_of(entry):
                raise Violation(f"message {uid} was answered, and is asked again in the same hands")
        self._provider.ledger.calls[self._worker, uid] += 1
        self.running[uid] += 1
        answer = f"{uid}-{next(self._answers)}-{self._worker.number}"
        try:
            return await self._answer(uid, entry, answer, publish)
        except asyncio.CancelledError:
            if entry is None or self._worker.is_lost(entry):
                self._provider.ledger.abandoned.add(answer.encode())
            raise
        finally:
            self.running[uid] -= 1
            if not self.running[uid]:
                del self.running[uid]

    async def _answer(
        self, uid: int, entry: Any, answer: str, publish: Publish | None
    ) -> Extracted | Rejected:
        step = self._provider.next_step(uid)
        if step.kind == "no_room" and self._admission.finishing:
            step = replace(step, kind="answer")  # there is always room for what is to end
        broken = step.kind == "breaks"
        if publish is not None and step.kind in ("answer", "breaks", "slow"):
            await self._write(uid, answer, step.latency_s, publish)
        else:
            await self._provider.until_its_end(step.latency_s)
        if step.kind == "dies":
            self._provider.die(self._worker)
            await asyncio.sleep(1e6)
        failure = self._provider.failure()
        if failure is not None:
            raise failure
        if step.kind == "no_room":
            raise NoRoom(progress="asked once", provenance=PROVENANCE)
        if step.kind == "credentials":
            raise ServiceFailure("credentials", remedy="mend them", provenance=PROVENANCE)
        if broken or step.kind in ("timeout", "overloaded", "rate_limited", "connection"):
            reason = "connection" if broken else step.kind
            raise TransientFailure(reason, retry_after_s=step.retry_after_s, provenance=PROVENANCE)
        if entry is not None:
            now_s = asyncio.get_running_loop().time()
            self.paid[entry] = now_s, self._worker.attempt_of(entry)
        if step.kind == "reject":
            return Rejected(Reason.INVALID, "no", PROVENANCE)
        return self._extracted(uid, answer, streamed=publish is not None)

    async def _write(self, uid: int, answer: str, latency_s: float, publish: Publish) -> None:
        records = self._records(uid, answer)
        for index, record in enumerate(records[:-1]):
            await asyncio.sleep(latency_s)
            await publish(Part(record, index, answer, PROVENANCE))
        await asyncio.sleep(latency_s)

    def _records(self, uid: int, answer: str) -> tuple[Record, ...]:
        script = self._provider.scripts[uid]
        return tuple(
            Record(f"{uid} {n} {answer}".encode(), script.keys[n]) for n in range(script.records)
        )

    def _extracted(self, uid: int, answer: str, *, streamed: bool) -> Extracted:
        records = self._records(uid, answer)
        if not records:
            self._provider.ledger.nothing_to_say(uid)
        if streamed and records:
            return Extracted(records[-1:], PROVENANCE, answer, earlier=len(records) - 1)
        return Extracted(records, PROVENANCE, answer)
