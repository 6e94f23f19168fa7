"""One plan, from the first worker's start to the end of all of them."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import random
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from service.core.errors import Stop
from service.core.messages import Partition
from service.settings import Settings
from tests.walk import inside
from tests.walk.invariants import check, check_end
from tests.walk.ledger import Ledger
from tests.walk.loop import Violation, WalkLoop
from tests.walk.model import Provider, Script
from tests.walk.plan import KEYS, Action, Knobs, Message, Plan, takes_long
from tests.walk.wire import Admin, Consumer, Log, Logged, Producer, Wire
from tests.walk.worker import Worker

STARTS_MAX = 40
"""Of workers in one walk: more means that each ends by itself."""

CALM_S = 400.0
"""From the last fault to the moment by which everything must be finished."""

LONG_CALM_S = 4_000.0
"""Where a provider may ask for long waits, or a guard lets a few through each minute."""

LATER_MAX = 2

CUT_SHOWS_HALF_S = 80
"""Half seconds from the first question for the log's end to the first new message."""

WALK_S = 15.0
"""CPU of one walk; the longest honest one takes one."""


@dataclass(slots=True)
class Report:
    """How a walk went; `problem` None: well."""

    problem: str | None
    now_s: float
    outcomes: int


def play(plan: Plan) -> Report:
    """Run it; returns instead of raising what is wrong."""
    loop = WalkLoop()
    walk = Walk(plan, loop)
    logging.disable(logging.CRITICAL)
    try:
        with (
            _bounded(),
            inside.replaced(
                AIOKafkaConsumer=functools.partial(Consumer, walk.wire),
                AIOKafkaProducer=functools.partial(Producer, walk.wire),
                AIOKafkaAdminClient=functools.partial(Admin, walk.wire),
                reach=_reach,
                **inside.map_room(plan.knobs.map_chars),
                PartitionTracker=inside.CheckedTracker,
                RETRY_AFTER_MAX_S=inside.RETRY_AFTER_MAX_S,
            ),
        ):
            loop.run_until_complete(walk.run())
    except Exception as error:  # whatever it is, it is what the walk has found
        return Report(_said(error), loop.time(), walk.ledger.outcomes)
    finally:
        _leave(loop)
        logging.disable(logging.NOTSET)
    return Report(None, loop.time(), walk.ledger.outcomes)


@contextmanager
def _bounded() -> Iterator[None]:
    """A task that never yields is seen by nothing within the loop."""

    def too_long(*_: object) -> None:
        raise Violation(f"{WALK_S} s of CPU: a task does not yield")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, WALK_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


async def _reach(_: object) -> None:
    return None


def _said(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_said, error.exceptions))
    return f"{type(error).__name__}: {error}"


def _leave(loop: WalkLoop) -> None:
    """Nothing of it runs on; what was under way is dropped without complaint."""
    asyncio.set_event_loop(None)
    loop.set_exception_handler(lambda *_: None)
    left = asyncio.all_tasks(loop)
    for task in left:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if left:
            loop.clock.at_jump, loop.clock.turns = (lambda: None), -1_000_000
            for task in left:
                task.cancel()
            for _ in range(50):
                loop.call_soon(loop.stop)
                loop.run_forever()
        del left
        loop.close()
        if gc.isenabled():
            gc.collect(0)


@functools.lru_cache(256)
def settings_of(knobs: Knobs) -> Settings:
    guard = {"share_max": None, "in_a_row_max": knobs.guard}
    return Settings.model_validate(
        {
            "kafka": {
                "bootstrap_servers": "127.0.0.1:1",
                "group_id": "g",
                "session_timeout_s": 6.0,
                "request_timeout_s": 3.0,
            },
            "input": {"topics": "in", "tombstones": "skip"},
            "output": {"topic": "out"},
            "dead_letters": {"topic": "dead", "guard": guard},
            "extraction": {
                "attempts_max": knobs.attempts_max,
                "message_timeout_s": knobs.message_timeout_s,
                "hedge_after_s": knobs.hedge_after_s,
                "streaming": knobs.streaming,
                "cardinality": "many",
                "call_timeout_s": 1.0,
            },
            "limits": {"concurrency": knobs.concurrency, "window": knobs.window},
            "delivery": {
                "mode": knobs.mode,
                "ordering": knobs.ordering,
                "commit_interval_s": knobs.commit_interval_s,
                "drain_timeout_s": knobs.drain_timeout_s,
                "rebalance_drain_s": knobs.rebalance_drain_s,
            },
            "retries": (
                {"topic": "later", "delay_s": 5.0, "attempts_max": LATER_MAX} if knobs.later else {}
            ),
        }
    )


class Walk:
    """The world of one plan."""

    def __init__(self, plan: Plan, loop: WalkLoop) -> None:
        knobs = plan.knobs
        self.plan, self.loop = plan, loop
        self.rng = random.Random(plan.seed ^ 0x5EED)
        self.ledger = Ledger(
            exactly_once=knobs.mode == "exactly_once",
            ordering=knobs.ordering,
            later_max=LATER_MAX if knobs.later else None,
        )
        self.wire = Wire(
            self.rng,
            self.ledger,
            knobs.partitions,
            knobs.outputs,
            later=knobs.later,
            old=knobs.old_broker,
        )
        self.provider = Provider(self.rng, self.ledger)
        self.provider.die = lambda worker: self.crash(worker, 0.5)
        self.wire.fail = self.fail
        self.provider.aligned = knobs.aligned
        if knobs.aligned:
            self.wire.next_moment_s = self.provider.next_end_s
        self.workers: list[Worker] = []
        self.seats: list[Worker | None] = [None] * knobs.workers
        self.started = 0
        self.next_uid = 1_000
        self.regrowing: list[asyncio.Task[None]] = []
        self.held_back: dict[Partition, list[Message]] = {}  # until a cut can be known of
        self.wall_offset_max_s = 0.0
        self.ending = False
        self.failure: asyncio.Future[None]

    def fail(self, error: BaseException) -> None:
        if not self.failure.done():
            self.failure.set_exception(error)

    async def run(self) -> None:
        self.main = asyncio.current_task()
        self.failure = self.loop.create_future()
        self.loop.clock.at_jump = self._at_jump
        driver = self.loop.create_task(self._drive())
        await asyncio.wait([driver, self.failure], return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done():
            self.failure.result()
        driver.result()
        self.failure.cancel()

    def _at_jump(self) -> None:
        check(self.workers, self.loop.time())

    async def _drive(self) -> None:
        for number in range(len(self.seats)):
            self.seat(number)
        for event in self.plan.events:
            await self._until(event.at_s)
            if isinstance(event, Message):
                self.send(event)
            else:
                self.do(event)
        await self._calm()
        await self._end()

    async def _until(self, at_s: float) -> None:
        if at_s > self.loop.time():
            await asyncio.sleep(at_s - self.loop.time())

    # --- workers ---------------------------------------------------------------------------------

    def seat(self, number: int) -> None:
        """A worker takes the place, unless one has it."""
        if self.ending or (number < len(self.seats) and self.seats[number] is not None):
            return
        self.started += 1
        if self.started > STARTS_MAX:
            self.fail(Violation(f"{STARTS_MAX} workers have ended: {self.workers[-1].said}"))
            return
        worker = Worker(self.started, settings_of(self.plan.knobs), self.wire, self.provider)
        self.seats[number] = worker
        self.workers.append(worker)
        worker.task = self.loop.create_task(worker.run())
        worker.task.add_done_callback(lambda task: self._left(number, worker, task))

    def _left(self, number: int, worker: Worker, task: asyncio.Task[None]) -> None:
        if self.seats[number] is worker:
            self.seats[number] = None
            if not self.ending:
                self.loop.call_later(1.0, self.seat, number)
        self.workers.remove(worker)
        if task.cancelled() or worker.killed:
            return
        if (error := task.exception()) is not None:
            self.fail(error)
            return
        try:
            check_end(worker)
        except Violation as violation:
            self.fail(violation)

    def crash(self, worker: Worker | None, back_after_s: float) -> None:
        if worker is None or worker.ended:
            return
        number = self.seats.index(worker)
        self.seats[number] = None
        worker.kill()
        self.loop.call_later(back_after_s, self.seat, number)

    # --- what happens ----------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        partition = Partition("in", message.partition % self.plan.knobs.partitions)
        if (waiting := self.held_back.get(partition)) is not None:
            waiting.append(message)
            return
        log = self.wire.logs[partition]
        if message.hole:
            log.append(None)
        self._append(partition, log, message)

    def _append(self, partition: Partition, log: Log, message: Message) -> None:
        uid = message.uid
        keys = [
            KEYS[(uid + n) % len(KEYS)] if self.plan.knobs.key_field else None
            for n in range(message.records)
        ]
        self.provider.scripts[uid] = Script(
            uid, message.records, tuple(keys), message.latency_s, message.steps
        )
        self.ledger.keys[uid] = message.key
        value = f"{uid} text".encode() if message.text else None
        stamp_ms = int(self.wire.wall_s() * 1000)
        offset = log.append(Logged(uid, message.key, value, (), stamp_ms))
        self.ledger.sent(partition, offset, uid)
        if not message.text:
            self.ledger.nothing_to_say(uid)

    def do(self, action: Action) -> None:
        knobs = self.plan.knobs
        partition = Partition("in", action.number % knobs.partitions)
        worker = self.seats[action.number % len(self.seats)]
        match action.kind:
            case "rebalance":
                self.wire.group.rebalance()
            case "crash":
                self.crash(worker, action.amount)
            case "evict":
                if worker is not None and (consumer := inside.consumer_of(worker.source)):
                    self.wire.group.evict(consumer, action.amount)
            case "stop":
                if worker is not None:
                    worker.stop()
            case "force":
                if worker is not None:
                    worker.force()
            case "join":
                self.seats.append(None)
                self.seat(len(self.seats) - 1)
            case "fence":
                self.wire.fence(partition)
            case "cut":
                log = self.wire.logs[partition]
                if partition in self.held_back:
                    return
                self.held_back[partition] = []
                self.wire.cut(partition, log.end - int(action.amount))
                self.regrowing.append(
                    self.loop.create_task(self._regrow(partition, int(action.amount) + 3))
                )
            case "expire":
                log = self.wire.logs[partition]
                self.wire.expire(partition, log.begin + int(action.amount))
            case "outage" | "credentials" | "rate_limited":
                self.provider.down_as = action.kind
                self.provider.down_until_s = self.loop.time() + action.amount
            case "clock":
                self.wire.wall_offset_s += action.amount
                self.wall_offset_max_s = max(self.wall_offset_max_s, self.wire.wall_offset_s)
            case "replace":
                if worker is not None and worker.up and not worker.stopping:
                    with suppress(Stop):  # too often: it says so itself
                        worker.source.replace("the walk wants it")
            case "client_dies":
                if worker is not None and (consumer := inside.consumer_of(worker.source)):
                    consumer.die()
            case "tight_out" | "tight_dead":
                topic = action.kind.removeprefix("tight_")
                self.wire.sizes[topic] = action.number
                self.wire.tells_sizes = bool(action.share)
                self.loop.call_later(action.amount, self.wire.sizes.pop, topic, None)
            case "out_is_slow" | "out_refuses":
                until_s = self.loop.time() + action.amount
                self.wire.faults.start(f"{action.kind} {action.number}", until_s, action.share)
            case _:
                until_s = self.loop.time() + action.amount
                self.wire.faults.start(action.kind, until_s, action.share)

    async def _regrow(self, partition: Partition, messages: int) -> None:
        """New messages under the old offsets, once whoever has passed them can know of the cut."""
        log = self.wire.logs[partition]
        while not log.cut_seen and not self._cut_is_known(partition):
            await asyncio.sleep(0.5)
        for _ in range(CUT_SHOWS_HALF_S):
            if self._cut_is_known(partition):
                break
            await asyncio.sleep(0.5)
        for _ in range(messages):
            self.next_uid += 1
            message = Message(0.0, self.next_uid, partition.partition, KEYS[self.next_uid % 4])
            self._append(partition, log, message)
        for waiting in self.held_back.pop(partition):
            self.send(waiting)

    def _cut_is_known(self, partition: Partition) -> bool:
        if any(partition in inside.held_out(each.source) for each in self.workers):
            return True
        end = self.wire.logs[partition].end
        return self.ledger.passed(partition) <= end

    # --- the end ---------------------------------------------------------------------------------

    async def _calm(self) -> None:
        """Nothing goes wrong any more: whatever is there must be finished in time."""
        self.wire.faults.clear()
        self.provider.calm = True
        # What was postponed before a clock was set back is due that much later.
        self.wire.wall_offset_s = self.wall_offset_max_s
        self.provider.down_until_s = 0.0
        long = takes_long(self.plan.knobs, self.plan.events)
        until_s = self.loop.time() + (LONG_CALM_S if long else CALM_S)
        while not self._finished():
            if self.loop.time() > until_s:
                raise Violation(f"it stands still: {self._standing()}")
            await asyncio.sleep(1.0)
        for each in self.regrowing:
            each.cancel()

    def _finished(self) -> bool:
        out = {each for worker in self.workers for each in inside.held_out(worker.source)}
        if self.held_back:
            return False
        for partition, log in self.wire.logs.items():
            if partition in out:
                continue
            if self.ledger.open(partition):
                return False
            stored = self.wire.group.stored(partition)
            if (0 if stored is None else stored.offset) < log.end:
                return False
        return True

    def _standing(self) -> str:
        open_ = {
            str(partition): [life.offset for life in self.ledger.open(partition)][:8]
            for partition in self.wire.logs
        }
        stored = {str(each): self.wire.group.stored(each) for each in self.wire.logs}
        ends = {str(each): log.end for each, log in self.wire.logs.items()}
        problems = [worker.source.group().problem for worker in self.workers if worker.up]
        return f"open {open_}, ends {ends}, stored {stored}, problems {problems}"

    async def _end(self) -> None:
        self.ending = True
        left = [worker for worker in self.workers if worker.task is not None]
        for worker in left:
            if worker.up:
                worker.stop()
            else:
                worker.kill()
        tasks = [worker.task for worker in left if worker.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=300.0)
            if late:
                raise Violation("a worker does not come to its end")
        await asyncio.sleep(0)
        mine = {asyncio.current_task(), self.main, *self.wire.tasks, *self.regrowing}
        others = [each for each in asyncio.all_tasks() if each not in mine]
        ours = [each for each in others if "tests/walk" not in repr(each)]
        if ours:
            raise Violation(f"tasks are left: {ours}")
