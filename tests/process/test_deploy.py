"""The programs of deploy/ as processes: the example producer and the image's health check."""

import asyncio
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.demo.broker import EmbeddedBroker
from tests.support import topics

DEPLOY = Path(__file__).parents[2] / "deploy"


async def _five_messages(servers: str) -> list[topics.Read]:
    """Reads anew until five are there."""
    found: list[topics.Read] = []
    async with asyncio.timeout(30):
        while len(found) < 5:
            found = await topics.read_topic(servers, "messages")
    return found


async def test_the_producer_writes_until_it_is_told_to_stop(mock_kafka: EmbeddedBroker) -> None:
    """The example upstream writes keyed UTF-8 texts and ends well at SIGTERM."""
    environment = {
        "PRODUCER_BOOTSTRAP_SERVERS": mock_kafka.bootstrap_servers,
        "PRODUCER_TOPIC": "messages",
        "PRODUCER_PER_SECOND": "100",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(DEPLOY / "compose" / "producer.py"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        read = await _five_messages(mock_kafka.bootstrap_servers)
        process.send_signal(signal.SIGTERM)
        said, _ = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert re.fullmatch(r"\d+ texts written to messages\n", said.decode())
    for one in read:
        assert one.key
        assert one.key.decode() in (one.value or b"").decode()


class _Probe(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def probed_port() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Probe)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_the_image_is_as_healthy_as_livez_says(
    probed_port: int, status: int, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health check asks /livez of the port in the environment, around any proxy."""
    monkeypatch.setattr(_Probe, "status", status)
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    command = json.loads(re.search(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", dockerfile)[1])  # type: ignore[index]
    environment = {"SLUICE_TELEMETRY__PORT": str(probed_port), "http_proxy": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, *command[1:]], env=environment, check=False)
    assert done.returncode == exit_code
