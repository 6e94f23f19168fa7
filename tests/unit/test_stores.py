"""Stores: what the one in memory keeps and drops, and when one that fails is left alone."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from pathlib import Path

import pytest

from service.core.errors import WrongSettings
from service.core.events import CacheSized, Event
from service.llm.stores import (
    ENTRY_BYTES,
    FAILURES_MAX,
    REST_S,
    GuardedStore,
    MemoryStore,
    StoreFailed,
    open_store,
)
from service.settings import CacheSettings
from tests.support import virtual_time

TTL_S = 60.0


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def memory(clock: Clock, entries: int, told: list[Event] | None = None) -> MemoryStore:
    """Room for so many entries with keys of one and values of nine bytes."""
    observe = (lambda _: None) if told is None else told.append
    return MemoryStore(entries * (ENTRY_BYTES + 10), TTL_S, clock, observe)


async def test_least_recently_used_goes_first(clock: Clock) -> None:
    """At the limit in bytes; being read counts as being used, being written as well."""
    store = memory(clock, 3)
    for key in "abc":
        assert await store.put(key, b"x" * 9)
    assert await store.get("a")
    assert await store.put("b", b"y" * 9)
    assert await store.put("d", b"x" * 9)
    assert [await store.get(key) for key in "abcd"] == [b"x" * 9, b"y" * 9, None, b"x" * 9]


async def test_entries_end_after_their_time(clock: Clock) -> None:
    """Up to the moment they are given, from it on they are gone; a read does not prolong them."""
    store = memory(clock, 3)
    await store.put("a", b"x")
    clock.now_s = TTL_S - 0.01
    assert await store.get("a") == b"x"
    clock.now_s = TTL_S
    assert await store.get("a") is None


async def test_what_is_too_large_throws_nothing_out(clock: Clock) -> None:
    """It is refused, and what was there stays."""
    store = memory(clock, 2)
    await store.put("a", b"x" * 9)
    assert not await store.put("b", b"x" * 2 * (ENTRY_BYTES + 10))
    assert await store.get("a") == b"x" * 9


async def test_size_is_told(clock: Clock) -> None:
    """After each change: entries and bytes, overwritten, dropped and outdated ones off again."""
    told: list[Event] = []
    store = memory(clock, 2, told)
    for key in "aabc":
        await store.put(key, b"x" * 9)
    clock.now_s = TTL_S
    await store.get("b")
    each = ENTRY_BYTES + 10
    assert told == [CacheSized(n, n * each) for n in (1, 1, 2, 2, 1)]


async def test_bytes_are_what_it_takes(clock: Clock) -> None:
    """What tracemalloc sees of 2,000 entries is not more than is counted, nor half of it."""
    told: list[Event] = []
    store = MemoryStore(10_000_000, TTL_S, clock, told.append)
    tracemalloc.start()
    try:
        for n in range(2_000):
            await store.put(f"{n:064x}", b"%0200d" % n)
            del told[:-1]
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    [sized] = told
    assert isinstance(sized, CacheSized)
    assert sized.size_bytes / 2 < taken_bytes <= sized.size_bytes


# --- a store that fails ---


class Flaky:
    """Fails, or takes its time, as the test says; counts who got through to it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.takes_s = 0.0
        self.reads = self.writes = 0

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await asyncio.sleep(self.takes_s)

    async def get(self, key: str) -> bytes | None:
        self.reads += 1
        await asyncio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        return key.encode()

    async def put(self, key: str, value: bytes) -> bool:
        self.writes += 1
        if self.error is not None:
            raise self.error
        return True


class Guarded:
    """A guard with a deadline of 0.25 s on the virtual clock."""

    def __init__(self) -> None:
        self.inner = Flaky()
        self.store = GuardedStore(self.inner, 0.25, lambda: asyncio.get_running_loop().time())

    async def fails(self) -> float:
        """A read that fails; how long that took."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(StoreFailed):
            await self.store.get("k")
        return loop.time() - began_s


def test_a_slow_store_is_given_up() -> None:
    """After its deadline a look has failed; a few times, then it costs nothing any more."""

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.takes_s = 3600.0
        took_s = [await guarded.fails() for _ in range(FAILURES_MAX + 50)]
        assert took_s == pytest.approx([0.25] * FAILURES_MAX + [0.0] * 50)
        assert guarded.inner.reads == FAILURES_MAX

    virtual_time.run(scene())


def test_one_looks_whether_it_is_back() -> None:
    """After the rest one of many is let through, and once it succeeds all are again."""

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.takes_s = 3600.0
        for _ in range(FAILURES_MAX):
            await guarded.fails()
        await asyncio.sleep(REST_S)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(guarded.fails())
        assert guarded.inner.reads == FAILURES_MAX + 1
        guarded.inner.takes_s = 0.0
        await guarded.fails()
        await asyncio.sleep(REST_S)
        assert [await guarded.store.get("k") for _ in range(9)] == [b"k"] * 9

    virtual_time.run(scene())


def test_single_failures_are_no_reason() -> None:
    """Only failures in a row count."""

    async def scene() -> None:
        guarded = Guarded()
        for _ in range(10):
            guarded.inner.error = ConnectionError("reset")
            for _ in range(FAILURES_MAX - 1):
                await guarded.fails()
            guarded.inner.error = None
            assert await guarded.store.get("k") == b"k"

    virtual_time.run(scene())


def test_writes_are_judged_apart() -> None:
    """A full store that refuses writes goes on answering."""

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.error = ValueError("full")
        for _ in range(FAILURES_MAX + 1):
            with pytest.raises(StoreFailed):
                await guarded.store.put("k", b"v")
        assert guarded.inner.writes == FAILURES_MAX
        guarded.inner.error = None
        assert await guarded.store.get("k") == b"k"

    virtual_time.run(scene())


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """One line when it is left alone, one when it is back; the error's own text in neither."""
    caplog.set_level(logging.INFO)

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.error = ConnectionError("redis://:canary@host")
        for _ in range(5):
            for _ in range(20):
                await guarded.fails()
            await asyncio.sleep(REST_S)
        guarded.inner.error = None
        await guarded.store.get("k")

    virtual_time.run(scene())
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("the result cache gives no answers (ConnectionError)")
    assert last.endswith("it is back")
    assert "canary" not in caplog.text


def test_cancellation_is_no_failure() -> None:
    """A message that is revoked while it looks says nothing about the store."""

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.takes_s = 0.1
        async with asyncio.TaskGroup() as tasks:
            for _ in range(FAILURES_MAX + 1):
                look = tasks.create_task(guarded.store.get("k"))
                await asyncio.sleep(0.01)
                look.cancel()
        assert await guarded.store.get("k") == b"k"

    virtual_time.run(scene())


def test_closing_is_bounded() -> None:
    """A store that hangs does not hold the stop up."""

    async def scene() -> None:
        guarded = Guarded()
        guarded.inner.takes_s = 3600.0
        await guarded.store.stop()
        assert asyncio.get_running_loop().time() == pytest.approx(0.25)

    virtual_time.run(scene())


# --- wrong settings ---


def opened(**given: object) -> None:
    open_store(CacheSettings.model_validate({"mode": "redis", **given}), lambda _: None)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, exit code 2; the other modes need nothing."""
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(WrongSettings, match=r"pip install 'kafka-sluice\[redis\]'"):
        opened(redis_url="redis://localhost")
    open_store(CacheSettings(mode="memory"), lambda _: None)


def test_a_url_that_is_none_is_not_repeated() -> None:
    """It may hold a password."""
    with pytest.raises(WrongSettings, match="no URL of Redis") as caught:
        opened(redis_url="redis://:canary@host:port/0")
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_url_from_a_file(tmp_path: Path) -> None:
    """With the line end that editors add; a file that cannot be read is named."""
    file = tmp_path / "url"
    for text, match in ((None, "No such file"), ("\n", "is empty"), ("x", "no URL of Redis")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(WrongSettings, match=match):
            opened(redis_url_file=file)
    file.write_text("redis://localhost\n")
    opened(redis_url_file=file)
