"""An independent judge: llmock limits and breaks, and says how its client behaved."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.core.admission.retry import Backoff
from service.core.errors import TransientFailure
from service.core.messages import Extracted, Rejected
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings

SLOTS = 8
MESSAGES = 30
BACKOFF = Backoff(base_s=0.1, cap_s=2.0)


@contextmanager
def llmock(*options: str) -> Iterator[str]:
    """Its base URL, as a process of its own on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("llmock")), "serve", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--log-level", "error", *options],
        stdout=subprocess.DEVNULL,
    )
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_for(f"{base}/_llmock/verdict", process)
        yield base
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        try:
            _get(url)
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("llmock did not start")


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


async def _until_done(
    extractor: OpenAIExtractor, text: str, slots: asyncio.Semaphore, chance: random.Random
) -> Extracted | Rejected:
    """The smallest pipeline: a slot a call, given back while waiting; backoff with jitter."""
    progress: object | None = None
    for attempt in range(1, 10):
        try:
            async with slots:
                return await extractor.call(text, progress)
        except TransientFailure as failure:
            progress = failure.progress
            await asyncio.sleep(BACKOFF.delay_s(attempt, chance.uniform, failure.retry_after_s))
    raise AssertionError("kept failing")


async def _extract_all(**extraction: Any) -> list[Extracted | Rejected]:
    settings = Settings(
        extraction={"model": "gpt-4o-mini", "call_timeout_s": 10, **extraction},
        limits={"concurrency": SLOTS},
    )
    extractor = OpenAIExtractor(settings, lambda _: None)
    await extractor.start()
    slots, chance = asyncio.Semaphore(SLOTS), random.Random(7)
    try:
        async with asyncio.TaskGroup() as group:
            calls = [
                group.create_task(_until_done(extractor, f"Ada {n} is 36", slots, chance))
                for n in range(MESSAGES)
            ]
    finally:
        await extractor.stop()
    return [call.result() for call in calls]


@pytest.mark.parametrize("mode", ["json_schema", "tools"])
async def test_quotas_and_faults_are_handled_to_the_judges_content(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Every message is extracted, and the judge finds no error."""
    faults = ("429=0.1", "500=0.1", "503=0.1", "408=0.05")
    options = [word for fault in faults for word in ("--error-rate", fault)]
    with llmock(*options, "--rpm", "2400") as base:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{base}/v1")
        outcomes = await _extract_all(mode=mode)
        verdict = _get(f"{base}/_llmock/verdict")
    assert [outcome for outcome in outcomes if isinstance(outcome, Rejected)] == []
    assert verdict["faults_injected"] > 0
    assert verdict["passed"]
    # Full jitter is uniform from zero, so that a second wait may be the shorter one: this is all
    # that the judge may remark on.
    assert {finding["code"] for finding in verdict["findings"]} <= {"no_backoff"}


async def test_a_prompt_above_the_context_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An independent provider's context error is recognised as one, and tried once."""
    with llmock("--context-window", "20") as base:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{base}/v1")
        outcomes = await _extract_all()
        verdict = _get(f"{base}/_llmock/verdict")
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Rejected)} == {"too_long"}
    assert len(outcomes) == verdict["attempts"] == MESSAGES
    assert verdict["findings"] == []
