"""The service as a user runs it: `python -m service run`, driven by its environment alone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
LISTENS = re.compile(r"http://[^\s:]+:(\d+)/metrics")


@dataclass
class Ended:
    """How a process ended, and everything that it printed."""

    code: int
    printed: str


class Service:
    """One running process; its lines are kept, its metrics can be read."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port: int | None = None
        self._listening = asyncio.Event()

    async def read(self) -> None:
        """Collect its lines until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace"))
            if self.port is None and (found := LISTENS.search(self.lines[-1])):
                self.port = int(found.group(1))
                self._listening.set()
        self._listening.set()

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    async def get(self, path: str, accept: str = "*/*") -> tuple[int, str]:
        """Status and body of a page of its telemetry port."""
        await self._listening.wait()
        assert self.port is not None, f"it never said where its metrics are:\n{self.printed}"
        url = f"http://127.0.0.1:{self.port}{path}"
        asking = aiohttp.ClientSession(headers={"Accept": accept})
        async with asking as session, session.get(url) as response:
            return response.status, await response.text()

    async def metrics(self) -> dict[str, float]:
        """Samples by name; those that differ only by labels are added up."""
        _, text = await self.get("/metrics")
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found

    async def until(self, name: str, least: float, within_s: float = 60) -> None:
        """Wait until a metric has reached a value."""
        async with asyncio.timeout(within_s):
            while (await self.metrics()).get(name, 0) < least:
                assert self.process.returncode is None, f"it ended:\n{self.printed}"
                await asyncio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.returncode is None, f"it ended:\n{self.printed}"
        self.process.send_signal(number)

    async def ended(self, within_s: float = 60) -> Ended:
        """Wait for its end."""
        async with asyncio.timeout(within_s):
            code = await self.process.wait()
            while self.process.stdout is not None and not self.process.stdout.at_eof():
                await asyncio.sleep(0.01)
        return Ended(code, self.printed)


def children(pid: int) -> set[int]:
    """The processes that a process has started and that run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


@asynccontextmanager
async def service(
    environment: Mapping[str, str], arguments: Sequence[str] = ("run",)
) -> AsyncIterator[Service]:
    """A process with this environment, and nothing of ours in it; killed at the end."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "OPENAI_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service",
        *arguments,
        cwd=ROOT,
        env={**clean, "SLUICE_TELEMETRY__HOST": "127.0.0.1", "SLUICE_TELEMETRY__PORT": "0"}
        | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = Service(process)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(running.read())
            try:
                yield running
            finally:
                if process.returncode is None:
                    process.kill()
    finally:
        await process.wait()


async def run(
    environment: Mapping[str, str],
    *arguments: str,
    within_s: float = 60,
) -> Ended:
    """Run a command to its end."""
    async with service(environment, arguments) as running:
        return await running.ended(within_s)
