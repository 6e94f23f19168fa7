"""The service under a sampling profiler: where its CPU is spent, by what a message goes through.

A timer of the process's CPU time interrupts the main thread; what it finds on the stack is counted
for the innermost frame of known meaning. Work of C code counts for the Python line that called it.
Sampling begins at SIGUSR1, so that the start is left out. Written as JSON to the file that
BENCH_SAMPLES names, when the process ends.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import FrameType

from service.commands.cli import main

SAMPLE_S = 0.002
"""Of CPU time, between two samples."""

AREAS = (
    ("/aiokafka/consumer/", "Kafka: fetch"),
    ("/aiokafka/record/", "Kafka: fetch"),
    ("/service/kafka/source.py", "poll"),
    ("/service/kafka/membership.py", "poll"),
    ("/service/kafka/supervision.py", "poll"),
    ("/service/kafka/holdings.py", "poll"),
    ("/aiokafka/producer/", "Kafka: produce"),
    ("/service/kafka/producers.py", "Kafka: produce"),
    ("/service/kafka/sending.py", "publish"),
    ("/service/kafka/", "publish"),
    ("/aiokafka/", "Kafka: connections"),
    ("/service/llm/records.py", "validate"),
    ("/service/llm/request.py", "request bytes"),
    ("/service/llm/prompt.py", "request bytes"),
    ("/service/llm/answers.py", "read the answer"),
    ("/aiohttp/", "HTTP: aiohttp"),
    ("/yarl/", "HTTP: aiohttp"),
    ("/multidict/", "HTTP: aiohttp"),
    ("/httpx", "HTTP: httpx2"),
    ("/anyio/", "HTTP: httpx2"),
    ("/openai/_vendor/", "HTTP: httpx2"),
    ("/openai/", "SDK: openai"),
    ("/service/llm/", "extractor"),
    ("/prometheus_client/", "metrics"),
    ("/service/telemetry/", "metrics"),
    ("/service/core/", "window and lanes"),
    ("/service/pipeline/", "pipeline"),
)
"""The innermost frame whose path holds one of these says the area; the first match of it counts."""
LOOP = "event loop"

_areas: Counter[str] = Counter()
_lines: Counter[str] = Counter()


def _area(path: str) -> str | None:
    return next((area for part, area in AREAS if part in path), None)


def _sample(_: int, frame: FrameType | None) -> None:
    if frame is None:
        return
    code = frame.f_code
    where = "/".join(Path(code.co_filename).parts[-2:])
    _lines[f"{where}:{code.co_name}"] += 1
    area = None
    while frame is not None and area is None:
        area = _area(frame.f_code.co_filename)
        frame = frame.f_back
    _areas[area or LOOP] += 1


def _begin(_: int, __: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)


def _write() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    found = {"areas": _areas, "functions": dict(_lines.most_common(60))}
    Path(os.environ["BENCH_SAMPLES"]).write_text(json.dumps(found))


if __name__ == "__main__":
    atexit.register(_write)
    signal.signal(signal.SIGPROF, _sample)
    signal.signal(signal.SIGUSR1, _begin)
    main()
