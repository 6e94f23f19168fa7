"""The store in a real Redis or Valkey: what it keeps, and that it never holds anything up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from service.core.errors import CannotRun
from service.llm.stores import FAILURES_MAX, Store, StoreFailed, look_at_store, open_store
from service.settings import CacheSettings
from tests.support.redis import RealRedis


def settings(url: str, **given: object) -> CacheSettings:
    return CacheSettings.model_validate({"mode": "redis", "redis_url": url, **given})


@asynccontextmanager
async def opened(url: str, **given: object) -> AsyncIterator[Store]:
    """A store as the settings make it."""
    store = open_store(settings(url, **given), lambda _: None)
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


async def in_redis(server: RealRedis, *command: str) -> object:
    async with Redis.from_url(server.url) as client:
        return await client.execute_command(*command)


async def test_what_is_put_is_found_by_everyone(redis: RealRedis) -> None:
    """By another worker too, byte for byte, under the prefix and with an end."""
    value = bytes(range(256))
    async with opened(redis.url, ttl_s=60, redis_key_prefix="p:") as one:
        assert await one.get("key") is None
        assert await one.put("key", value)
        async with opened(redis.url, redis_key_prefix="p:") as other:
            assert await other.get("key") == value
        async with opened(redis.url, redis_key_prefix="q:") as stranger:
            assert await stranger.get("key") is None
    left_ms = await in_redis(redis, "PTTL", "p:key")
    assert isinstance(left_ms, int)
    assert 0 < left_ms <= 60_000


async def test_entries_end_after_their_time(redis: RealRedis) -> None:
    """The server drops them by itself."""
    async with opened(redis.url, ttl_s=1) as store:
        await store.put("key", b"v")
        async with asyncio.timeout(20):
            while await store.get("key") is not None:
                await asyncio.sleep(0.05)
    assert await in_redis(redis, "DBSIZE") == 0


async def test_many_at_once_share_few_connections(redis: RealRedis) -> None:
    """A burst of looks waits for a free connection instead of failing."""
    async with opened(redis.url, redis_timeout_s=5) as store:
        async with asyncio.TaskGroup() as tasks:
            for n in range(300):
                tasks.create_task(store.put(f"{n}", b"%d" % n))
        assert await store.get("299") == b"299"


async def test_a_store_that_hangs_costs_its_deadline_and_answers_right_afterwards(
    redis: RealRedis,
) -> None:
    """A look ends at the deadline; and the late answer to it is not taken for the next one's."""
    async with opened(redis.url, redis_timeout_s=0.1) as store:
        for key in ("a", "b"):
            await store.put(key, key.encode())
        redis.halt()
        began_s = time.monotonic()
        with pytest.raises(StoreFailed):
            await store.get("a")
        assert time.monotonic() - began_s < 2.0
        redis.go_on()
        async with asyncio.timeout(20):
            while not await _gives(store, "b"):
                pass
        for _ in range(20):
            assert await store.get("b") == b"b"
            assert await store.get("a") == b"a"


async def _gives(store: Store, key: str) -> bool:
    try:
        found = await store.get(key)
    except StoreFailed:
        await asyncio.sleep(0.1)
        return False
    assert found == key.encode()
    return True


async def test_a_dead_store_is_left_alone_and_found_again(
    redis: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed under an open connection and started anew: misses, then hits, without a restart."""
    monkeypatch.setattr("service.llm.stores.REST_S", 0.5)
    async with opened(redis.url) as store:
        await store.put("a", b"a")
        redis.kill()
        began_s = time.monotonic()
        for _ in range(FAILURES_MAX + 1000):
            with pytest.raises(StoreFailed):
                await store.get("a")
        assert time.monotonic() - began_s < 10.0  # a deadline for each would be minutes
        redis.start()
        await in_redis(redis, "SET", "sluice:a", "a")
        async with asyncio.timeout(30):
            while not await _gives(store, "a"):
                pass


async def test_the_check_is_content(redis: RealRedis) -> None:
    """It wrote, read, and leaves nothing for long."""
    [well] = await look_at_store(settings(redis.url, redis_timeout_s=5))
    assert "sluice:*" in well
    left_ms = await in_redis(redis, "PTTL", "sluice:check")
    assert isinstance(left_ms, int)
    assert 0 < left_ms <= 5_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--requirepass", "secret"), "refuses the credentials"),
        (("--user", "default", "on", "nopass", "~*", "+get"), "refuses the permission"),
        (("--replicaof", "127.0.0.1", "9"), "is a replica"),
        (("--maxmemory", "1", "--maxmemory-policy", "noeviction"), "is full"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
async def test_the_check_says_what_to_do(
    redis: RealRedis, options: tuple[str, ...], says: str
) -> None:
    """Each of what goes wrong with a Redis has its own sentence, without the URL."""
    redis.kill()
    redis.start(*options)
    with pytest.raises(CannotRun, match=says) as caught:
        await look_at_store(settings(redis.url))
    assert redis.url not in str(caught.value)


async def test_the_check_of_nobody(redis: RealRedis) -> None:
    """No server: its address is to be looked at."""
    redis.kill()
    with pytest.raises(CannotRun, match=r"no store answers at cache\.redis_url"):
        await look_at_store(settings(redis.url))
