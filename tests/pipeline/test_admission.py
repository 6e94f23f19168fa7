"""Budgets, outages, slow messages: what waits for what, under virtual time."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from service.core.admission.admission import Admission, Cause, Limits
from service.core.admission.budgets import Estimate
from service.core.admission.circuit import PROBE_CAP_S
from service.core.admission.hedges import HEDGED_SHARE
from service.core.admission.retry import RETRY_AFTER_MAX_S
from service.core.errors import CallFailure, NoRoom, ServiceFailure, TransientFailure
from service.core.events import Hedged, Retried
from service.core.history import History
from service.core.messages import Extracted, Partition, Postponed, Provenance, Reason, Rejected
from service.core.status import State
from service.pipeline import Later, Pipeline
from service.pipeline.calls import Calls
from tests.pipeline.test_way import BOUNDS, SETTLED, Stage, decode
from tests.support import virtual_time
from tests.support.fakes import (
    PROBE,
    PROVENANCE,
    FakeBroker,
    FakeExtractor,
    FakeSink,
    FakeSource,
    partition,
)

WIDE = replace(BOUNDS, concurrency=50, window=200)


def limited(limits: Limits) -> Admission:
    return Admission(limits, lambda low, high: high)


class Limited(Stage):
    """A stage whose pipeline has budgets."""

    def __init__(self, limits: Limits, bounds: object = WIDE) -> None:
        self.limits = limits
        super().__init__(bounds=bounds)  # type: ignore[arg-type]

    def new_pipeline(self, **more: Any) -> Pipeline:
        self.admission = limited(self.limits)
        return super().new_pipeline(admission=self.admission, **more)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_waiting_for_budget_fetches_nothing_holds_no_slot_and_says_why() -> None:
    """Sixty calls a minute: after two seconds' worth one a second, with a nearly empty window."""
    stage = Limited(Limits(50, requests_per_minute=60))
    for n in range(500):
        stage.broker.append(f"text {n}")

    async def look() -> None:
        await asyncio.sleep(30.5)
        status = stage.pipeline.status(SETTLED)
        assert status.state is State.WAITING_FOR_BUDGET
        assert status.slots_busy == 0
        assert list(status.admission_waits) == [Cause.REQUESTS]
        assert 0 < status.admission_waits[Cause.REQUESTS] <= 1
        assert status.not_ready == ()
        polls = sum(limit > 0 for limit in stage.source.polls)
        await asyncio.sleep(60)
        assert sum(limit > 0 for limit in stage.source.polls) == polls, "fetched meanwhile"
        assert 90 <= len(stage.extractor.calls) <= 93
        stage.pipeline.force()

    stage.show(look)


def test_the_spend_limit_stops_intake_and_heals_by_itself() -> None:
    """At the limit nothing is called, readiness says so; an hour later it goes on."""
    stage = Limited(Limits(50, spend_usd_per_hour=1.0))
    priced_at(stage, 0.05)
    for n in range(60):
        stage.broker.append(f"text {n}")

    async def look() -> None:
        await asyncio.sleep(600)
        status = stage.pipeline.status(SETTLED)
        assert len(stage.extractor.calls) == 20
        assert status.spent_last_hour_usd == pytest.approx(1.0)
        assert status.state is State.WAITING_FOR_BUDGET
        assert any("spend_usd_per_hour" in sentence for sentence in status.not_ready)
        await asyncio.sleep(3600)
        assert len(stage.extractor.calls) == 40
        await asyncio.sleep(3700)

    stage.show(look)
    assert stage.broker.committed == {partition(): 60}


def test_a_refusal_does_not_teach_what_a_call_costs() -> None:
    """Until one was answered they go one at a time: fifty at once could pass the limit."""
    stage = Limited(Limits(50, spend_usd_per_hour=1.0))
    priced_at(stage, 0.05)
    unpaid = Provenance("fake", "p", "s", calls=1)
    stage.extractor.scripts["text 0"] = [TransientFailure("connection", provenance=unpaid)]
    for n in range(60):
        stage.broker.append(f"text {n}")

    async def look() -> None:
        await asyncio.sleep(600)
        assert len(stage.extractor.calls) == 21
        stage.pipeline.force()

    stage.show(look)


def priced_at(stage: Stage, usd: float) -> None:
    """Each answer costs so much."""

    async def call(text: str, progress: object | None) -> Extracted | Rejected:
        answer = await FakeExtractor.call(stage.extractor, text, progress)
        assert isinstance(answer, Extracted)
        return replace(answer, provenance=replace(answer.provenance, cost_usd=usd))

    stage.extractor.call = call  # type: ignore[method-assign]


def test_a_reask_without_room_gives_its_slot_back_and_goes_first() -> None:
    """It is no failed attempt; the answers paid for come back with it."""
    stage = Limited(Limits(1))
    stage.broker.append("reasked")
    stage.broker.append("other")
    paused = NoRoom(progress="paid answer", provenance=Provenance("fake", "p", "s", calls=1))
    stage.extractor.scripts["reasked"] = [paused]
    stage.show()
    assert stage.extractor.calls == ["reasked", "reasked", "other"]
    assert stage.extractor.progress == [None, "paid answer", None]
    assert not [event for event in stage.events if isinstance(event, Retried)]
    assert stage.broker.committed == {partition(): 2}


def test_ten_minutes_without_a_provider_lose_nothing_and_end_at_once() -> None:
    """Down under load, with a Retry-After each time: no dead letter, and full speed within 15 s of
    the last Retry-After; what waited to be tried again is woken."""
    stage = Limited(Limits(50))
    for n in range(4000):
        stage.broker.append(f"text {n}", key=str(n % 500))
    stage.extractor.latency_s = lambda _: 0.5
    down = TransientFailure("overloaded", retry_after_s=20.0)

    async def outage() -> None:
        await asyncio.sleep(5)
        stage.extractor.always = down
        await asyncio.sleep(600)
        assert len(stage.extractor.calls) < 5 * 100 + 300, "a storm"
        assert stage.pipeline.status(SETTLED).state is State.WAITING_FOR_PROVIDER
        stage.extractor.always = None
        while not stage.admission.routes.closed():
            await asyncio.sleep(0.1)  # the last Retry-After is over, but for the probe's jitter
        await asyncio.sleep(13)
        before = len(stage.extractor.calls)
        assert stage.pipeline.status(SETTLED).retrying == 0
        await asyncio.sleep(2)
        assert len(stage.extractor.calls) - before >= 0.95 * 100 * 2
        await asyncio.sleep(60)

    stage.show(outage)
    assert stage.rejected() == []
    assert stage.broker.committed == {partition(): 4000}


def test_poison_that_fails_slower_than_others_succeed_is_found() -> None:
    """Its attempts time out after more than a minute; a probe before the last one is enough."""
    stage = Limited(Limits(4), bounds=BOUNDS)
    stage.broker.append("slow poison")
    stage.extractor.latency_s = lambda text: 90.0 if "poison" in text else 0.1
    stage.extractor.scripts["slow poison"] = [TransientFailure("timeout")] * 99

    async def wait() -> None:
        await asyncio.sleep(900)

    stage.show(wait)
    assert [rejected.reason for rejected in stage.rejected()] == [Reason.EXHAUSTED]
    assert stage.extractor.calls.count("slow poison") == 4


def test_a_woken_retry_keeps_its_own_retry_after() -> None:
    """The provider asked this message to wait: the circuit's closing does not shorten it."""
    stage = Limited(Limits(50))
    asked = TransientFailure("server_error", retry_after_s=100.0)
    stage.broker.append("patient")
    stage.extractor.scripts["patient"] = [asked]
    for n in range(12):
        stage.broker.append(f"text {n}")
        stage.extractor.scripts[f"text {n}"] = [TransientFailure("connection")]
    began: dict[str, list[float]] = {}

    def latency(text: str) -> float:
        began.setdefault(text, []).append(now_s())
        return 0.1

    stage.extractor.latency_s = latency

    async def wait() -> None:
        await asyncio.sleep(200)

    stage.show(wait)
    assert stage.extractor.probes >= 1
    assert began["patient"][1] - began["patient"][0] >= 100
    assert max(began["text 3"]) < 30


class Probed(FakeExtractor):
    """Knows how many probes are out at once."""

    out = out_max = cancelled_probes = 0

    async def probe(self, route: str = "") -> None:
        self.out += 1
        self.out_max = max(self.out_max, self.out)
        try:
            await super().probe()
        except asyncio.CancelledError:
            self.cancelled_probes += 1
            raise
        finally:
            self.out -= 1


def probed(**bounds: Any) -> Limited:
    """A stage whose probes take 100 s, and each call 0.1 s, unless its text says how long."""
    stage = Limited(Limits(50), bounds=replace(WIDE, **bounds))
    stage.extractor = Probed()
    stage.extractor.latency_s = lambda text: (
        100.0 if text == PROBE else float(text.split()[1]) if text.startswith("in ") else 0.1
    )
    stage.pipeline = stage.new_pipeline()
    return stage


def fail_all(stage: Limited, texts: list[str], times: int = 1) -> None:
    for text in texts:
        stage.broker.append(text)
        stage.extractor.scripts[text] = [TransientFailure("connection")] * times


def test_one_probe_at_a_time_whatever_older_calls_come_to() -> None:
    """A call of before the outage fails while a probe is out: that is no answer to the probe."""
    stage = probed()
    fail_all(stage, [f"text {n}" for n in range(12)] + [f"in {n} s" for n in range(8, 60, 4)])

    async def wait() -> None:
        await asyncio.sleep(90)
        assert stage.extractor.probes == 1  # type: ignore[attr-defined]
        assert stage.admission.routes.probe_is_out()
        await asyncio.sleep(110)

    stage.show(wait)
    assert stage.extractor.out_max == 1  # type: ignore[attr-defined]
    assert stage.broker.committed == {partition(): 25}


def test_one_probe_at_a_time_where_the_circuit_has_closed_and_opened_beside_it() -> None:
    """An older call is answered, and then all fail anew: the probe that is out is waited for."""
    stage = probed()
    fail_all(stage, [f"text {n}" for n in range(20)], times=2)
    stage.broker.append("in 10 s")

    async def wait() -> None:
        await asyncio.sleep(90)
        assert stage.extractor.probes == 1
        assert not stage.admission.routes.closed()
        await asyncio.sleep(300)

    stage.show(wait)
    assert stage.extractor.out_max == 1  # type: ignore[attr-defined]
    assert stage.broker.committed == {partition(): 21}


def test_a_probe_that_never_begins_is_told_to_the_circuit() -> None:
    """It is called off between its start and its first step: the circuit does not wait for it."""
    stage = probed()
    fail_all(stage, [f"text {n}" for n in range(12)])

    charge, cut_off = stage.admission.charge, []

    async def play() -> None:
        stage.source.assign(stage.pipeline)
        run = asyncio.create_task(stage.pipeline.run())

        def cut_off_as_it_starts(now_s: float, estimate: Estimate) -> None:
            charge(now_s, estimate)
            if stage.admission.routes.probe_is_out():
                cut_off.append(run.cancel())

        stage.admission.charge = cut_off_as_it_starts  # type: ignore[method-assign]
        await asyncio.wait([run])

    virtual_time.run(play())
    assert cut_off == [True]
    assert stage.extractor.probes == 0
    assert not stage.admission.routes.closed()
    assert not stage.admission.routes.probe_is_out()


# --- a drain with an open circuit ----------------------------------------------------------------


AT_ONE_INSTANT_MAX = 60
"""Rounds of admission at one instant of the clock: each message of a stage below may end there
once, and a few things more; what asks again at once without end passes any bound."""


@pytest.fixture
def no_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as soon as admission is asked too often while the clock stands."""
    asked: Counter[float] = Counter()
    admit = Calls.admit

    def counted(calls: Calls) -> None:
        asked[now_s()] += 1
        assert asked[now_s()] <= AT_ONE_INSTANT_MAX, f"admission asks without end at {now_s()} s"
        admit(calls)

    monkeypatch.setattr(Calls, "admit", counted)


@pytest.mark.usefixtures("no_spin")
def test_a_drain_asks_whether_the_provider_is_back() -> None:
    """A paid answer waits behind a message that failed: once a probe is answered both are out,
    well before the deadline."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, drain_timeout_s=60))
    down = ServiceFailure("credentials", remedy="mend the key")
    stage.broker.append("first", key="k")
    stage.broker.append("paid for", key="k")
    stage.extractor.latency_s = lambda text: 2.0 if text == "first" else 0.1
    stage.extractor.scripts["first"] = [down]
    stage.extractor.probe_fails = down
    ended_s = 0.0

    async def stop() -> None:
        await asyncio.sleep(1)
        stage.pipeline.stop()
        await asyncio.sleep(14)
        assert stage.extractor.probes > 1
        stage.extractor.probe_fails = None

    async def play() -> None:
        nonlocal ended_s
        stage.source.assign(stage.pipeline)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stage.pipeline.run())
            await stop()
        ended_s = now_s()

    virtual_time.run(play())
    assert stage.broker.texts() == ["first", "paid for"]
    assert stage.broker.committed == {partition(): 2}
    assert ended_s < 15 + PROBE_CAP_S + 3  # a probe and the call itself


@pytest.mark.usefixtures("no_spin")
def test_a_drain_sends_no_probe_that_nobody_waits_for() -> None:
    """Only calls are left that run: their answers tell more than a probe."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, drain_timeout_s=60))
    stage.extractor.probe_fails = ServiceFailure("credentials", remedy="mend the key")
    stage.broker.append("slow", key="a")
    stage.broker.append("fails", key="b")
    stage.extractor.latency_s = lambda text: 50.0 if text == "slow" else 0.1
    stage.extractor.scripts["fails"] = [stage.extractor.probe_fails]

    async def stop() -> None:
        await asyncio.sleep(1)

    stage.show(stop)
    assert stage.extractor.probes == 0
    assert stage.broker.texts() == ["slow"]


FAILURES: dict[str, Callable[[], CallFailure]] = {
    "service": lambda: ServiceFailure("credentials", remedy="mend the key"),
    "transient": lambda: TransientFailure("connection"),
    "limited": lambda: TransientFailure("rate_limited", retry_after_s=20.0),
    "no room": lambda: NoRoom(progress=None, provenance=None),
}


@pytest.mark.usefixtures("no_spin")
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("probes_fail", [True, False])
@pytest.mark.parametrize("per_minute", [None, 6])
@pytest.mark.parametrize("ends", ["drained", "forced", "revoked"])
def test_the_clock_goes_on_in_every_state(
    kind: str, probes_fail: bool, per_minute: int | None, ends: str
) -> None:
    """Circuit closed, open and probing, with and without budget, drained, forced, between a
    revoke and an assignment: whoever waits, waits for a moment or an event."""
    bounds = replace(BOUNDS, drain_timeout_s=30, ordering="key")
    stage = Limited(Limits(4, requests_per_minute=per_minute), bounds=bounds)
    stage.extractor.probe_fails = FAILURES["service"]() if probes_fail else None
    stage.extractor.latency_s = lambda text: 25.0 if text.startswith("slow") else 0.1
    for n in range(6):
        stage.broker.append(f"slow {n}", key=str(n % 3))
        stage.broker.append(f"bad {n}", key=str(n % 3))
        stage.extractor.scripts[f"bad {n}"] = [FAILURES[kind]() for _ in range(4)]

    async def act() -> None:
        await asyncio.sleep(40)
        if ends == "revoked":
            await stage.source.rebalance(keep={partition()})
            await asyncio.sleep(40)
        if ends == "forced":
            stage.pipeline.force()

    stage.show(act)


def test_a_retry_after_of_a_day_is_asked_again_after_the_cap() -> None:
    """Also where the circuit has opened and closed meanwhile: nobody is sent away for a day."""
    stage = Limited(Limits(50))
    stage.broker.append("patient", key="k")
    day = TransientFailure("server_error", retry_after_s=86_400.0)
    stage.extractor.scripts["patient"] = [day]
    for n in range(12):
        stage.broker.append(f"text {n}")
        stage.extractor.scripts[f"text {n}"] = [TransientFailure("connection")]

    async def wait() -> None:
        await asyncio.sleep(100)
        stage.broker.append("behind", key="k")
        await asyncio.sleep(2 * RETRY_AFTER_MAX_S)

    stage.show(wait)
    assert stage.extractor.probes >= 1
    assert {"patient", "behind"} <= set(stage.broker.texts())


# --- slow messages -------------------------------------------------------------------------------


def test_the_oldest_message_and_who_waits_for_it_are_shown() -> None:
    """Its age grows, and the lane behind it is counted."""
    stage = Limited(Limits(4), bounds=BOUNDS)
    for text in ("slow", "behind", "other"):
        stage.broker.append(text, key="k" if text != "other" else "o")
    stage.extractor.latency_s = lambda text: 50.0 if text == "slow" else 0.1

    async def look() -> None:
        await asyncio.sleep(40)
        status = stage.pipeline.status(SETTLED)
        assert status.oldest_message_age_s == pytest.approx(40, abs=0.5)
        assert status.lanes_waiting == 1
        await asyncio.sleep(20)
        assert stage.pipeline.status(SETTLED).oldest_message_age_s == 0

    stage.show(look)


def busy(stage: Stage, for_s: float) -> Callable[[], object]:
    """Others succeed all the while."""

    async def feed() -> None:
        while now_s() < for_s:
            stage.broker.append("other")
            await asyncio.sleep(1)
        await asyncio.sleep(5)

    return feed


def test_a_message_that_takes_too_long_is_rejected_while_others_succeed() -> None:
    """Cut off at its time, counted; in an outage it is not."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, message_timeout_s=30.0))
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda text: 1000.0 if text == "slow" else 0.1
    stage.show(busy(stage, 60))  # type: ignore[arg-type]
    [rejected] = stage.rejected()
    assert rejected.reason is Reason.EXHAUSTED
    assert "message_timeout_s (30 s)" in rejected.detail
    assert stage.extractor.cancelled == ["slow"]


def test_a_message_that_is_alone_is_not_cut_off() -> None:
    """Nobody has shown that it is not the provider."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, message_timeout_s=30.0))
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda _: 100.0
    stage.show()
    assert stage.broker.texts() == ["slow"]


def test_a_slow_call_is_made_a_second_time_and_both_are_paid_for() -> None:
    """The second answers first: the first is cancelled, counted and priced."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, hedge_after_s=10.0))
    priced_at(stage, 0.01)
    stage.broker.append("slow", key="k")
    latencies = iter([1000.0, 1.0])
    stage.extractor.latency_s = lambda text: next(latencies)
    stage.show()
    [(_, outcome)] = stage.broker.published
    assert isinstance(outcome, Extracted)
    assert (outcome.provenance.calls, outcome.provenance.cost_usd) == (2, 0.02)
    assert stage.extractor.cancelled == ["slow"]
    assert [event for event in stage.events if isinstance(event, Hedged)] == [Hedged("second")]
    assert stage.admission.busy == 0
    assert stage.admission.spent_last_hour_usd(0) == pytest.approx(0.02)


def test_a_second_call_is_no_second_chance_to_fail() -> None:
    """One of two fails: the other's answer counts."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, hedge_after_s=10.0))
    stage.broker.append("slow")
    latencies = iter([20.0, 1.0])
    stage.extractor.latency_s = lambda text: next(latencies)
    stage.extractor.scripts["slow"] = [TransientFailure("server_error")]
    stage.show()
    assert stage.extractor.calls == ["slow", "slow"]
    assert not [event for event in stage.events if isinstance(event, Retried)]
    assert [event for event in stage.events if isinstance(event, Hedged)] == [Hedged("first")]


def spent(calls: int) -> Provenance:
    return replace(PROVENANCE, calls=calls, cost_usd=0.01 * calls)


def asked_twice(*ends: NoRoom | TransientFailure) -> Limited:
    """A message whose first call ends after 20 s, the second one, made at 10 s, 5 s later; the
    calls after these take a second."""
    stage = Limited(Limits(4), bounds=replace(BOUNDS, hedge_after_s=10.0))
    priced_at(stage, 0.01)
    stage.broker.append("slow")
    latencies = iter([20.0, 15.0])
    stage.extractor.latency_s = lambda text: next(latencies, 1.0)
    stage.extractor.scripts["slow"] = list(ends)
    return stage


def test_a_second_call_is_answered_where_the_first_found_no_room() -> None:
    """The answer is paid for and counts; so does what the first call has cost."""
    stage = asked_twice(NoRoom(progress="one", provenance=spent(1)))
    stage.show()
    [(_, outcome)] = stage.broker.published
    assert isinstance(outcome, Extracted)
    assert stage.extractor.calls == ["slow", "slow"]
    assert (outcome.provenance.calls, outcome.provenance.cost_usd) == (2, 0.02)
    assert [event for event in stage.events if isinstance(event, Hedged)] == [Hedged("second")]
    assert stage.admission.spent_last_hour_usd(0) == pytest.approx(0.02)
    assert stage.admission.busy == 0


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (NoRoom(progress="one", provenance=spent(1)), (2, "two"), "two"),
        (NoRoom(progress="two", provenance=spent(2)), (1, "one"), "two"),
        (TransientFailure("timeout", progress="two", provenance=spent(2)), (1, "one"), "two"),
    ],
)
def test_of_two_calls_without_an_answer_the_better_progress_is_kept(
    first: NoRoom | TransientFailure, second: tuple[int, str], kept: str
) -> None:
    """Answers already paid for are not asked for again, and both calls are spent."""
    calls, progress = second
    failed = TransientFailure("server_error", progress=progress, provenance=spent(calls))
    stage = asked_twice(first, failed)
    stage.show()
    assert stage.extractor.progress == [None, None, kept]
    retried = [event for event in stage.events if isinstance(event, Retried)]
    assert bool(retried) == isinstance(first, TransientFailure)
    assert stage.admission.spent_last_hour_usd(0) >= 0.03
    [(_, outcome)] = stage.broker.published
    assert isinstance(outcome, Extracted)


def test_a_dead_letter_counts_calls_that_were_cut_off() -> None:
    """Two calls went out and neither was answered: two attempts."""
    bounds = replace(BOUNDS, hedge_after_s=10.0, message_timeout_s=30.0)
    stage = Limited(Limits(4), bounds=bounds)
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda text: 1000.0 if text == "slow" else 0.1
    stage.show(busy(stage, 60))  # type: ignore[arg-type]
    [rejected] = stage.rejected()
    assert stage.extractor.cancelled == ["slow", "slow"]
    assert rejected.attempts == 2
    assert [event for event in stage.events if isinstance(event, Hedged)] == [Hedged("none")]


def test_a_message_that_takes_too_long_waits_in_the_retry_topic() -> None:
    """Cut off like one that is exhausted: where there is such a topic it goes there first, with
    the call that was cut off in its history."""
    bounds = replace(BOUNDS, ordering="none", message_timeout_s=30.0, later=Later(10.0, 3))
    stage = Limited(Limits(4), bounds=bounds)
    stage.broker.append("slow")
    stage.extractor.latency_s = lambda text: 1000.0 if text == "slow" else 0.1
    stage.show(busy(stage, 60))  # type: ignore[arg-type]
    assert not stage.rejected()
    [postponed] = [each for _, each in stage.broker.published if isinstance(each, Postponed)]
    history = History.of(postponed.carries)
    assert history is not None
    assert (history.attempts, history.retries) == (1, 1)


def test_no_more_than_one_call_in_twenty_is_a_second_one() -> None:
    """Where all are slow the provider is; and never two for one message, nor beyond the slots."""
    bounds = replace(WIDE, concurrency=450, window=450, hedge_after_s=0.5)
    stage = Limited(Limits(450), bounds=bounds)
    for n in range(400):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda text: 5.0 if int(text.split()[1]) % 2 else 0.1
    stage.show()
    second = len(stage.extractor.calls) - 400
    assert 0 < second <= 400 * HEDGED_SHARE + 1
    assert stage.extractor.in_flight_max <= 450
    assert stage.broker.committed == {partition(): 400}


def test_a_second_call_needs_a_free_slot() -> None:
    """While others wait for a slot, none is taken from them."""
    stage = Limited(Limits(2), bounds=replace(BOUNDS, concurrency=2, hedge_after_s=0.5))
    for n in range(8):
        stage.broker.append(f"text {n}")
    stage.extractor.latency_s = lambda _: 5.0

    async def look() -> None:
        await asyncio.sleep(14)
        assert len(stage.extractor.calls) == 6
        assert stage.extractor.in_flight_max == 2
        stage.pipeline.force()

    stage.show(look)


# --- one budget for several workers --------------------------------------------------------------

TOKENS = 100
"""Of each call."""
TOKENS_PER_MINUTE = 60_000


class Group:
    """Workers on one broker, each with its partitions, that see the lags every ten seconds."""

    def __init__(self, workers: int, backlog: dict[int, int]) -> None:
        self.broker = FakeBroker(6)
        for number, messages in backlog.items():
            for n in range(messages):
                self.broker.append(f"text {number} {n}", number=number)
        self.extractors = [FakeExtractor() for _ in range(workers)]
        self.sources = [FakeSource(self.broker) for _ in range(workers)]
        self.pipelines = [self._worker(n) for n in range(workers)]

    def _worker(self, number: int) -> Pipeline:
        self.extractors[number].tokens = lambda _: TOKENS
        limits = Limits(50, tokens_per_minute=TOKENS_PER_MINUTE)
        return Pipeline(
            self.sources[number],
            self.extractors[number],
            FakeSink(self.broker),
            decode,
            WIDE,
            observe=lambda _: None,
            uniform=lambda low, high: high,
            wall_clock=now_s,
            admission=limited(limits),
        )

    def lags(self) -> dict[Partition, int | None]:
        return {
            where: log.end - self.broker.committed.get(where, 0)
            for where, log in self.broker.logs.items()
        }

    def tokens(self, for_s: float) -> list[int]:
        """What each worker uses in so many seconds, after the first twenty."""
        return virtual_time.run(self._play(for_s))

    async def _play(self, for_s: float) -> list[int]:
        share = 6 // len(self.pipelines)
        async with asyncio.TaskGroup() as tasks:
            for n, (source, pipeline) in enumerate(zip(self.sources, self.pipelines, strict=True)):
                pipeline.seen(dict.fromkeys(self.broker.logs))
                source.assign(pipeline, range(n * share, (n + 1) * share))
                tasks.create_task(pipeline.run())
                tasks.create_task(self._look(pipeline, 3.0 * n))
            await asyncio.sleep(20)
            before = [len(each.calls) for each in self.extractors]
            await asyncio.sleep(for_s)
            used = [len(each.calls) for each in self.extractors]
            for pipeline in self.pipelines:
                pipeline.force()
        return [TOKENS * (now - then) for now, then in zip(used, before, strict=True)]

    async def _look(self, pipeline: Pipeline, first_s: float) -> None:
        """As supervision does, each worker in its own rhythm."""
        await asyncio.sleep(first_s)
        while not pipeline.stopping:
            pipeline.seen(self.lags())
            await asyncio.sleep(10)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_one_token_budget(workers: int) -> None:
    """Together they use it within 5 %, over five minutes, without hearing of each other."""
    group = Group(workers, dict.fromkeys(range(6), 1000))
    used = sum(group.tokens(300))
    assert 0.95 * 5 * TOKENS_PER_MINUTE <= used <= 1.05 * 5 * TOKENS_PER_MINUTE


@pytest.mark.parametrize("workers", [2, 3])
def test_a_backlog_on_one_partition_gets_nine_tenths_of_the_budget(workers: int) -> None:
    """Its worker needs not leave the others' part unused; and never is it more than all of it."""
    group = Group(workers, {0: 4000})
    used = group.tokens(300)
    assert used[1:] == [0] * (workers - 1)
    assert 0.9 * 5 * TOKENS_PER_MINUTE <= used[0] <= 5 * TOKENS_PER_MINUTE


def test_an_estimate_is_made_for_what_is_asked() -> None:
    """Larger than the bucket, a call goes on a full one, and the next one waits for the debt."""
    stage = Limited(Limits(50, tokens_per_minute=600))
    stage.extractor.tokens = lambda text: 200 if text == "large" else 10
    for text in ("large", "small"):
        stage.broker.append(text)
    began: dict[str, float] = {}

    def latency(text: str) -> float:
        began[text] = now_s()
        return 0.1

    stage.extractor.latency_s = latency
    stage.show()
    assert stage.extractor.estimate("large", None) == Estimate(200, 200)
    assert began["large"] < 1
    assert began["small"] - began["large"] == pytest.approx(19, abs=0.5)
