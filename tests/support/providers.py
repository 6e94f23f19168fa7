"""Providers with hidden capacities, and clients that have nothing but `Admission` to find them.

Pure virtual time: a heap of what happens next. Everything is drawn from one seed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from service.core.admission.admission import Admission, Limits, Turn
from service.core.admission.retry import Backoff

ROUND_TRIP_S = 0.05
"""The way to the provider and back; a refusal takes no longer."""


@dataclass
class Provider:
    """Refuses what is beyond its rate (a token bucket) or its places (calls at once).

    `retry_after` says whether a refusal tells when to come again.
    """

    per_minute: float | None = None
    bucket: float = 1.0
    places: int | None = None
    latency_s: float = 0.5
    sigma: float = 0.5
    retry_after: bool = False
    level: float = field(init=False)
    busy: int = 0
    at_s: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.bucket

    def ask(self, now_s: float, chance: random.Random) -> tuple[bool, float, float | None]:
        """Whether it is taken, seconds until its answer, and a Retry-After."""
        if self.places is not None and self.busy >= self.places:
            return False, ROUND_TRIP_S, None
        if self.per_minute is not None:
            rate = self.per_minute / 60
            self.level = min(self.bucket, self.level + (now_s - self.at_s) * rate)
            self.at_s = now_s
            if self.level < 1 - 1e-9:
                asked_s = (1 - self.level) / rate if self.retry_after else None
                return False, ROUND_TRIP_S, asked_s
            self.level -= 1
        latency_s = self.latency_s * math.exp(chance.gauss(0.0, self.sigma))
        return True, ROUND_TRIP_S + latency_s, None


@dataclass
class Worker:
    """A client with an endless backlog; notes each call's start and whether it was taken."""

    admission: Admission
    sent: list[tuple[float, bool]] = field(default_factory=list)
    in_flight: list[tuple[float, int]] = field(default_factory=list)

    def taken(self, begin_s: float, end_s: float) -> int:
        return sum(taken for at_s, taken in self.sent if begin_s <= at_s < end_s)

    def refused(self, begin_s: float, end_s: float) -> int:
        return sum(not taken for at_s, taken in self.sent if begin_s <= at_s < end_s)


class Simulation:
    """One provider, some workers; `run` plays until a moment."""

    def __init__(self, provider: Provider, seed: int, *, workers: int = 1, slots: int = 50) -> None:
        self.provider, self.chance = provider, random.Random(seed)
        self.workers = [
            Worker(Admission(Limits(slots), self.chance.uniform)) for _ in range(workers)
        ]
        self.now_s = 0.0
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._woken: dict[int, float] = {}
        self._backoff = Backoff()
        self._retries: dict[int, list[float]] = {id(each): [] for each in self.workers}
        for worker in self.workers:
            self._at(0.0, lambda worker=worker: self._start(worker))

    def run(self, until_s: float) -> None:
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._heap)
            act()
        self.now_s = until_s

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when_s, next(self._numbers), act))

    def _start(self, worker: Worker) -> None:
        """As many as may; then again when it is said that one may."""
        admission = worker.admission
        if admission.routes.probe_wait_s(self.now_s) == 0.0 and admission.routes.outages:
            self._probe(worker)
        while (hold := admission.hold(self.now_s)) is None:
            self._send(worker)
        if hold.wait_s is not None:
            self._wake(worker, self.now_s + max(hold.wait_s, 1e-6))

    def _wake(self, worker: Worker, when_s: float) -> None:
        if when_s < self._woken.get(id(worker), math.inf) or self._woken[id(worker)] <= self.now_s:
            self._woken[id(worker)] = when_s
            self._at(when_s, lambda: self._start(worker))

    def _probe(self, worker: Worker) -> None:
        worker.admission.probing(self.now_s)
        taken, after_s, retry_after_s = self.provider.ask(self.now_s, self.chance)
        worker.sent.append((self.now_s, taken))

        def probed() -> None:
            if taken:
                self.provider.busy -= 1
                worker.admission.answered(0)
            else:
                worker.admission.routes.failed(
                    self.now_s, "refused", service=False, retry_after_s=retry_after_s
                )
            self._start(worker)

        self.provider.busy += taken
        self._at(self.now_s + after_s, probed)

    def _send(self, worker: Worker) -> None:
        turn = worker.admission.admit(self.now_s)
        taken, after_s, retry_after_s = self.provider.ask(self.now_s, self.chance)
        self.provider.busy += taken
        worker.sent.append((self.now_s, taken))
        worker.in_flight.append((self.now_s, turn.in_flight))
        if taken:
            self._at(self.now_s + after_s, lambda: self._answered(worker, turn))
        else:
            self._at(self.now_s + after_s, lambda: self._refused(worker, turn, retry_after_s))

    def _answered(self, worker: Worker, turn: Turn) -> None:
        self.provider.busy -= 1
        worker.admission.release()
        worker.admission.succeeded(self.now_s, turn)
        self._start(worker)

    def _refused(self, worker: Worker, turn: Turn, retry_after_s: float | None) -> None:
        worker.admission.release()
        worker.admission.routes.failed(
            self.now_s, "refused", service=False, retry_after_s=retry_after_s
        )
        worker.admission.overloaded(self.now_s, turn, "", "rate_limited", retry_after_s)
        self._start(worker)
