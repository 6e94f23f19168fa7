"""What happens in a walk: drawn from a seed, replayed, and cut down where it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tests.walk.model import Step

KEYS = (b"a", b"b", b"c", b"d")


@dataclass(frozen=True, slots=True)
class Knobs:
    """The settings of a walk; the defaults are the plainest."""

    mode: str = "at_least_once"
    ordering: str = "key"
    streaming: bool = False
    partitions: int = 1
    outputs: int = 1
    workers: int = 1
    concurrency: int = 4
    window: int = 16
    commit_interval_s: float = 0.5
    drain_timeout_s: float = 30.0
    rebalance_drain_s: float = 2.0
    attempts_max: int = 3
    message_timeout_s: float | None = None
    hedge_after_s: float | None = None
    later: bool = False
    guard: int | None = None
    key_field: bool = False
    map_chars: int = 3_700
    old_broker: bool = False
    aligned: bool = False  # answers of brokers come at the moments in which calls end


@dataclass(frozen=True, slots=True)
class Message:
    """One input record at its time; `key` None: a lane of its own. Without `text` it is skipped."""

    at_s: float
    uid: int
    partition: int
    key: bytes | None
    records: int = 1
    latency_s: float = 0.1
    steps: tuple[Step, ...] = ()
    text: bool = True
    hole: bool = False  # an offset without a record stands before it


@dataclass(frozen=True, slots=True)
class Action:
    """Something that is done to all of it."""

    at_s: float
    kind: str
    number: int = 0  # of a worker, a partition, or how many
    amount: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    knobs: Knobs
    events: tuple[Message | Action, ...]  # in the order of their times

    def __str__(self) -> str:
        plain = Knobs()
        changed = [
            f"{each.name}={getattr(self.knobs, each.name)!r}"
            for each in fields(Knobs)
            if getattr(self.knobs, each.name) != getattr(plain, each.name)
        ]
        lines = [f"seed {self.seed}: {', '.join(changed) or 'plain'}"]
        return "\n  ".join([*lines, *map(_shown, self.events)])


def _shown(event: Message | Action) -> str:
    shown = {
        each.name: getattr(event, each.name)
        for each in fields(event)
        if each.name != "at_s" and getattr(event, each.name) != each.default
    }
    what = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f"{event.at_s:7.2f} s  {type(event).__name__.lower()} {what}"


# --- drawing --------------------------------------------------------------------------------------

FAULTS = (
    "sends_refused",
    "sends_refused",
    "sends_lost",
    "sends_hang",
    "producers_fail",
    "producers_hang",
    "clients_fail",
    "commits_refused",
    "commits_hang",
    "reads_fail",
    "reads_hang",
    "fetches_fail",
    "topic_missing",
    "stops_hang",
)
ONCE_FAULTS = ("txn_refused", "txn_lost", "txn_hang", "sends_refused", "topic_missing")


THEMES = ("any", "any", "any", "fences", "doubt", "order", "map", "drain", "hedges", "cuts")
"""What a walk has more of than chance would give it; all else is drawn all the same."""

COLLISIONS = {7: "room", 8: "lanes", 9: "turns"}
"""By a seed's last digit: walks that bring about what chance hardly ever does, and little else.

room: many messages finish out of order, and the completed map holds few of them.
lanes: one output partition refuses a message while another, for the same lane, is busy.
turns: restores end in the very turn of the loop in which a call ends and another is started.
"""


def draw(seed: int) -> Plan:
    rng = random.Random(seed)
    theme = rng.choice(THEMES)
    theme = COLLISIONS.get(seed % 10, theme)
    knobs = _knobs(rng, theme)
    messages = _messages(rng, knobs, theme)
    if takes_long(knobs, messages):
        knobs = replace(knobs, commit_interval_s=max(2.0, knobs.commit_interval_s))
    actions = _actions(rng, knobs, theme)
    events = sorted([*messages, *actions], key=lambda each: each.at_s)
    return Plan(seed, knobs, tuple(events))


def takes_long(knobs: Knobs, events: Iterable[Message | Action]) -> bool:
    """A provider asks for a day, or a guard lets a few through each minute."""
    steps = [step for each in events if isinstance(each, Message) for step in each.steps]
    waits = any((step.retry_after_s or 0.0) > 60.0 for step in steps)
    return waits or knobs.guard is not None


def _knobs(rng: random.Random, theme: str) -> Knobs:
    once = rng.random() < 0.5
    streaming = not once and rng.random() < 0.25
    ordering = "none" if streaming else rng.choice(["key", "key", "partition", "none"])
    concurrency = rng.choice([1, 1, 2, 4])
    knobs = Knobs(
        mode="exactly_once" if once else "at_least_once",
        ordering=ordering,
        streaming=streaming,
        partitions=rng.choice([1, 2, 2, 3]),
        outputs=rng.choice([1, 2, 3]),
        workers=rng.choice([1, 1, 1, 2]),
        concurrency=concurrency,
        window=concurrency * rng.choice([1, 4, 16, 32]),
        commit_interval_s=rng.choice([0.1, 0.5, 0.5, 2.0, 20.0]),
        drain_timeout_s=rng.choice([0.0, 5.0, 30.0]),
        rebalance_drain_s=rng.choice([0.0, 0.5, 2.0]),
        attempts_max=rng.choice([1, 3]),
        message_timeout_s=rng.choice([None, None, 1.0, 3.0]),
        hedge_after_s=None if streaming else rng.choice([None, 0.1, 0.3]),
        later=ordering == "none" and rng.random() < 0.5,
        guard=rng.choice([None, None, None, 3]),
        key_field=rng.random() < 0.4,
        map_chars=rng.choice([3_700, 3_700, 24, 12]),
        old_broker=rng.random() < 0.4,
    )
    knobs = replace(knobs, **_themed(rng, theme))
    # A window of few messages that each wait for a transaction takes minutes to empty.
    slow = knobs.mode == "exactly_once" and knobs.commit_interval_s > 2.0
    return replace(knobs, window=max(knobs.window, 64 if slow else knobs.concurrency))


def _themed(rng: random.Random, theme: str) -> dict[str, Any]:
    """Settings without which a theme is none."""
    once = {"mode": "exactly_once", "streaming": False}
    match theme:
        case "fences":
            return {**once, "concurrency": rng.choice([1, 2]), "partitions": rng.choice([2, 3])}
        case "doubt":
            return {**once, "commit_interval_s": 0.1}
        case "order":
            of_lane = {"ordering": "key", "streaming": False, "later": False}
            return {**of_lane, "mode": "at_least_once", "key_field": True, "outputs": 3}
        case "map":
            wide = {"concurrency": 8, "window": 256, "ordering": "none", "partitions": 1}
            return {**once, **wide, "map_chars": rng.choice([8, 10])}
        case "drain":
            return {"drain_timeout_s": 30.0, "concurrency": rng.choice([2, 4]), "guard": None}
        case "hedges":
            return {"streaming": False, "hedge_after_s": 0.1, "concurrency": rng.choice([2, 4])}
        case "room":
            wide = {"concurrency": rng.choice([8, 12]), "window": 256, "ordering": "none"}
            narrow = {"partitions": 1, "workers": 1, "map_chars": rng.choice([8, 10, 12])}
            plain = {"guard": None, "later": False, "hedge_after_s": None}
            return {**once, **wide, **narrow, **plain, "commit_interval_s": 0.1}
        case "lanes":
            return {
                "mode": "at_least_once",
                "ordering": rng.choice(["key", "key", "partition"]),
                "streaming": False,
                "later": False,
                "key_field": True,
                "outputs": rng.choice([2, 3]),
                "partitions": 1,
                "workers": 1,
                "concurrency": 4,
                "window": 64,
                "guard": None,
                "hedge_after_s": None,
                "message_timeout_s": None,
            }
        case "turns":
            few = {"concurrency": 1, "window": 64, "workers": 1, "partitions": 1}
            plain = {"guard": None, "later": False, "message_timeout_s": None, "map_chars": 3_700}
            often = {"hedge_after_s": None, "commit_interval_s": 0.1, "aligned": True}
            return {**once, **few, **plain, **often}
        case _:
            return {}


def _messages(rng: random.Random, knobs: Knobs, theme: str) -> list[Message]:
    """Most of them come at once; keys are few, so that lanes are long."""
    keys = rng.choice([KEYS, KEYS[:2], (*KEYS, None, None)])
    poison = rng.random()
    found = []
    latencies_s = _latencies_s(theme)
    count = rng.choice([8, 16, 30, 50])
    if theme in COLLISIONS.values():
        poison, count = 0.0, {"room": 70, "lanes": 40, "turns": 60}[theme]
        keys = KEYS[:2] if theme == "lanes" else KEYS
    for uid in range(1, count + 1):
        found.append(
            Message(
                at_s=_sent_at_s(rng, theme),
                uid=uid,
                partition=rng.randrange(knobs.partitions),
                key=rng.choice(keys),
                records=rng.choice(_records(theme)),
                latency_s=rng.choice(latencies_s),
                steps=_steps(rng, theme) if rng.random() < poison * 0.5 else (),
                text=rng.random() > 0.03,
                hole=rng.random() < 0.08,
            )
        )
    return found


def _sent_at_s(rng: random.Random, theme: str) -> float:
    if theme == "lanes":
        return round(rng.choice(REFUSED_AT_S) + rng.uniform(0.0, 0.4), 2)
    return round(rng.uniform(0, 13), 2) if theme == "doubt" or rng.random() < 0.25 else 0.0


def _records(theme: str) -> tuple[int, ...]:
    return (2, 3) if theme in ("order", "lanes") else (1, 1, 2, 3, 0)


def _latencies_s(theme: str) -> tuple[float, ...]:
    match theme:
        case "order" | "lanes":
            return (0.01, 0.01, 0.02, 0.05)
        case "room":
            return (0.01, 0.01, 0.02, 0.5, 1.5)
        case "turns":
            return (0.3, 0.4)
        case "map":
            return (0.01, 0.05, 0.1, 0.3, 8.0)
        case "hedges":
            return (0.05, 0.1, 0.2, 0.5, 1.0)
        case _:
            return (0.01, 0.05, 0.1, 0.1, 0.2, 0.5, 3.0)


def _steps(rng: random.Random, theme: str) -> tuple[Step, ...]:
    match 3 if theme == "hedges" else 8 if theme == "drain" else rng.randrange(12):
        case 0:
            return tuple(Step("timeout", 0.2) for _ in range(rng.randrange(1, 6)))
        case 1:
            after_s = rng.choice([1.0, 2.0, 5.0, 5.0, 5.0, 86_400.0])
            return (Step("rate_limited", 0.05, after_s),)
        case 2 | 3:
            return (Step("no_room", rng.choice([0.05, 0.2, 0.4])),)
        case 4:
            return (Step("no_room", 0.2), Step("no_room", 0.4))
        case 5:
            return (Step("reject", 0.1),)
        case 6:
            return (Step("slow", rng.choice([5.0, 20.0])),)
        case 7:
            return (Step("dies", 0.1),) * rng.choice([1, 2, 6])
        case 8:
            return (Step("credentials", 0.05),)
        case 9:
            return (Step("breaks", 0.2),) * rng.choice([1, 3])
        case 10:
            return (Step("connection", 0.05),) * rng.choice([1, 4])
        case _:
            return (Step("slow", 0.8), Step("answer", 0.05))


def _actions(rng: random.Random, knobs: Knobs, theme: str) -> list[Action]:
    found = _of_the_theme(rng, knobs, theme)
    others = (0, 0, 0, 1) if theme in COLLISIONS.values() else (0, 0, 1, 2, 4, 8)
    for _ in range(rng.choice(others)):
        found += _action(rng, knobs, round(rng.uniform(0.0, 15.0), 2))
    return found


def _of_the_theme(rng: random.Random, knobs: Knobs, theme: str) -> list[Action]:
    at_s = round(rng.uniform(0.1, 4.0), 2)
    match theme:
        case "fences":
            return [
                Action(round(at_s + n * rng.choice([0.5, 3.0, 3.02, 3.05, 3.1]), 2), "fence", n)
                for n in range(rng.choice([2, 4]))
            ]
        case "doubt":
            missing = Action(at_s, "topic_missing", 0, 12.0)
            fails_at_s = rng.choice([10.0, 10.1, 10.2, 10.5])
            return [missing, Action(fails_at_s, rng.choice(DOUBTED), 0, rng.choice([0.3, 3.0]))]
        case "order":
            return [
                Action(round(at_s * n, 2), "sends_refused", 0, 1.0, rng.choice([0.2, 0.5]))
                for n in range(3)
            ]
        case "drain":
            down = Action(at_s, rng.choice(["credentials", "outage"]), 0, 5.0)
            return [down, Action(round(at_s + rng.choice([0.1, 1.0]), 2), "stop", 0, 1.0)]
        case "lanes":
            return [each for at_s in REFUSED_AT_S for each in _refused(rng, knobs, at_s)]
        case "turns":
            # A restore begins three seconds behind its fence: calls are to be due until then.
            return [Action(round(7 * n + rng.random(), 2), "fence") for n in range(3)]
        case "cuts":
            number, back = rng.randrange(knobs.partitions), rng.randrange(1, 10)
            return [Action(round(at_s + 6.0, 2), "cut", number, back)]
        case _:
            return []


REFUSED_AT_S = (0.5, 2.0, 3.5, 5.0)


def _refused(rng: random.Random, knobs: Knobs, at_s: float) -> list[Action]:
    """One output partition refuses while the others are slow to acknowledge."""
    refuses = rng.randrange(knobs.outputs)
    slow = [
        Action(at_s, "out_is_slow", number, 0.5)
        for number in range(knobs.outputs)
        if number != refuses
    ]
    return [*slow, Action(round(at_s + 0.1, 2), "out_refuses", refuses, 0.3)]


DOUBTED = ("txn_refused", "txn_lost", "sends_refused", "producers_fail")


def _action(rng: random.Random, knobs: Knobs, at_s: float) -> list[Action]:
    once = knobs.mode == "exactly_once"
    partition, worker = rng.randrange(knobs.partitions), rng.randrange(knobs.workers)
    match rng.randrange(20):
        case 0 | 1 | 2 | 3:
            kind = rng.choice(FAULTS + ONCE_FAULTS * 2 if once else FAULTS)
            lasts_s = rng.choice([0.3, 1.0, 3.0, 12.0])
            return [Action(at_s, kind, 0, lasts_s, rng.choice([0.2, 0.5, 1.0]))]
        case 4 | 5:
            return [Action(at_s, "rebalance")]
        case 6:
            return [Action(at_s, "evict", worker, rng.choice([0.5, 2.0, 5.0]))]
        case 7:
            return [Action(at_s, "crash", worker, rng.choice([0.1, 3.0]))]
        case 8:
            return [Action(at_s + n * 1.5, "crash", worker, 0.1) for n in range(5)]
        case 9:
            return [Action(at_s, "stop", worker, rng.choice([0.5, 3.0]))]
        case 10:
            return [Action(at_s, "force", worker, 1.0)]
        case 11 | 12 if once:
            other = rng.randrange(knobs.partitions)
            gap_s = rng.choice([0.1, 3.0, 3.02, 3.05, 3.1])
            return [Action(at_s, "fence", partition), Action(at_s + gap_s, "fence", other)]
        case 13 if once:
            down = Action(at_s, "txn_refused", 0, 2.0)
            return [Action(at_s, "topic_missing", 0, rng.choice([11.0, 15.0])), down]
        case 11 | 13:
            return [Action(at_s, "join", 0, 5.0)]
        case 14:
            return [Action(at_s, "cut", partition, rng.randrange(1, 10))]
        case 15:
            return [Action(at_s, "expire", partition, rng.randrange(1, 6))]
        case 16:
            kind = rng.choice(["outage", "credentials", "rate_limited"])
            down = Action(at_s, kind, 0, rng.choice([1.0, 5.0, 20.0]))
            stop = Action(at_s + 0.5, "stop", worker, 1.0)
            return [down, stop] if rng.random() < 0.4 else [down]
        case 17:
            return [Action(at_s, "clock", 0, rng.choice([-3600.0, 3600.0, -1.0, 86_400.0]))]
        case 18:
            return [Action(at_s, rng.choice(["replace", "client_dies"]), worker)]
        case _:
            limit = rng.choice([150, 700])
            topic = rng.choice(["tight_out", "tight_dead"])
            return [Action(at_s, topic, limit, rng.choice([2.0, 20.0]), rng.choice([0.0, 1.0]))]


# --- cutting down ---------------------------------------------------------------------------------


def shrink(plan: Plan, fails: Callable[[Plan], bool], tries_max: int = 400) -> Plan:
    """A smaller plan that fails too: chunks of events are left out (ddmin), then settings made
    plain, then events again."""
    tries = 0

    def still(candidate: Plan) -> bool:
        nonlocal tries
        tries += 1
        return tries <= tries_max and fails(candidate)

    plan = _fewer_events(plan, still)
    for each in fields(Knobs):
        plainer = replace(plan.knobs, **{each.name: each.default})
        if plainer != plan.knobs and still(candidate := replace(plan, knobs=plainer)):
            plan = candidate
    return _simpler_messages(_fewer_events(plan, still), still)


def _fewer_events(plan: Plan, still: Callable[[Plan], bool]) -> Plan:
    size = max(1, len(plan.events) // 2)
    while size:
        at = 0
        while at < len(plan.events):
            less = replace(plan, events=(*plan.events[:at], *plan.events[at + size :]))
            if still(less):
                plan = less
            else:
                at += size
        size //= 2
    return plan


def _simpler_messages(plan: Plan, still: Callable[[Plan], bool]) -> Plan:
    plainer: dict[str, Any] = {"steps": (), "hole": False, "records": 1, "at_s": 0.0}
    for index, event in enumerate(plan.events):
        for name, value in plainer.items():
            if not isinstance(event, Message) or getattr(event, name) == value:
                continue
            simpler = replace(event, **{name: value})
            events: Sequence[Message | Action] = [*plan.events]
            events[index] = simpler  # type: ignore[index]
            if still(candidate := replace(plan, events=tuple(events))):
                plan, event = candidate, simpler
    return plan
