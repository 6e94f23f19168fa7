"""Where answers are kept: in this process, or in a Redis or Valkey that several share.

A store must never cost more than it saves. Whatever goes wrong with it is `StoreFailed`, within
a bound of time, and one that is down is left alone for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from service.core.errors import CannotRun, WrongSettings
from service.core.events import CacheSized, Observe
from service.settings import CacheSettings

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

ENTRY_BYTES = 400
"""What an entry of the memory store takes beside its key and value; measured with tracemalloc
for keys of 64 characters (see tests/unit/test_stores.py)."""
CONNECTIONS_MAX = 16
"""To Redis. A command takes well under a millisecond: more would only wait at the server."""
FAILURES_MAX = 3
"""In a row, after which a store is left alone; single slow answers are no reason."""
REST_S = 5.0
"""How long; then one command looks whether it is back."""
CHECK_TIMEOUT_S = 5.0
"""For `sluice check`, which tells slow from unreachable."""

T = TypeVar("T")


class StoreFailed(Exception):
    """The store did not do it in time; it is not known whether it did it later."""


class Store(Protocol):
    """Bytes by key, for a time."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def get(self, key: str) -> bytes | None:
        """The value; None where there is none (any more). Raises `StoreFailed`."""

    async def put(self, key: str, value: bytes) -> bool:
        """Keep it; False where it is too large to be kept. Raises `StoreFailed`."""


def open_store(settings: CacheSettings, observe: Observe) -> Store:
    """The store that the settings name. Raises `WrongSettings`; no traffic before `start`."""
    if settings.mode == "memory":
        return MemoryStore(settings.memory_max_bytes, settings.ttl_s, time.monotonic, observe)
    return GuardedStore(RedisStore(settings), settings.redis_timeout_s, time.monotonic)


# --- in this process ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    until_s: float


class MemoryStore:
    """The most recently used answers, bounded in bytes; gone with the process."""

    def __init__(
        self, max_bytes: int, ttl_s: float, now_s: Callable[[], float], observe: Observe
    ) -> None:
        self._max_bytes, self._ttl_s = max_bytes, ttl_s
        self._now_s, self._observe = now_s, observe
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._size_bytes = 0

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.until_s <= self._now_s():
            self._drop(key)
            self._tell()
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def put(self, key: str, value: bytes) -> bool:
        """What is too large for the whole store throws nothing else out."""
        if _taken_bytes(key, value) > self._max_bytes:
            return False
        if key in self._entries:
            self._drop(key)
        self._entries[key] = _Entry(value, self._now_s() + self._ttl_s)
        self._size_bytes += _taken_bytes(key, value)
        while self._size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._tell()
        return True

    def _drop(self, key: str) -> None:
        self._size_bytes -= _taken_bytes(key, self._entries.pop(key).value)

    def _tell(self) -> None:
        self._observe(CacheSized(len(self._entries), self._size_bytes))


def _taken_bytes(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES


# --- a store that may fail ---------------------------------------------------------------------


class GuardedStore:
    """Another store under a deadline, and left alone while it is down.

    Reading and writing are judged apart: a full Redis refuses writes and answers reads.
    """

    def __init__(self, store: Store, timeout_s: float, now_s: Callable[[], float]) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._reads = _Breaker("gives no answers", now_s, timeout_s)
        self._writes = _Breaker("takes no answers", now_s, timeout_s)

    async def start(self) -> None:
        await self._store.start()

    async def stop(self) -> None:
        """Bounded as well; what does not close in order is left to the process's end."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._store.stop()
        except Exception as error:  # the client's: nothing of ours depends on it any more
            log.debug("the result cache did not close in order (%s)", type(error).__name__)

    async def get(self, key: str) -> bytes | None:
        return await self._guarded(self._reads, lambda: self._store.get(key))

    async def put(self, key: str, value: bytes) -> bool:
        return await self._guarded(self._writes, lambda: self._store.put(key, value))

    async def _guarded(self, breaker: _Breaker, act: Callable[[], Awaitable[T]]) -> T:
        if not breaker.lets_through():
            raise StoreFailed
        try:
            async with asyncio.timeout(self._timeout_s):
                done = await act()
        except Exception as error:  # whatever a client raises, its store is not needed to go on
            breaker.failed(type(error).__name__)
            raise StoreFailed from None
        breaker.succeeded()
        return done


class _Breaker:
    """Opens after some failures in a row, says so once, and lets one through at a time to see."""

    def __init__(self, complaint: str, now_s: Callable[[], float], timeout_s: float) -> None:
        self._complaint, self._now_s, self._timeout_s = complaint, now_s, timeout_s
        self._failures = 0
        self._rests_until_s = float("-inf")

    def lets_through(self) -> bool:
        if self._failures < FAILURES_MAX:
            return True
        now_s = self._now_s()
        if now_s < self._rests_until_s:
            return False
        self._rests_until_s = now_s + self._timeout_s  # the others wait for what this one finds
        return True

    def failed(self, why: str) -> None:
        """`why` is an exception's type: its text can hold the URL and so a password."""
        self._failures += 1
        if self._failures == FAILURES_MAX:
            log.warning(
                "the result cache %s (%s): going on without it, repeated texts are paid for",
                self._complaint,
                why,
            )
        if self._failures >= FAILURES_MAX:
            self._rests_until_s = self._now_s() + REST_S

    def succeeded(self) -> None:
        if self._failures >= FAILURES_MAX:
            log.info("the result cache no longer %s: it is back", self._complaint)
        self._failures = 0


# --- Redis or Valkey ---------------------------------------------------------------------------


class RedisStore:
    """One Redis or Valkey, shared by whoever uses the same prefix; entries go by themselves.

    Building it reads the URL's file and raises `WrongSettings`. Errors are the client's.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._prefix = settings.redis_key_prefix
        self._ttl_ms = max(1, int(settings.ttl_s * 1000))
        self._client = _client(settings, settings.redis_timeout_s)

    async def start(self) -> None:
        """No traffic: a store that is down must not delay the start."""

    async def stop(self) -> None:
        await self._client.aclose()

    async def get(self, key: str) -> bytes | None:
        found = await self._client.get(self._prefix + key)
        assert not isinstance(found, str), "asked for bytes"
        return found

    async def put(self, key: str, value: bytes) -> bool:
        await self._client.set(self._prefix + key, value, px=self._ttl_ms)
        return True


def _client(settings: CacheSettings, timeout_s: float) -> Redis:
    """The client with all options said; it connects at its first command."""
    try:
        from redis import asyncio as redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise WrongSettings(
            "cache.mode: redis needs the package redis, which is not installed: "
            "pip install 'kafka-sluice[redis]'."
        ) from None
    try:
        pool = redis.BlockingConnectionPool.from_url(
            _url(settings),
            max_connections=CONNECTIONS_MAX,
            timeout=timeout_s,  # for a free connection
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a miss is cheaper than a second try
            protocol=2,  # GET and SET need no more, and proxies know it
            decode_responses=False,
        )
    except (ValueError, TypeError):
        raise WrongSettings(
            "cache.redis_url: it is no URL of Redis: redis://, rediss:// (TLS) or unix://, as in "
            "redis://:password@host:6379/0."
        ) from None
    return redis.Redis.from_pool(pool)


def _url(settings: CacheSettings) -> str:
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    assert settings.redis_url_file is not None, "the settings see to it"
    return _read(settings.redis_url_file)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or "no such file") if isinstance(error, OSError) else "it is no text"
        raise WrongSettings(f"cache.redis_url_file: {path} cannot be read: {why}.") from None
    if not text:
        raise WrongSettings(f"cache.redis_url_file: {path} is empty.")
    return text


# --- `sluice check` ----------------------------------------------------------------------------

_PROBE = "check"
"""Its key behind the prefix; no answer's, which are 64 hex digits."""


async def look_at_store(settings: CacheSettings) -> tuple[str, ...]:
    """What is well, then what to know besides; raises `Stop` with what to do."""
    if settings.mode == "memory":
        return (f"in this process, up to {settings.memory_max_bytes} bytes; gone at its end",)
    client = _client(settings, CHECK_TIMEOUT_S)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            took_s = await _written_and_read(client, settings.redis_key_prefix + _PROBE)
    except Exception as error:  # the client's own; a run would go on without the store
        raise CannotRun(_remedy(error, settings)) from None
    finally:
        await client.aclose()
    well = f"the store takes and gives answers under {settings.redis_key_prefix}*"
    if took_s <= settings.redis_timeout_s:
        return (well,)
    return (
        well,
        f"it takes {took_s:.2f} s, cache.redis_timeout_s is {settings.redis_timeout_s:g}: most "
        "looks would be given up; raise it, or use a nearer store",
    )


async def _written_and_read(client: Redis, key: str) -> float:
    """Seconds that reading took, connected already."""
    await client.set(key, b"sluice", px=int(CHECK_TIMEOUT_S * 1000))
    began_s = time.monotonic()
    found = await client.get(key)
    took_s = time.monotonic() - began_s
    if found != b"sluice":
        raise LookupError("another value than was written")
    return took_s


def _remedy(error: Exception, settings: CacheSettings) -> str:
    """By the exception's type: its text can hold the URL and so a password."""
    from redis import exceptions as redis

    match error:
        case redis.AuthenticationError() | redis.AuthorizationError():
            return "the store refuses the credentials: correct them in cache.redis_url"
        case redis.NoPermissionError():
            return (
                "the store refuses the permission: let the user GET and SET keys "
                f"{settings.redis_key_prefix}*"
            )
        case redis.ReadOnlyError():
            return "the store is a replica that takes no writes: name its primary"
        case redis.OutOfMemoryError():
            return "the store is full and drops nothing: set maxmemory-policy allkeys-lru there"
        case redis.ConnectionError() | redis.TimeoutError() | OSError():
            return (
                "no store answers at cache.redis_url: start it, or correct the address. A run "
                "goes on without it and pays for repeated texts"
            )
        case _:
            return (
                f"the store does not keep what it is given ({type(error).__name__}): it should be "
                "one Redis or Valkey, no cluster"
            )
