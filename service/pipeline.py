"""The way of a message: poll, window, admission, call, lane, publish, finish, commit.

Everything here runs on one event loop and changes state only between two awaits, so that a
check ("is it still ours?") and the act that depends on it are never apart. Tasks are born in one
`TaskGroup`: one for the intake, one for the commits, one for each call, which afterwards hands
over what its lane has ready. An unexpected exception in any of them ends the run, and what is
not committed is delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Literal, Protocol, TypeAlias, assert_never

from service.core.budgets import NO_TOKENS, Estimate
from service.core.circuit import Circuit, CircuitState
from service.core.errors import (
    CallFailure,
    CommitFailed,
    NoRoom,
    OutputTooLarge,
    PublishFailed,
    ServiceFailure,
    TransientFailure,
)
from service.core.events import (
    Abandoned,
    Admitted,
    Dropped,
    Finished,
    Hedged,
    Observe,
    PublishRetried,
    Retried,
    Spared,
    Streamed,
    Taken,
)
from service.core.guard import NEVER, Guard, GuardBounds
from service.core.hedges import Hedges
from service.core.history import lived_on
from service.core.lanes import Lane, Ordering
from service.core.limits import BUDGETS, NO_SLOT, Admission, Cause, Hold, Limits, Turn
from service.core.messages import (
    Batch,
    Extracted,
    Message,
    Outcome,
    Partition,
    Passed,
    Postponed,
    Provenance,
    Publishable,
    Reason,
    Rejected,
    Skipped,
)
from service.core.offsets import UNCLEAN_ENDS_MAX, Given, Progress
from service.core.retry import (
    NEVER_THE_MESSAGE,
    OVERLOAD,
    Backoff,
    Uniform,
    exhausted,
    others_succeed,
)
from service.core.shares import share
from service.core.status import GroupStatus, State, Status
from service.core.window import Entry, Holding, Stage, Window
from service.streams import Piece, Publish, RecordStream

log = logging.getLogger(__name__)

Work: TypeAlias = Callable[..., Coroutine[None, None, None]]

IDLE_TURN_S = 1.0
"""The longest that the intake waits for room before it polls anyway, taking nothing: the group
wants to see polls, and the clock of the liveness probe wants turns."""

POLL_SHARE = 8
"""A poll waits until an eighth of the window is free: one for each finished message would cost
more than it brings, and the rest of the window keeps the slots busy meanwhile."""

FINAL_COMMITS_S = 5.0
"""Seconds after the first one in which a further last commit of a run may begin. A rebalance
refuses commits for a moment, and what is not committed is paid for again."""

COMMIT_AGAIN_S = 1.0
"""Seconds from a refused commit that somebody waits for to the next try. It does not depend on
`delivery.commit_interval_s`, which may be minutes: a stop and a message that runs alone have to
go on."""

STALLED_AFTER_S = 60.0
"""Work in the window, no call, no wait that we know of, nothing moving for this long."""

LOOK_S = 1.0
"""Between two looks at a call that is overdue by setting, and may not be cut off or hedged yet."""

CLOSE_S = 30.0
"""Seconds within which readers are told that a call was cut off whose records are out. Where Kafka
takes longer, the message ends without: a set that is never completed is dropped as well."""

KAFKA_SLOW_AFTER_S = 5.0
"""An acknowledgement that takes longer means that we wait for Kafka."""


class Assignment(Protocol):
    """What a source tells about the partitions it holds, from within a rebalance."""

    async def revoked(self) -> None:
        """All partitions are in question: finish what is in flight, bounded, and commit it.

        Returns within the rebalance drain plus one bounded commit. Afterwards nothing of these
        partitions is published or committed until `assigned` says whose they are.
        """

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        """These are held now, and no others.

        A partition with the epoch it had before keeps its messages and running calls; one with
        a new epoch starts anew; one that is missing is lost: its calls are cancelled, its
        outcomes neither published nor committed. Called after the restore (offset and completed
        map read, seek done) and before the first message of the new epochs is returned by `poll`.
        """

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        """What Kafka should hold of a partition, once `finishing` has finished too.

        None where it is not held.
        """

    def has_room(self, partition: Partition) -> bool:
        """Whether the completed map surely holds whatever finishes of what was taken until now.

        Quick; where it says no, `progress` tells what the map would be.
        """

    def stored(self, partition: Partition, progress: Progress) -> None:
        """Kafka holds this now; told only while the partition is held as it was when asked."""

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """Every partition of the input topics, whoever holds it, and its lag where it is known."""


class Source(Protocol):
    """Where messages come from."""

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages, none of `closed` partitions; waits briefly for the first.

        With `limit` 0 it takes nothing but still counts as a poll for the group. Messages come
        in offset order within a partition. Raises `Stop` where going on makes no sense.
        """

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store their progress, within a bounded time; raises `CommitFailed`.

        It asks its `Assignment` for it, in the moment in which it is sent, and tells it when it
        is stored.
        """


class Extractor(Protocol):
    """What turns a text into records."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """One call and its re-asks.

        Raises `TransientFailure` or `ServiceFailure`, whose `progress` is handed back at the
        next attempt, so that answers already paid for are not asked for again. Raises `NoRoom`
        where `Admission.again` has no room for a re-ask.
        """

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens of the next call for it."""

    async def probe(self) -> None:
        """One tiny call, the same each time, whose answer nobody reads; raises as `call` does."""


class Streams(Protocol):
    """An extractor that lets go of a record while the model writes the next one."""

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        """As `Extractor.call`; the outcome holds the records that did not go out before."""


class Sink(Protocol):
    """Where outcomes go."""

    async def publish(self, message: Message, outcome: Publishable) -> asyncio.Future[None]:
        """Hand an outcome over; the order of these calls is the order in the log.

        Returns once it is in the producer's hands; the future ends with the acknowledgement
        of all in-sync replicas, or with `PublishFailed` or `OutputTooLarge`, which `publish`
        itself never raises.
        """


class Trace(Protocol):
    """One message's way through the pipeline, as somebody records it."""

    def asking(self) -> AbstractContextManager[None]:
        """Around an attempt: what is told in its task belongs to this message."""

    async def publish(
        self, sink: Sink, message: Message, outcome: Publishable
    ) -> asyncio.Future[None]:
        """The sink's `publish`, whose outputs then name this trace."""

    def ended(self, outcome: Outcome | None) -> None:
        """Its outcome is acknowledged; None: it was let go of or lost, and comes again."""


@dataclass(frozen=True, slots=True)
class Later:
    """Messages that are exhausted wait in the retry topic: how long, and how often."""

    delay_s: float
    attempts_max: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the pipeline may take and how long it may wait; messages, bytes, seconds."""

    concurrency: int
    window: int
    window_bytes: int
    ordering: Ordering
    attempts_max: int
    call_deadline_s: float  # one attempt with its re-asks: beyond it a call is overdue
    commit_interval_s: float
    drain_timeout_s: float
    rebalance_drain_s: float
    guard: GuardBounds = NEVER
    later: Later | None = None  # None: exhausted messages are rejected at once
    message_timeout_s: float | None = None  # from its first call; None: however long it takes
    hedge_after_s: float | None = None  # a second call for one that runs so long; None: never


@dataclass(frozen=True, slots=True)
class CutOff:
    """A message's time (`message_timeout_s`) was over, and its calls were ended without an
    answer."""


Result: TypeAlias = Extracted | Rejected | CallFailure
"""What a call came to."""


class Pipeline:
    """The sliding window between a source and a sink; also the source's `Assignment`."""

    def __init__(
        self,
        source: Source,
        extractor: Extractor,
        sink: Sink,
        decode: Callable[[Message], str | Outcome],
        bounds: Bounds,
        *,
        observe: Observe,
        uniform: Uniform,
        wall_clock: Callable[[], float],
        streams: Streams | None = None,
        admission: Admission | None = None,
        follow: Callable[[Message], Trace] | None = None,
    ) -> None:
        """With `streams`, records are published while the model still writes. Without an
        `admission`, which the extractor should know too, slots are the only limit."""
        self._source, self._extractor, self._sink = source, extractor, sink
        self._decode, self._bounds, self._observe = decode, bounds, observe
        self._uniform, self._wall_clock = uniform, wall_clock
        self._streams = streams
        self._follow = follow
        self._traces: dict[Entry, Trace] = {}  # of what is in the window, where it is followed
        self._streaming: dict[Entry, RecordStream] = {}  # of the calls that run
        self._backoff = Backoff()
        self._guard = Guard(bounds.guard)
        self._admission = admission or Admission(Limits(bounds.concurrency), Circuit(uniform))
        self._hedges = Hedges(bounds.hedge_after_s)
        self._hold: Hold | None = None  # why the queue waits
        self._lags: Mapping[Partition, int | None] = {}
        self._probe_running: asyncio.Task[None] | None = None
        self._window = Window(bounds.ordering, suspects=bounds.concurrency)
        self._tasks: asyncio.TaskGroup | None = None  # only while work may be started
        self._working: dict[asyncio.Task[None], Holding] = {}
        self._sent: dict[asyncio.Future[None], Holding] = {}  # not acknowledged
        self._turns: dict[Entry, Turn] = {}  # of the calls that have a slot now
        self._alone: Entry | None = None  # the only call that may run now
        self._lanes_at_work: set[Lane] = set()  # a task is handing over their outcomes
        self._lanes_resting: set[Lane] = set()  # a send failed; a timer will go on with them
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}  # see `_until`
        self._looks = False  # what waits is looked at after this step of a task
        self._wake: asyncio.TimerHandle | None = None
        self._committing = asyncio.Lock()
        self._held_out = True  # from a revoke until the next assignment
        self._reassigning = False
        self._assigned_once = False
        self._stopping = self._draining = self._forced = self._ending = False
        self._last_success_s: float | None = None
        self._turned_at_s = self._moved_at_s = 0.0

    # --- the life of a run ---------------------------------------------------------------------

    async def run(self, until: Mapping[Partition, int] | None = None) -> bool:
        """Work until `stop`, or until the partitions held have reached the offsets in `until`.

        Returns whether everything finished is committed: False where the source refused to the
        end. When it is cancelled or raises, what is not committed is left to be delivered again.
        """
        self._turned_at_s = self._moved_at_s = self._now_s()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            intake = tasks.create_task(_to_its_end(self._take_in, until))
            commits = tasks.create_task(_to_its_end(self._commit_regularly))
            try:
                await self._until(lambda: self._stopping)
                await self._drain()
                commits.cancel()
                committed = await self._commit_finally()
                intake.cancel()
            finally:
                self._end()
        return committed

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def problem(self) -> str | None:
        """Why it takes no more although it could: a sentence for a person."""
        return self._guard.problem

    def stop(self) -> None:
        """Take no more, finish what is in flight, commit, return from `run`."""
        self._stopping = True
        self._look()

    def force(self) -> None:
        """Stop without waiting: what is in flight is abandoned, what is finished committed."""
        self._forced = True
        self.stop()

    async def _drain(self) -> None:
        self._draining = self._admission.finishing = True
        self._let_go()
        drained = await self._until(
            lambda: self._forced or not self._window.messages, self._bounds.drain_timeout_s
        )
        if not drained or self._forced:
            self._abandon(len(self._window.calling))

    def _let_go(self) -> None:
        self._window.let_go()
        self._end_traces()

    def _end(self) -> None:
        """Whatever still runs is called off; nothing may start any more."""
        self._tasks = None
        if self._wake is not None:
            self._wake.cancel()
        if self._probe_running is not None:
            self._probe_running.cancel()
        self._call_off(self._window.assign({}))

    # --- intake ----------------------------------------------------------------------------------

    async def _take_in(self, until: Mapping[Partition, int] | None) -> None:
        while True:
            self._turned_at_s = self._now_s()
            limit = self._room()
            if limit == 0 and await self._until(lambda: self._room() > 0, IDLE_TURN_S):
                continue
            batch = await self._source.poll(limit, self._window.crowded())
            if self._stopping:
                # What was let go keeps its place in the lanes: nothing could be published behind
                # it. Nor do positions count any more, which step over what is not taken here.
                continue
            self._take(batch)
            if until is not None and (self._reached(until) or self._guard.tripped):
                self.stop()  # what is to end by itself does not wait for somebody to come

    def _room(self) -> int:
        """How many messages to poll for; 0 while it isn't worth it, or not allowed."""
        if self._stopping or self._reassigning or self._held_out:
            return 0
        if self._window.size_bytes >= self._bounds.window_bytes:
            return 0
        if self._admission.circuit.state is not CircuitState.CLOSED or self._waits_for_budget:
            return 0
        room = self._bounds.window - self._window.messages
        if (tries := self._guard.room(self._window.messages, self._now_s())) is not None:
            return min(room, tries)
        return room if room >= max(1, self._bounds.window // POLL_SHARE) else 0

    def _take(self, batch: Batch) -> None:
        """Messages enter the window; then the positions, which stand behind these messages."""
        now_s = self._now_s()
        taken = taken_bytes = finished = 0
        for message in batch.messages:
            entry = self._window.take(message, now_s)
            if not isinstance(entry, Entry):
                finished += entry == "finished"
                continue
            taken += 1
            taken_bytes += message.size_bytes
            if self._follow is not None:
                self._traces[entry] = self._follow(message)
            decoded = _died_before(entry) or self._decode(message)
            if isinstance(decoded, str):
                entry.text = decoded
                self._window.queue(entry)
            else:
                self._answer(entry, decoded)
                self._start_hand_over(entry)
        for partition, position in batch.positions.items():
            if (holding := self._window.held.get(partition)) is not None:
                holding.tracker.advance(position)
                holding.end = batch.ends.get(partition, holding.end)
        if taken:
            self._observe(Taken(taken, taken_bytes))
        if finished:
            self._observe(Spared(finished))
        if taken + finished < len(batch.messages):
            self._observe(Dropped(len(batch.messages) - taken - finished))
        self._admit()

    def _reached(self, until: Mapping[Partition, int]) -> bool:
        """Everything below the wanted offsets of the partitions held is finished."""
        if self._held_out or not self._assigned_once:
            return False
        for partition, end in until.items():
            holding = self._window.held.get(partition)
            if holding is not None and holding.tracker.next_offset < end:
                return False
        return True

    # --- calls -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start calls while there are slots, and see to it that somebody asks again."""
        if self._tasks is None or self._reassigning or self._held_out:
            return
        now_s = self._now_s()
        if self._admission.circuit.state is not CircuitState.CLOSED:
            self._wake_at(self._probe_when_due(now_s))
            return
        ask_again_s, held = self._requeue(now_s), self._waits_for_budget
        self._hold = None
        while (entry := self._window.next_queued()) is not None:
            if self._alone is not None or (entry.alone and self._window.calling):
                break  # the end of a call goes on with it
            if (held_s := self._guard.wait_s(now_s)) > 0.0:
                ask_again_s = _earlier(ask_again_s, now_s + held_s)
                break
            if self._admission.full(now_s):
                self._hold = NO_SLOT
                break
            estimate = self._extractor.estimate(entry.text, entry.progress)
            self._hold = self._admission.hold(now_s, estimate)
            if self._hold is not None:
                if self._hold.wait_s is not None:
                    ask_again_s = _earlier(ask_again_s, now_s + self._hold.wait_s)
                break
            self._observe(Admitted(now_s - entry.since_s))
            self._window.call_next(now_s)
            self._guard.began(now_s)
            if entry.alone:
                self._alone = entry
            self._start_call(entry, self._admission.admit(now_s, estimate))
        if held and not self._waits_for_budget:
            self._look()  # there may be room to fetch
        self._wake_at(ask_again_s)

    def _requeue(self, now_s: float) -> float | None:
        """Retries that are due, as many as may be; returns when there are more to look for."""
        retries = self._admission.retries
        retries.take(self._window.requeue_due(now_s, retries.available(now_s)))
        due_s = self._window.next_retry_s
        return None if due_s is None else max(due_s, now_s + retries.wait_s(now_s))

    @property
    def _waits_for_budget(self) -> bool:
        """The queue waits for it, so that fetching more makes no sense."""
        if self._hold is None or self._hold.cause not in BUDGETS:
            return False
        return self._window.next_queued() is not None

    def _probe_when_due(self, now_s: float) -> float | None:
        """While the circuit is not closed nothing but a probe goes out; returns when to ask again.

        One at a time: the circuit may have closed and opened while a probe runs, whose end asks
        again. In a drain one goes out only where a message waits for it, so that the message can
        end before the deadline.
        """
        wait_s = self._admission.circuit.wait_s(now_s)
        if wait_s is None or self._probe_running is not None or self._tasks is None:
            return None
        if self._draining and not self._window.waits_for_a_call:
            return None  # the end of a call asks again
        if wait_s > 0.0:
            return now_s + wait_s
        self._admission.circuit.probing()
        self._admission.charge(now_s, NO_TOKENS)
        self._probe_running = self._born(self._probe)
        if self._probe_running is None:
            self._admission.circuit.cancelled()
        else:
            self._probe_running.add_done_callback(self._probe_called_off)
        return None

    def _probe_called_off(self, probe: asyncio.Task[None]) -> None:
        """A probe that was cancelled, before its first step or later, has told nothing."""
        if self._probe_running is probe:
            self._probe_running = None
            self._admission.circuit.cancelled()
            self._wake_at(self._now_s())

    async def _probe(self) -> None:
        """It stands for the messages: whether the provider is there, and nothing is wrong with
        what they have in common."""
        failure = None
        try:
            await self._extractor.probe()
        except CallFailure as found:
            failure = found
        self._probe_running = None
        now_s = self._now_s()
        if failure is None:
            self._last_success_s = now_s
            self._admission.back()
            self._window.wake_retries(now_s)
        else:
            self._admission.cool_down(now_s, failure.retry_after_s)
            self._circuit_failed(now_s, failure)
        self._moved_on()
        self._admit()

    def _start_call(self, entry: Entry, turn: Turn) -> None:
        """What the call holds is given back where its attempt ends, or where its task does: a
        task that is cancelled before its first step runs none of its code."""
        self._turns[entry] = turn
        self._start(entry.holding, self._call, entry, turn, ended=partial(self._ended, entry, turn))

    def _ended(self, entry: Entry, turn: Turn, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            del self._working[task]
        if self._turns.get(entry) is turn:  # it has never begun, so nothing went out
            self._admission.unused(self._now_s(), turn.estimate)
            self._give_back(entry)
            self._wake_at(self._now_s())  # the slot is free for another

    def _give_back(self, entry: Entry) -> None:
        del self._turns[entry]
        if self._alone is entry:
            self._alone = None
        self._window.call_ended(entry)
        self._admission.release()
        self._moved_on()

    async def _call(self, entry: Entry, turn: Turn) -> None:
        """One attempt; then whatever the lane can publish."""
        ask = self._ask_alone if entry.alone else self._ask
        try:
            if (trace := self._traces.get(entry)) is None:
                result = await ask(entry, turn)
            else:
                with trace.asking():
                    result = await ask(entry, turn)
        except asyncio.CancelledError:
            self._wake_at(self._now_s())  # the slot is free for another
            raise
        finally:
            self._give_back(entry)
        self._account(entry, turn, result)
        match result:
            case CutOff():
                self._answer(entry, self._overstayed(entry))
            case NoRoom():
                self._provider_answers(turn)
                self._go_on_later(entry, result)
            case CallFailure():
                self._failed(entry, turn, result)
            case _:
                if not _from_the_cache(result):
                    self._provider_answers(turn)
                self._answer(entry, result)
        self._admit()
        await self._hand_over(entry.holding, entry.lane)

    def _account(self, entry: Entry, turn: Turn, result: Result | CutOff) -> None:
        """What an attempt has cost; one that took its answer from the cache has cost nothing."""
        if isinstance(result, CutOff) or result.provenance is None:
            return
        spent = result.provenance
        before, entry.spent = entry.spent, spent
        usd = spent.cost_usd - (0.0 if before is None else before.cost_usd)
        answered = not (spent.cached or isinstance(result, TransientFailure | ServiceFailure))
        if usd > 0 or answered:  # what nobody answered says nothing of what a call costs
            self._admission.spend.spent(self._now_s(), usd)
        if spent.cached:
            self._admission.unused(self._now_s(), turn.estimate)

    def _provider_answers(self, turn: Turn) -> None:
        now_s = self._now_s()
        self._last_success_s = now_s
        if self._admission.succeeded(now_s, turn):
            self._window.wake_retries(now_s)

    def _go_on_later(self, entry: Entry, paused: NoRoom) -> None:
        if not entry.holding.lost:
            entry.progress = paused.progress
            self._window.queue_first(entry, self._now_s())

    def _circuit_failed(self, now_s: float, failure: CallFailure) -> None:
        self._admission.failed(
            now_s,
            _sentence(failure),
            service=isinstance(failure, ServiceFailure),
            retry_after_s=failure.retry_after_s,
        )

    def _failed(self, entry: Entry, turn: Turn, failure: CallFailure) -> None:
        now_s = self._now_s()
        service = isinstance(failure, ServiceFailure)
        # One call counts once, however many waited; and while a probe is out, its answer counts,
        # not that of a call from before.
        if not failure.shared and self._admission.circuit.state is not CircuitState.PROBING:
            self._circuit_failed(now_s, failure)
        if failure.reason in OVERLOAD:
            self._admission.overloaded(now_s, turn, failure.reason, failure.retry_after_s)
        self._observe(Retried(failure.reason))
        entry.progress = failure.progress
        entry.not_before_s = now_s + (failure.retry_after_s or 0.0)
        entry.attempts += 1
        entry.attempts_that_count += not service and failure.reason not in NEVER_THE_MESSAGE
        if entry.first_failed_at_ms is None:
            entry.first_failed_at_ms = self._wall_ms()
        if (outcome := self._given_up(entry, turn, failure)) is not None:
            self._answer(entry, outcome)
            return
        if entry.attempts_that_count >= self._bounds.attempts_max:
            self._admission.circuit.doubt(now_s)  # nobody else has shown that the provider is there
        delay_s = self._backoff.delay_s(entry.attempts, self._uniform, failure.retry_after_s)
        self._window.retry(entry, now_s, now_s + delay_s)
        if self._draining:
            self._let_go()

    def _postponed(self, entry: Entry) -> Postponed | None:
        """An exhausted message goes to the retry topic, where there is one, so and so often."""
        later, now_ms = self._bounds.later, self._wall_ms()
        attempts = _attempts(entry, entry.spent)
        history = lived_on(entry.message, attempts, entry.first_failed_at_ms or now_ms)
        if later is None or history.retries >= later.attempts_max:
            return None
        due_ms = now_ms + int(later.delay_s * 1000)
        return Postponed(replace(history, retries=history.retries + 1, due_ms=due_ms).headers)

    def _given_up(self, entry: Entry, turn: Turn, failure: CallFailure) -> Outcome | None:
        if exhausted(
            entry.attempts_that_count,
            self._bounds.attempts_max,
            turn.started_s,
            self._last_success_s,
        ):
            return self._postponed(entry) or _exhausted(entry, failure)
        return self._overstayed(entry) if self._overstays(entry) else None

    def _answer(self, entry: Entry, outcome: Outcome) -> None:
        """The message has its outcome; a rejected one is told how it came to it."""
        if entry.holding.lost:
            return
        if isinstance(outcome, Rejected):
            outcome = self._explained(entry, outcome)
        if isinstance(outcome, Extracted | Rejected) and outcome.provenance is not None:
            outcome = replace(outcome, provenance=_with_calls_beside(entry, outcome.provenance))
        self._window.answered(entry, outcome, self._now_s())

    def _explained(self, entry: Entry, rejected: Rejected) -> Rejected:
        """How the message came to it; before `_with_calls_beside`."""
        first_ms = entry.first_failed_at_ms
        return replace(
            rejected,
            attempts=_attempts(entry, rejected.provenance),
            first_failed_at_ms=self._wall_ms() if first_ms is None else first_ms,
            records_out=entry.records_out,
        )

    async def _ask(self, entry: Entry, turn: Turn) -> Result | CutOff:
        self._hedges.called()
        if self._bounds.hedge_after_s is None and self._bounds.message_timeout_s is None:
            return await self._ask_once(entry)
        return await self._ask_watched(entry, turn)

    async def _ask_once(self, entry: Entry) -> Result:
        try:
            if self._streams is not None:
                return await self._stream(entry, self._streams)
            return await self._extractor.call(entry.text, entry.progress)
        except CallFailure as failure:
            return failure

    async def _ask_watched(self, entry: Entry, turn: Turn) -> Result | CutOff:
        """It may be asked a second time beside the first, or be cut off.

        The first answer wins; what failed is returned only where nothing else is under way.
        """
        async with asyncio.TaskGroup() as calls:
            running = {first := calls.create_task(self._ask_once(entry))}
            ended: dict[asyncio.Task[Result], Result] = {}
            hedged = cut_off = False
            while running and not cut_off and not any(map(_is_answer, ended.values())):
                look_at_s = self._look_again_s(entry, turn, hedged=hedged)
                timeout_s = None if look_at_s is None else max(0.0, look_at_s - self._now_s())
                done, running = await asyncio.wait(
                    running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                ended |= {call: call.result() for call in done}
                cut_off = not done and self._overstays(entry)
                if not done and not cut_off and not hedged and self._may_hedge(entry, turn):
                    hedged = True
                    second = calls.create_task(self._ask_once(entry))
                    second.add_done_callback(self._second_ended)
                    running.add(second)
            stream = self._streaming.get(entry)  # it is forgotten with its task
            for call in running:
                call.cancel()
        result = CutOff() if cut_off else reduce(_better, ended.values())
        if hedged:
            answer = next((call for call, each in ended.items() if each is result), None)
            answered = answer is not None and _is_answer(result)
            self._observe(
                Hedged("none" if not answered else "first" if answer is first else "second")
            )
        self._account_beside(entry, result, tuple(ended.values()), len(running))
        if cut_off and stream is not None:
            await self._close_cut_off(entry, stream)
        return result

    def _account_beside(
        self, entry: Entry, result: Result | CutOff, ended: tuple[Result, ...], called_off: int
    ) -> None:
        """Calls of an attempt that its result does not know of: they are counted, and spent.

        One that has ended tells what it has cost. One that was called off because the other was
        answered is priced as that one's last call; where none was answered nobody knows.
        """
        known = () if isinstance(result, CutOff) else (result,)
        calls = sum(_calls_made(entry, each) for each in ended)
        usd = sum(_cost_usd(entry, each) for each in ended)
        entry.calls_beside += calls - sum(_calls_made(entry, each) for each in known) + called_off
        beside_usd = usd - sum(_cost_usd(entry, each) for each in known)
        beside_usd += called_off * sum(_cost_usd(entry, each) for each in known)
        entry.beside_usd += beside_usd
        if beside_usd > 0:
            self._admission.spend.spent(self._now_s(), beside_usd)

    def _look_again_s(self, entry: Entry, turn: Turn, *, hedged: bool) -> float | None:
        """When one of the two settings has something to say of a running call."""
        now_s, moments = self._now_s(), []
        if not hedged and (due_s := self._hedges.due_s(turn.started_s)) is not None:
            moments.append(due_s)
        if self._bounds.message_timeout_s is not None and entry.first_called_s is not None:
            moments.append(entry.first_called_s + self._bounds.message_timeout_s)
        # What is overdue already is looked at again and again: something else holds it up.
        return min(
            (max(at_s, now_s + LOOK_S if at_s <= now_s else at_s) for at_s in moments), default=None
        )

    def _may_hedge(self, entry: Entry, turn: Turn) -> bool:
        now_s = self._now_s()
        due_s = self._hedges.due_s(turn.started_s)
        if due_s is None or due_s > now_s or entry.alone or self._admission.finishing:
            return False
        estimate = self._extractor.estimate(entry.text, entry.progress)
        if not self._hedges.may() or self._admission.hold(now_s, estimate) is not None:
            return False
        self._hedges.hedged()
        self._admission.admit(now_s, estimate)
        return True

    def _second_ended(self, _: asyncio.Task[Extracted | Rejected | CallFailure]) -> None:
        """A second call has a slot of its own, which comes back whether it has begun or not."""
        self._admission.release()

    def _overstays(self, entry: Entry) -> bool:
        """It has held up what stands behind it for too long, and not because of an outage.

        A streamed answer that has come to its end waits for Kafka only, and is not cut off: its
        set may be complete, and the message has its records.
        """
        if self._bounds.message_timeout_s is None or entry.first_called_s is None:
            return False
        stream = self._streaming.get(entry)
        if stream is not None and stream.completing:
            return False
        now_s = self._now_s()
        age_s = now_s - entry.first_called_s
        return age_s >= self._bounds.message_timeout_s and others_succeed(
            now_s, self._last_success_s
        )

    def _overstayed(self, entry: Entry) -> Outcome:
        return self._postponed(entry) or Rejected(
            Reason.EXHAUSTED,
            "not answered within extraction.message_timeout_s "
            f"({self._bounds.message_timeout_s:g} s), while others succeeded",
            provenance=entry.spent,
        )

    async def _ask_alone(self, entry: Entry, turn: Turn) -> Result | CutOff:
        """While it runs nobody else does, and if the process dies now, it is known of what."""
        await self._mark_alone(entry, entry.message.offset)
        result = await self._ask(entry, turn)
        await self._mark_alone(entry, None)
        return result

    async def _mark_alone(self, entry: Entry, offset: int | None) -> None:
        """Kafka knows who runs alone before he does, and that he has survived before others run.

        Waits until it is stored, for as long as the partition is ours.
        """
        entry.holding.alone = offset
        while True:
            if await self._commit():
                return
            await asyncio.sleep(COMMIT_AGAIN_S)

    # --- publishing while the model writes -------------------------------------------------------

    async def _stream(self, entry: Entry, streams: Streams) -> Extracted | Rejected:
        """One attempt; over when all that it published is acknowledged."""
        stream = RecordStream(
            partial(self._send, entry), self._before_sending_again, partial(self._streamed, entry)
        )
        self._streaming[entry] = stream
        try:
            return await self._streamed_whole(entry, stream, streams)
        finally:
            del self._streaming[entry]

    async def _close_cut_off(self, entry: Entry, stream: RecordStream) -> None:
        """Before the message has its outcome, and while its partition is ours: a call whose
        partition is lost is called off here as well."""
        self._streaming[entry] = stream
        try:
            async with asyncio.timeout(CLOSE_S):
                await stream.close()
        except TimeoutError:
            log.warning("Kafka did not take the end of an answer that was cut off")
        finally:
            del self._streaming[entry]

    async def _streamed_whole(
        self, entry: Entry, stream: RecordStream, streams: Streams
    ) -> Extracted | Rejected:
        """The outcome without its records, which are out; an answer that fails is closed."""
        try:
            result = await streams.stream(entry.text, entry.progress, stream.publish)
            if isinstance(result, Extracted):
                await stream.complete(result)
                return replace(result, records=(), earlier=result.earlier + len(result.records))
        except CallFailure:
            await stream.close()
            raise
        except OutputTooLarge as failure:
            result = Rejected(Reason.OUTPUT_TOO_LARGE, str(failure), stream.provenance)
        await stream.close()
        return result

    async def _send(self, entry: Entry, piece: Piece) -> asyncio.Future[None]:
        """Not between a revoke and an assignment: one that is lost by it is called off here."""
        await self._until(lambda: not self._held_out)
        acknowledged = await self._give(entry, piece)
        acknowledged.add_done_callback(self._sent.pop)
        return acknowledged

    async def _before_sending_again(self, attempts: int) -> None:
        self._observe(PublishRetried())
        await asyncio.sleep(self._backoff.delay_s(attempts, self._uniform))

    def _streamed(self, entry: Entry, records: int, first: bool) -> None:
        entry.records_out += records
        self._observe(Streamed(records, self._now_s() - entry.since_s if first else None))
        self._moved_on()

    # --- publishing ------------------------------------------------------------------------------

    def _start_hand_over(self, entry: Entry) -> None:
        if entry.lane.ready and self._may_hand_over(entry.holding, entry.lane):
            self._start(entry.holding, self._hand_over, entry.holding, entry.lane)

    async def _hand_over(self, holding: Holding, lane: Lane) -> None:
        """Give the sink what the lane has ready, in order; one task at a time for a lane."""
        while self._may_hand_over(holding, lane):
            entry = self._window.hand_over(holding, lane, self._now_s())
            if entry is None:
                return
            self._lanes_at_work.add(lane)
            try:
                await self._publish(entry)
            finally:
                self._lanes_at_work.discard(lane)

    def _may_hand_over(self, holding: Holding, lane: Lane) -> bool:
        if holding.lost or self._held_out:
            return False
        return lane not in self._lanes_at_work and lane not in self._lanes_resting

    async def _publish(self, entry: Entry) -> None:
        assert entry.outcome is not None, "handed over without an outcome"
        acknowledged = await self._give(entry, entry.outcome)
        acknowledged.add_done_callback(partial(self._called_back, self._settled, entry))

    def _settled(self, entry: Entry, acknowledged: asyncio.Future[None]) -> None:
        """The sink's word on one outcome; too late if the partition is not ours any more."""
        del self._sent[acknowledged]
        failure = PublishFailed() if acknowledged.cancelled() else acknowledged.exception()
        if entry.holding.lost:
            return
        match failure:
            case None:
                self._finish(entry)
            case OutputTooLarge() | PublishFailed():
                self._not_published(entry, failure)
            case _:
                raise failure

    def _finish(self, entry: Entry) -> None:
        assert entry.outcome is not None, "finished without an outcome"
        reopened = entry.lane.acknowledge(entry.message.offset)
        self._window.finish(entry)
        self._observe(
            Finished(
                outcome=_word(entry.outcome),
                reason=entry.outcome.reason if isinstance(entry.outcome, Rejected) else None,
                records=len(entry.outcome.records) if isinstance(entry.outcome, Extracted) else 0,
                publish_s=self._now_s() - entry.since_s,
                end_to_end_s=self._wall_clock() - entry.message.timestamp_ms / 1000,
                lane_wait_s=entry.lane_wait_s,
            )
        )
        if (trace := self._traces.pop(entry, None)) is not None:
            trace.ended(entry.outcome)
        if reopened:
            self._rest(entry, self._backoff.delay_s(1, self._uniform))
        self._tell_the_guard(entry.outcome)
        self._moved_on()

    def _tell_the_guard(self, outcome: Outcome) -> None:
        if not isinstance(outcome, Extracted | Rejected):
            return
        before = self._guard.tripped
        reason = outcome.reason if isinstance(outcome, Rejected) else None
        self._guard.finished(reason, self._now_s())
        if self._guard.tripped and not before:
            log.error("%s", self._guard.problem)
        elif before and not self._guard.tripped:
            log.info("messages are not rejected any more: it goes on")

    def _not_published(self, entry: Entry, failure: OutputTooLarge | PublishFailed) -> None:
        """The lane stops; once all it had handed over is settled, it starts again in order."""
        rest_s = 0.0
        if isinstance(failure, OutputTooLarge) and isinstance(
            entry.outcome, Extracted | Passed | Postponed
        ):
            entry.outcome = self._explained(entry, _too_large(entry, entry.outcome))
        else:
            entry.publish_attempts += 1
            rest_s = self._backoff.delay_s(entry.publish_attempts, self._uniform)
            self._observe(PublishRetried())
        if entry.lane.fail(entry.message.offset):
            self._rest(entry, rest_s)

    def _rest(self, entry: Entry, rest_s: float) -> None:
        """The entry's lane goes on after this time."""
        self._lanes_resting.add(entry.lane)
        asyncio.get_running_loop().call_later(rest_s, self._called_back, self._rested, entry)

    def _rested(self, entry: Entry) -> None:
        self._lanes_resting.discard(entry.lane)
        self._start_hand_over(entry)

    # --- commits ---------------------------------------------------------------------------------

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._bounds.commit_interval_s)
            await self._commit()
            self._window.measure()

    async def _commit_finally(self) -> bool:
        """From here on it is a clean end, which the commit says.

        Where it is forced, before or meanwhile, there is no further try and no wait.
        """
        self._ending = True
        until_s = self._now_s() + FINAL_COMMITS_S - COMMIT_AGAIN_S
        while not await self._commit():
            if self._now_s() > until_s or await self._until(lambda: self._forced, COMMIT_AGAIN_S):
                break
        else:
            return True
        log.error("the last commit failed; what finished since the one before may be repeated")
        return False

    async def _commit(self) -> bool:
        """Store what has changed; False if the source refused. One commit at a time."""
        async with self._committing:
            changed = {each for each in self._window.held if self._has_changed(each)}
            if not changed:
                return True
            try:
                await self._source.commit(changed)
            except CommitFailed:
                return False
            return True

    def _has_changed(self, partition: Partition) -> bool:
        progress = self.progress(partition)
        return progress != self._window.held[partition].committed

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        holding = self._window.held.get(partition)
        if holding is None:
            return None
        return holding.progress(clean=self._held_out or self._ending, finishing=finishing)

    def has_room(self, partition: Partition) -> bool:
        holding = self._window.held.get(partition)
        return holding is None or holding.has_room()

    def stored(self, partition: Partition, progress: Progress) -> None:
        if (holding := self._window.held.get(partition)) is not None:
            holding.committed = progress

    # --- assignment ------------------------------------------------------------------------------

    async def revoked(self) -> None:
        self._reassigning = self._admission.finishing = True
        await self._until(
            lambda: self._forced or not (self._window.calling or self._window.handed),
            self._bounds.rebalance_drain_s,
        )
        self._held_out = True
        await self._commit()

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        self._call_off(self._window.assign(given))
        self._held_out = self._reassigning = False
        self._assigned_once = True
        self._admission.finishing = self._draining
        self._share_out()
        self._turned_at_s = self._now_s()
        for entry in tuple(self._window.entries()):
            self._start_hand_over(entry)
        self._admit()
        self._look()

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        self._lags = lags
        self._share_out()
        self._admit()

    def _share_out(self) -> None:
        """Our part of the budgets follows the partitions and their lags."""
        self._admission.set_share(self._now_s(), share(self._window.held.keys(), self._lags))

    def _call_off(self, lost: list[Holding]) -> None:
        """Cancel the work for lost partitions, and withdraw their outcomes that have not left."""
        for work in (self._working, self._sent):
            for task, holding in work.items():
                if holding in lost:
                    task.cancel()
        self._end_traces()
        called_off = sum(1 for entry in self._window.calling if entry.holding in lost)
        if called_off and not self._draining:
            self._abandon(called_off)

    def _abandon(self, calls: int) -> None:
        if calls:
            log.warning("%d calls were cut off; their messages may be paid for again", calls)
            self._observe(Abandoned(calls))

    # --- traces ----------------------------------------------------------------------------------

    async def _give(self, entry: Entry, outcome: Publishable) -> asyncio.Future[None]:
        """To the sink; it is withdrawn with its partition for as long as it has not left."""
        trace = self._traces.get(entry)
        if trace is None:
            acknowledged = await self._sink.publish(entry.message, outcome)
        else:
            acknowledged = await trace.publish(self._sink, entry.message, outcome)
        self._sent[acknowledged] = entry.holding
        return acknowledged

    def _end_traces(self) -> None:
        """Of what left the window unfinished."""
        for entry in [each for each in self._traces if each.gone]:
            self._traces.pop(entry).ended(None)

    # --- what it says of itself ------------------------------------------------------------------

    def status(self, group: GroupStatus) -> Status:
        """A snapshot; walks the window, so it is for scrapes and probes, not for the hot path."""
        now_s = self._now_s()
        stages = Counter(entry.stage for entry in self._window.entries())
        overdue_s = max((self._call_s(each, now_s) for each in self._window.calling), default=0.0)
        between = self._reassigning or self._held_out
        partitions = {each: holding.status() for each, holding in self._window.held.items()}
        lag = sum(one.lag or 0 for one in partitions.values())
        oldest_s = min((entry.taken_s for entry in self._window.entries()), default=now_s)
        return Status(
            state=self._state(group, now_s, stages, lag),
            slots=self._admission.limit,
            slots_busy=self._admission.busy,
            window=self._bounds.window,
            window_messages=self._window.messages,
            window_bytes=self._window.size_bytes,
            queued=stages[Stage.QUEUED],
            retrying=stages[Stage.RETRYING],
            waiting_in_lane=stages[Stage.ANSWERED],
            publishing=stages[Stage.HANDED],
            poll_turn_age_s=0.0 if between else now_s - self._turned_at_s,
            call_overdue_s=max(0.0, overdue_s - self._bounds.call_deadline_s),
            not_ready=self._not_ready(group),
            group=group,
            partitions=partitions,
            reject_guard_tripped=self._guard.tripped,
            admission_waits=self._admission_waits(now_s),
            budget_share=self._admission.share,
            pace_per_s=self._admission.pace.rate_per_s,
            spent_last_hour_usd=self._admission.spend.last_hour_usd(now_s),
            oldest_message_age_s=now_s - oldest_s,
            lanes_waiting=self._window.lanes_waiting(),
        )

    def _admission_waits(self, now_s: float) -> Mapping[Cause, float]:
        entry = self._window.next_queued()
        if entry is None:
            return self._admission.waits(now_s)
        return self._admission.waits(now_s, self._extractor.estimate(entry.text, entry.progress))

    def _state(self, group: GroupStatus, now_s: float, stages: Counter[Stage], lag: int) -> State:
        if self._draining:
            return State.DRAINING
        if not self._assigned_once:
            return State.STARTING
        if not group.broker_answers or self._slowest_publish_s(now_s) > KAFKA_SLOW_AFTER_S:
            return State.WAITING_FOR_KAFKA
        if self._reassigning or self._held_out:
            return State.REBALANCING
        if self._admission.circuit.state is not CircuitState.CLOSED:
            return State.WAITING_FOR_PROVIDER
        if self._guard.tripped:
            return State.GUARDED
        if self._window.calling:
            return State.RUNNING
        if self._waits_for_budget:
            return State.WAITING_FOR_BUDGET
        if stages[Stage.RETRYING] or self._hold is not None:
            return State.WAITING_FOR_PROVIDER
        if not lag and not self._window.messages:
            return State.IDLE
        return State.STALLED if now_s - self._moved_at_s > STALLED_AFTER_S else State.RUNNING

    def _slowest_publish_s(self, now_s: float) -> float:
        handed = (e.since_s for e in self._window.entries() if e.stage is Stage.HANDED)
        streams = (stream.waits_s(now_s) for stream in self._streaming.values())
        return max(now_s - min(handed, default=now_s), *streams, 0.0)

    def _call_s(self, entry: Entry, now_s: float) -> float:
        """How long a call has been running, without the time in which it waited for Kafka."""
        stream = self._streaming.get(entry)
        return now_s - entry.since_s - (0.0 if stream is None else stream.waited_s(now_s))

    def _not_ready(self, group: GroupStatus) -> tuple[str, ...]:
        """Sentences for a person; none: ready. A spare member of a settled group is ready."""
        sentences = []
        if self._draining:
            sentences.append("it is stopping")
        elif not self._assigned_once:
            sentences.append("the group has not settled: no assignment yet")
        if group.problem is not None:
            sentences.append(group.problem)
        if self._admission.circuit.reason is not None:
            sentences.append(self._admission.circuit.reason)
        if self._guard.problem is not None:
            sentences.append(self._guard.problem)
        if (exceeded := self._admission.spend.exceeded(self._now_s())) is not None:
            sentences.append(exceeded)
        return tuple(sentences)

    # --- time and tasks --------------------------------------------------------------------------

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _wall_ms(self) -> int:
        return int(self._wall_clock() * 1000)

    def _start(
        self,
        holding: Holding,
        work: Work,
        *arguments: object,
        ended: Callable[[asyncio.Task[None] | None], None] | None = None,
    ) -> None:
        """A task that is called off when the holding is lost.

        `ended` is called when it is over, even if it was called off before its first step, or was
        never born, and takes it from `_working`: one callback for each call is cheaper than two.
        """
        task = self._born(work, *arguments)
        if task is None:
            if ended is not None:
                ended(None)
            return
        self._working[task] = holding
        task.add_done_callback(self._working.pop if ended is None else ended)

    def _born(self, work: Work, *arguments: object) -> asyncio.Task[None] | None:
        """A task of the run. None where the run is over, or ends because another task has failed:
        in that moment the group takes none any more, while timers and answers still come."""
        if self._tasks is None:
            return None
        coroutine = _to_its_end(work, *arguments)
        try:
            return self._tasks.create_task(coroutine)
        except RuntimeError:
            coroutine.close()
            return None

    def _wake_at(self, when_s: float | None) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if when_s is not None:
            loop = asyncio.get_running_loop()
            self._wake = loop.call_at(when_s, self._called_back, self._admit)

    def _moved_on(self) -> None:
        self._moved_at_s = self._now_s()
        self._look()

    def _called_back(self, act: Callable[..., None], *arguments: object) -> None:
        """What the loop calls outside of a task: an unexpected exception ends the run as well."""
        try:
            act(*arguments)
        except Exception as error:  # the loop would only log it, and the message would hang
            self._born(_raise, error)

    async def _until(self, possible: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `possible`, at most `timeout_s`; says whether it is.

        It is asked when something has moved; who waits is woken only when it has become true.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not possible():
                    await self._woken(possible)
        except TimeoutError:
            return possible()
        return True

    async def _woken(self, possible: Callable[[], bool]) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting[woken] = possible
        try:
            await woken
        finally:
            del self._waiting[woken]

    def _look(self) -> None:
        """Something may have become possible: once this step is done, see who waits for it."""
        if self._waiting and not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._called_back, self._wake_waiting)

    def _wake_waiting(self) -> None:
        self._looks = False
        for woken, possible in self._waiting.items():
            if not woken.done() and possible():
                woken.set_result(None)


async def _raise(failure: BaseException) -> None:
    raise failure


async def _to_its_end(work: Work, *arguments: object) -> None:
    """A cancellation that comes from within is a failure, which a task group would overlook."""
    try:
        await work(*arguments)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("cancelled, and not by us") from None


def _sentence(failure: CallFailure) -> str:
    """What readiness says while the circuit is open."""
    if isinstance(failure, ServiceFailure):
        return f"calls to the model fail ({failure.reason}): {failure.remedy}"
    return f"calls to the model fail ({failure.reason}); they are tried again"


def _died_before(entry: Entry) -> Rejected | None:
    """What becomes of a message that ran alone when the process died."""
    if entry.message.offset != entry.holding.given.alone:
        return None
    return Rejected(
        Reason.PROCESS_DIED,
        f"the process died {UNCLEAN_ENDS_MAX} times with this message unfinished, and once more "
        "while it was the only one that ran",
    )


def _earlier(one_s: float | None, other_s: float) -> float:
    return other_s if one_s is None else min(one_s, other_s)


def _better(one: Result, other: Result) -> Result:
    """Of two calls for one message: an answer, else what waits for room, else the later failure.

    Where both go on later, they go on with the progress of the one that has more calls paid for.
    """
    if not isinstance(one, CallFailure):
        return one
    if not isinstance(other, CallFailure):
        return other
    further = one if _calls(one.provenance) > _calls(other.provenance) else other
    if isinstance(one, NoRoom) or isinstance(other, NoRoom):
        return NoRoom(progress=further.progress, provenance=further.provenance)
    return further


def _is_answer(result: Result | CutOff) -> bool:
    return isinstance(result, Extracted | Rejected)


def _calls(spent: Provenance | None) -> int:
    return 0 if spent is None else spent.calls


def _calls_made(entry: Entry, result: Result) -> int:
    """Calls of this attempt alone; an extractor that tells none has made one."""
    return max(1, _calls(result.provenance) - _calls(entry.spent))


def _cost_usd(entry: Entry, result: Result) -> float:
    """Of this attempt alone."""
    before_usd = 0.0 if entry.spent is None else entry.spent.cost_usd
    return 0.0 if result.provenance is None else result.provenance.cost_usd - before_usd


def _attempts(entry: Entry, spent: Provenance | None) -> int:
    """Calls that went out for a message, as its dead letter and its history tell them.

    Answered or not, re-asks and second calls beside the first too, and those that were cut off.
    Where the extractor does not tell its calls, attempts that failed stand for them.
    """
    return max(_calls(spent), entry.attempts) + entry.calls_beside


def _with_calls_beside(entry: Entry, spent: Provenance) -> Provenance:
    """Of what a message has cost, the part that no answer knows of is added."""
    if not entry.calls_beside:
        return spent
    return replace(
        spent,
        calls=spent.calls + entry.calls_beside,
        cost_usd=spent.cost_usd + entry.beside_usd,
    )


def _from_the_cache(outcome: Extracted | Rejected) -> bool:
    """Nobody asked the provider: it may be as dead as before."""
    return outcome.provenance is not None and outcome.provenance.cached


def _exhausted(entry: Entry, failure: CallFailure) -> Rejected:
    return Rejected(
        Reason.EXHAUSTED,
        f"failed {entry.attempts} times while others succeeded, the last time: {failure.reason}",
        provenance=failure.provenance,
    )


def _too_large(entry: Entry, outcome: Extracted | Passed | Postponed) -> Rejected:
    if isinstance(outcome, Postponed):
        detail = "the retry topic takes no message of this size"
        return Rejected(Reason.EXHAUSTED, detail, provenance=entry.spent)
    if isinstance(outcome, Passed):
        return Rejected(Reason.OUTPUT_TOO_LARGE, "the output topic takes no tombstone of this size")
    largest = max((len(record.json) for record in outcome.records), default=0)
    return Rejected(
        Reason.OUTPUT_TOO_LARGE,
        f"the output topic takes no record of this size (the largest has {largest} bytes)",
        provenance=outcome.provenance,
    )


def _word(
    outcome: Outcome,
) -> Literal["extracted", "rejected", "passed", "skipped", "postponed"]:
    match outcome:
        case Extracted():
            return "extracted"
        case Rejected():
            return "rejected"
        case Passed():
            return "passed"
        case Skipped():
            return "skipped"
        case Postponed():
            return "postponed"
        case _:
            assert_never(outcome)
