"""The cache around an extractor, under virtual time: hits, shared calls, what a failure means."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from service.core.errors import ServiceFailure, TransientFailure
from service.core.events import CacheLooked, CacheWritten, Event
from service.core.messages import Extracted, Provenance, Reason, Record, Rejected
from service.llm.cache import CachedExtractor, cached, packed, unpacked
from service.llm.extractor import OpenAIExtractor
from service.llm.stores import StoreFailed
from service.settings import Settings
from tests.support import virtual_time
from tests.support.fakes import FakeExtractor

PAID = Provenance(
    "m", "p", "s", calls=2, tokens_input=100, tokens_output=20, tokens_cached=5, cost_usd=0.25
)
FREE = Provenance("m", "p", "s", cached=True)
KEY = "0f" * 32


class Model(FakeExtractor):
    """A fake model whose answers cost something, and that has a life."""

    identity = "identity"
    running = False

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    async def check(self) -> str | None:
        return "a warning"

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        outcome = await super().call(text, progress)
        if isinstance(outcome, Rejected):
            return outcome
        records = (Record(json.dumps(text).encode(), b"k\xc3\xa9y"), Record(b"{}"))
        return Extracted(records, PAID, answer_id=f"answer {len(self.calls)}")


class ScriptedStore:
    """A store in a dict that can be slow, fail, or hold something else."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.fails = False
        self.put_s = 0.0
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    async def get(self, key: str) -> bytes | None:
        if self.fails:
            raise StoreFailed
        return self.values.get(key)

    async def put(self, key: str, value: bytes) -> bool:
        await asyncio.sleep(self.put_s)
        if self.fails:
            raise StoreFailed
        self.values[key] = value
        return True


class Bench:
    """A cache around a fake model; `run` plays a scene under virtual time."""

    def __init__(self) -> None:
        self.model, self.store = Model(), ScriptedStore()
        self.events: list[Event] = []
        self.cache = CachedExtractor(self.model, self.store, self.events.append)

    def run(self, scene: Callable[[], Awaitable[None]]) -> None:
        async def play() -> None:
            await self.cache.start()
            try:
                await scene()
            finally:
                await self.cache.stop()

        virtual_time.run(play())

    async def extracted(self, text: str) -> Extracted:
        outcome = await self.cache.call(text, None)
        assert isinstance(outcome, Extracted)
        return outcome

    def looked(self) -> Counter[str]:
        return Counter(each.result for each in self.events if isinstance(each, CacheLooked))

    def written(self) -> Counter[str]:
        return Counter(each.result for each in self.events if isinstance(each, CacheWritten))


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- hits ---


def test_a_repeated_text_costs_nothing(bench: Bench) -> None:
    """The second time: the same records and keys, no call, no tokens, no cost, marked, and an
    answer id of its own, so that a reader does not mix two messages into one set."""

    async def scene() -> None:
        first = await bench.extracted("text")
        again = await bench.extracted("text")
        assert (first.provenance, first.answer_id) == (PAID, "answer 1")
        assert again.records == first.records
        assert again.provenance == FREE
        third = await bench.extracted("text")
        assert len({first.answer_id, again.answer_id, third.answer_id, ""}) == 4

    bench.run(scene)
    assert bench.model.calls == ["text"]
    assert bench.looked() == {"miss": 1, "hit": 2}
    assert bench.written() == {"stored": 1}


def test_no_text_and_no_cost_is_stored(bench: Bench) -> None:
    """Keys are hashes, values hold the records and where they came from."""
    bench.model.latency_s = lambda _: 0.0
    rejected = Rejected(Reason.INVALID, "detail", provenance=PAID)
    bench.model.scripts["bad canary"] = [rejected]

    async def scene() -> None:
        await bench.extracted("canary")
        assert await bench.cache.call("bad canary", None) == rejected

    bench.run(scene)
    [(key, value)] = bench.store.values.items()
    assert (len(key), int(key, 16) > 0) == (64, True)
    assert b'"answer_id":""' in value
    assert b"0.25" not in value


def test_a_rejection_is_asked_again(bench: Bench) -> None:
    """Only validated answers are kept: another day the model may do better."""
    bench.model.scripts["text"] = [Rejected(Reason.INVALID, "", provenance=PAID)]

    async def scene() -> None:
        assert isinstance(await bench.cache.call("text", None), Rejected)
        assert isinstance(await bench.cache.call("text", None), Extracted)

    bench.run(scene)
    assert len(bench.model.calls) == 2


def test_an_answer_is_stored_before_it_is_given(bench: Bench) -> None:
    """Nobody can publish what a replay would pay for again."""
    bench.store.put_s = 0.2

    async def scene() -> None:
        await bench.extracted("text")
        assert len(bench.store.values) == 1

    bench.run(scene)


def test_half_a_character_has_a_key() -> None:
    """What such a text comes to is the extractor's to say."""
    assert key_of("a", "\ud800") != key_of("a", "?")


# --- keys ---


def key_of(identity: str, text: str) -> str:
    async def key() -> str:
        model = Model()
        model.identity = identity
        return CachedExtractor(model, ScriptedStore(), lambda _: None)._key(text)

    return virtual_time.run(key())


def test_a_key_is_of_everything_that_decides() -> None:
    """Another text, another identity, and another border between them are other keys."""
    keys = {key_of("a", "bc"), key_of("a", "bcd"), key_of("ab", "c"), key_of("a", "2:bc")}
    assert len(keys) == 4
    assert key_of("a", "bc") in keys


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")


def identity(**sections: dict[str, object]) -> str:
    extraction = {"model": "first", **sections.pop("extraction", {})}
    return _identity(**sections, extraction=extraction)


def _identity(**sections: dict[str, object]) -> str:
    return OpenAIExtractor(Settings.model_validate(sections), lambda _: None).identity


@pytest.mark.parametrize(
    "changed",
    [
        {"extraction": {"model": "other"}},
        {"extraction": {"instructions": "Take what there is."}},
        {"extraction": {"record": "service.demo.records:Ticket"}},
        {"extraction": {"temperature": 0.5}},
        {"extraction": {"output_tokens_max": 99}},
        {"extraction": {"cardinality": "many"}},
        {"extraction": {"parameters": {"seed": 7}}},
        {"extraction": {"parameters": {"temperature": 0.5}}},
        {
            "extraction": {
                "model": ["first", "other"],
                "model_parameters": {"other": {"reasoning_effort": "low"}},
            }
        },
        {
            "extraction": {
                "model": "first",
                "endpoints": {"first": {"base_url": "http://127.0.0.1:7/v1"}},
            }
        },
        {"output": {"key_field": "name"}},
    ],
    ids=str,
)
@pytest.mark.usefixtures("loopback")
def test_what_decides_an_answer_is_in_the_identity(changed: dict[str, dict[str, object]]) -> None:
    """Model, prompt, schema, parameters and the output's key: each alone makes another one."""
    assert identity(**changed) != identity()


@pytest.mark.usefixtures("loopback")
def test_waits_are_not_in_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is no part of an answer, nor is what is learned of an endpoint, or how fast and
    cheap it answers; the endpoint itself is."""
    patient = {
        "call_timeout_s": 5,
        "attempts_max": 2,
        "reasks_max": 0,
        "mode": "tools",
        "strict": "off",
        "headers": {"x-team": "a"},
        "parameters": {"service_tier": "flex"},
    }
    before = identity()
    assert identity(extraction=patient) == before
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:10/v1")
    assert identity() != before


@pytest.mark.usefixtures("loopback")
def test_a_changed_validator_is_another_identity(tmp_path: pytest.TempPathFactory) -> None:
    """The schema does not show a validator: the file that defines the record counts as well."""
    found = set()
    for number in (1, 2):
        file = tmp_path / f"records{number}.py"  # type: ignore[operator]
        file.write_text(
            "from pydantic import BaseModel\n\n\nclass One(BaseModel):\n    name: str\n"
            f"\n\nLIMIT = {number}\n"
        )
        found.add(identity(extraction={"record": f"{file}:One"}))
    assert len(found) == 2


# --- values ---


ANSWER = Extracted((Record(b'{"n":1}', b"k"),), PAID, "id")


def test_what_was_packed_comes_out() -> None:
    """Records and provenance, without the cost."""
    found = unpacked(KEY, packed(KEY, ANSWER))
    assert found is not None
    assert found == replace(ANSWER, provenance=FREE, answer_id=found.answer_id)


@pytest.mark.parametrize("value", [b"", b" ", b"{}", b"null", b"0" * 32 + b" {}", b"\xff" * 99])
def test_foreign_values_are_nothing(value: bytes) -> None:
    """What somebody else wrote is no answer, whatever it is."""
    assert unpacked(KEY, value) is None


def test_damaged_values_are_nothing() -> None:
    """Cut anywhere, one bit changed anywhere, or another key's: each is found."""
    whole = packed(KEY, ANSWER)
    for end in range(len(whole)):
        assert unpacked(KEY, whole[:end]) is None
    for at in range(len(whole)):
        bent = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert unpacked(KEY, bent) is None
    assert unpacked("1f" * 32, whole) is None


def test_another_shape_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Well sealed, but of a version whose answers look different."""

    class Other:
        @staticmethod
        def dump_json(_: object) -> bytes:
            return b'{"records":[{"json":7}]}'

    with monkeypatch.context() as patched:
        patched.setattr("service.llm.cache._ANSWER", Other)
        other = packed(KEY, ANSWER)
    assert unpacked(KEY, other) is None


def test_bad_values_are_misses_and_written_anew(bench: Bench) -> None:
    """They are counted, the text is asked, and the next look is a hit."""

    async def scene() -> None:
        await bench.extracted("text")
        [key] = bench.store.values
        bench.store.values[key] = b"something else"
        for _ in range(2):
            await bench.extracted("text")

    bench.run(scene)
    assert len(bench.model.calls) == 2
    assert bench.looked() == {"miss": 1, "damaged": 1, "hit": 1}


def test_a_store_that_fails_is_a_miss(bench: Bench) -> None:
    """Every message has its outcome, and both failures are counted."""
    bench.store.fails = True

    async def scene() -> None:
        for _ in range(2):
            assert (await bench.extracted("text")).provenance == PAID

    bench.run(scene)
    assert (bench.looked(), bench.written()) == ({"error": 2}, {"error": 2})


# --- single flight ---


def test_texts_in_flight_share_a_call(bench: Bench) -> None:
    """Five messages, one call: one has the cost, four are free, and each its own answer id."""

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(bench.extracted("text")) for _ in range(5)]
            tasks.create_task(bench.extracted("other"))
        answers = [each.result() for each in found]
        assert [each.provenance for each in answers] == [PAID, FREE, FREE, FREE, FREE]
        assert len({each.answer_id for each in answers}) == 5
        assert len({each.records for each in answers}) == 1

    bench.run(scene)
    assert sorted(bench.model.calls) == ["other", "text"]
    assert bench.looked() == {"miss": 2, "shared": 4}


def test_a_revoked_first_message_leaves_the_call_to_the_others(bench: Bench) -> None:
    """The call goes on, and the next one takes the cost on itself: it is in some header."""

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            first, second, third = [tasks.create_task(bench.extracted("text")) for _ in range(3)]
            await asyncio.sleep(0.05)
            first.cancel()
        assert second.result().provenance == PAID
        assert third.result().provenance == FREE

    bench.run(scene)
    assert bench.model.calls == ["text"]
    assert bench.model.cancelled == []


def test_a_call_that_nobody_waits_for_is_cut_off(bench: Bench) -> None:
    """With the last of its messages; a message that comes in the same moment begins anew."""

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(bench.extracted("text")) for _ in range(2)]
            await asyncio.sleep(0.05)
            for each in waiting:
                each.cancel()
            newcomer = tasks.create_task(bench.extracted("text"))
        assert newcomer.result().provenance == PAID
        assert bench.model.cancelled == ["text"]

    bench.run(scene)
    assert len(bench.model.calls) == 2


def test_a_paid_answer_is_stored_though_nobody_waits(bench: Bench) -> None:
    """Its message is revoked while it is written: whoever gets it next finds it."""
    bench.store.put_s = 1.0

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            only = tasks.create_task(bench.extracted("text"))
            await asyncio.sleep(0.5)
            only.cancel()
        assert (await bench.extracted("text")).provenance == PAID  # joins: it is being written
        assert (await bench.extracted("text")).provenance == FREE

    bench.run(scene)
    assert bench.model.calls == ["text"]


@pytest.mark.parametrize(
    "failure",
    [
        TransientFailure("rate_limited", retry_after_s=7.0, progress="theirs", provenance=PAID),
        ServiceFailure("quota", remedy="pay", progress="theirs", provenance=PAID),
    ],
    ids=lambda failure: failure.reason,
)
def test_a_failure_is_everyones_with_their_own_progress(
    bench: Bench, failure: TransientFailure | ServiceFailure
) -> None:
    """Same class, reason, wait and remedy; each hands back its own progress, one has the cost,
    and the others say that it has been told."""
    bench.model.always = failure

    async def ask(progress: str) -> TransientFailure | ServiceFailure:
        with pytest.raises(type(failure)) as caught:
            await bench.cache.call("text", progress)
        assert isinstance(caught.value, type(failure))
        return caught.value

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(ask("a"))
            second = tasks.create_task(ask("b"))
        assert first.result() is failure
        other = second.result()
        assert (other.progress, other.provenance) == ("b", FREE)
        assert (failure.shared, other.shared) == (False, True)
        for name in ("reason", "retry_after_s", "remedy"):
            assert getattr(other, name, None) == getattr(failure, name, None)
        bench.model.always = None
        assert (await bench.extracted("text")).provenance == PAID

    bench.run(scene)
    assert bench.model.progress == ["a", None]


def test_a_shared_rejection_costs_once(bench: Bench) -> None:
    """Each message is rejected, one of them with the cost."""
    bench.model.scripts["text"] = [Rejected(Reason.REFUSED, "no", provenance=PAID)]

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            both = [tasks.create_task(bench.cache.call("text", None)) for _ in range(2)]
        assert [each.result().provenance for each in both] == [PAID, FREE]
        assert {type(each.result()) for each in both} == {Rejected}

    bench.run(scene)


@pytest.mark.parametrize("fault", [RuntimeError("bug"), asyncio.CancelledError()], ids=repr)
def test_a_fault_of_ours_reaches_everyone(bench: Bench, fault: BaseException) -> None:
    """As without a cache it ends the run: neither swallowed nor waited for without end."""
    bench.model.scripts["text"] = [fault]

    async def ask() -> None:
        with pytest.raises(type(fault)):
            await bench.cache.call("text", None)

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(ask())

    bench.run(scene)


# --- its life ---


def test_start_stop_and_check_are_passed_on(bench: Bench) -> None:
    """Model and store live as long as the cache; the check is the model's."""

    async def scene() -> None:
        assert bench.model.running
        assert bench.store.running
        assert await bench.cache.check() == "a warning"

    bench.run(scene)
    assert not bench.model.running
    assert not bench.store.running


def test_a_stop_cuts_off_what_flies(bench: Bench) -> None:
    """No call outlives the cache."""
    bench.model.latency_s = lambda _: 3600.0

    async def scene() -> None:
        await bench.cache.start()
        waiting = asyncio.create_task(bench.cache.call("text", None))
        await asyncio.sleep(1)
        await bench.cache.stop()
        assert bench.model.cancelled == ["text"]
        with pytest.raises(asyncio.CancelledError):
            await waiting

    virtual_time.run(scene())


def test_without_a_mode_there_is_no_cache() -> None:
    """Off, the model is asked as ever."""
    model = Model()
    assert cached(model, Settings().cache, lambda _: None) is model
