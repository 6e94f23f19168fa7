"""llmock, an independent judge of clients, in front of the whole service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.process.conftest import Scene
from tests.support.kafka import free_ports


@asynccontextmanager
async def judge(*options: str) -> AsyncIterator[str]:
    """An llmock process with these quotas and faults; its address."""
    [port] = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("llmock")),
        *("serve", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
        *options,
        stdout=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while not await answers(session, url):
                await asyncio.sleep(0.1)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def judged(scene: Scene, url: str, **settings: str) -> None:
    """Everything that was sent has its outcome, at 50 slots, and the verdict is PASS."""
    await scene.catch_up(
        within_s=110,
        OPENAI_BASE_URL=f"{url}/v1",
        SLUICE_EXTRACTION__MODEL="gpt-4o-mini",
        SLUICE_EXTRACTION__OUTPUT_TOKENS_MAX="200",
        SLUICE_LIMITS__CONCURRENCY="50",
        **settings,
    )
    async with aiohttp.ClientSession() as session:
        verdict = await (await session.get(f"{url}/_llmock/verdict")).json()
    assert verdict["passed"], verdict["findings"]
    assert verdict["attempts"] > verdict["calls"], "nothing was put to the test"


@pytest.mark.parametrize(
    "options",
    [
        ("--rpm", "80", "--latency-ms", "50"),
        ("--tpm", "30000", "--latency-ms", "50"),
        ("--error-rate", "429=0.15", "--error-rate", "500=0.1", "--error-rate", "503=0.1"),
    ],
    ids=["request-quota", "token-quota", "faults"],
)
async def test_the_judge_passes_the_service(scene: Scene, options: tuple[str, ...]) -> None:
    """With quotas and faults, at 50 slots: verdict PASS, and an outcome for every message."""
    await scene.send(*(f"Ada number {n} is {n % 90}".encode() for n in range(90)))
    async with judge(*options) as url:
        await judged(scene, url)
    assert await scene.outcomes() == await scene.everything()
    assert [letter.header["sluice.error.detail"] for letter in await scene.letters()] == []


STREAM_FAULTS = [
    word
    for kind in ("disconnect", "truncate", "stall", "malformed")
    for word in ("--stream-fault", f"{kind}=0.08")
]


async def test_the_judge_passes_streams(scene: Scene) -> None:
    """Streams that are cut, broken or stand still, a text over the context: verdict PASS."""
    texts = [f"Ada number {n} is {n % 90}" for n in range(60)]
    await scene.send(*(text.encode() for text in texts), b"long " * 4000)
    options = ("--stream-stall-seconds", "2", "--context-window", "2000", "--latency-ms", "20")
    async with judge(*options, *STREAM_FAULTS) as url:
        await judged(
            scene,
            url,
            SLUICE_EXTRACTION__CARDINALITY="many",
            SLUICE_EXTRACTION__STREAMING="true",
            SLUICE_DELIVERY__ORDERING="none",
        )
    reasons = [letter.header["sluice.error.reason"] for letter in await scene.letters()]
    assert reasons == ["too_long"]
