"""`python -m service demo` as a user runs it: it ends by itself or by Ctrl-C and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.endpoint import MODEL, Endpoint
from tests.support.started import local_model_is_here

ROOT = Path(__file__).parents[2]
MARK = "DEMO_TEST_MARK"
"""Every process that a demo starts inherits it, and no other has it."""
GONE_S = 10.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def marked(mark: str) -> list[int]:
    """Processes that descend from the demo with this mark."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if needle in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
        except OSError:
            continue  # gone, or somebody else's
    return found


@asynccontextmanager
async def demo(
    mark: str, *arguments: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "demo", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env=inherited | {MARK: mark, "PYTHONUNBUFFERED": "1"} | environment,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for pid in await still_running(mark):
            os.kill(pid, signal.SIGKILL)


async def still_running(mark: str) -> list[int]:
    """What is left of a demo after it had a moment."""
    deadline = asyncio.get_running_loop().time() + GONE_S
    while (left := marked(mark)) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.1)
    return left


async def first_record(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    async for said in process.stdout:
        if b"->" in said:
            return
    pytest.fail("the demo ended before its first record")


def scripted(endpoint: Endpoint) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": endpoint.url,
        "OPENAI_API_KEY": "test",
        "SLUICE_EXTRACTION__MODEL": MODEL,
    }


@pytest.mark.real_model
@pytest.mark.timeout(300)
async def test_ends_by_itself() -> None:
    """`--messages 12` with the local model: a summary, exit code 0, no process left."""
    await local_model_is_here()
    mark = uuid.uuid4().hex
    async with demo(mark, "--messages", "12") as process:
        said = (await process.communicate())[0].decode()
        assert process.returncode == 0, said
        assert "12 messages, 11 records, 1 rejected" in said
        assert "rejected, undecodable" in said
        assert "mock cluster" in said
        assert await still_running(mark) == []


async def test_own_endpoint() -> None:
    """With --endpoint the calls go to OPENAI_BASE_URL, and no local model is started."""
    async with Endpoint() as endpoint:
        mark = uuid.uuid4().hex
        async with demo(mark, "--endpoint", "--messages", "12", **scripted(endpoint)) as process:
            said = (await process.communicate())[0].decode()
            assert process.returncode == 0, said
            assert "12 messages, 11 records, 1 rejected" in said
            assert endpoint.url in said
            assert endpoint.total() == 11


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stops_clean(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM: a summary, exit code 0, no stack trace, no process left."""
    async with Endpoint() as endpoint:
        mark = uuid.uuid4().hex
        async with demo(mark, "--endpoint", **scripted(endpoint)) as process:
            await first_record(process)
            assert len(marked(mark)) == 2  # the demo and the service
            process.send_signal(number)
            said = (await process.communicate())[0].decode()
            assert process.returncode == 0, said
            assert "messages/s over" in said
            assert "Traceback" not in said
            assert await still_running(mark) == []


async def test_killed() -> None:
    """Even a kill -9 of the demo leaves no process behind."""
    async with Endpoint() as endpoint:
        mark = uuid.uuid4().hex
        async with demo(mark, "--endpoint", **scripted(endpoint)) as process:
            await first_record(process)
            process.kill()
            await process.wait()
            assert await still_running(mark) == []


async def test_wrong_endpoint_is_a_sentence() -> None:
    """An endpoint that is no URL ends the demo with what is wrong and no stack trace."""
    mark = uuid.uuid4().hex
    async with demo(mark, "--endpoint", "--messages", "1", OPENAI_BASE_URL="nowhere") as process:
        said = (await process.communicate())[0].decode()
        assert process.returncode == 1
        assert "OPENAI_BASE_URL" in said
        assert "Traceback" not in said
        assert await still_running(mark) == []
