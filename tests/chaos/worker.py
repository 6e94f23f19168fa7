"""A worker of the service as a process of its own, driven from outside."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from tests.support.kafka import dying_with_us, free_ports
from tests.support.service import ROOT

UP_S = 60.0
"""From the process's start to the end of its first rebalance; 3 to 10 s as a rule."""


class Worker:
    """One `python -m service run`, with `options` behind it; what it prints goes to a file.

    It dies with the process that started it, even where that one is killed.
    """

    def __init__(
        self,
        name: str,
        environment: Mapping[str, str],
        folder: Path,
        options: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        (self.port,) = free_ports(1)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "OPENAI_"))}
        own = {
            "SLUICE_KAFKA__CLIENT_ID": name,
            "SLUICE_TELEMETRY__HOST": "127.0.0.1",
            "SLUICE_TELEMETRY__PORT": str(self.port),
            # The endpoint's journal tells workers apart by their keys.
            "OPENAI_API_KEY": name,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_us([sys.executable, "-m", "service", "run", *options]),
                cwd=ROOT,
                env={**clean, **environment, **own},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    async def ended(self, within_s: float) -> int:
        """Its exit code; raises `TimeoutError`."""
        async with asyncio.timeout(within_s):
            while (code := self.code) is None:
                await asyncio.sleep(0.05)
        self.release()
        return code

    def release(self) -> None:
        """Let go of the pipe that keeps its watcher alive; kills it if it still runs."""
        assert self._process.stdin is not None
        if self.code is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()

    async def settled(self) -> bool:
        """Whether it says that the group has given out its partitions."""
        return (await self.metric("sluice_group_settled")) == 1.0

    async def until_settled(self, within_s: float = UP_S) -> None:
        """Raises `TimeoutError`; returns early if it has ended."""
        async with asyncio.timeout(within_s):
            while self.code is None and not await self.settled():
                await asyncio.sleep(0.2)

    async def metric(self, name: str) -> float | None:
        """A sample by its name, labels included; None while there is none or no answer."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", await self._page("metrics"), re.MULTILINE)
        return None if found is None else float(found.group(1))

    async def readiness(self) -> str:
        """What it says on /readyz; empty while it does not answer."""
        return await self._page("readyz")

    async def note_metrics(self) -> None:
        """What it says of itself goes into its log: for one that will be killed."""
        pages = [await self._page(path) for path in ("metrics", "readyz")]
        with self.log.open("a") as log:
            log.writelines(pages)

    async def _page(self, path: str) -> str:
        """Empty while it does not answer."""
        url = f"http://127.0.0.1:{self.port}/{path}"
        limit = aiohttp.ClientTimeout(total=2)
        try:
            async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as reply:
                return await reply.text()
        except (aiohttp.ClientError, TimeoutError):
            return ""

    def memory_mb(self) -> float:
        """Resident memory; 0 if it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0.0
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found.group(1)) / 1024 if found else 0.0

    def open_files(self) -> int:
        """Descriptors, sockets included; 0 if it has ended."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return 0
