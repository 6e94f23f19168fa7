"""What one poisoned text, and what a lasting fault, costs the others: `python -m tests.poison`.

Runs the whole service on the embedded broker and a scripted endpoint. First 1,000 good messages at
a steady rate, then the same with one text that is refused for ever, for each of five refusals, at 8
slots: dead letters, the median time from arrival to output against the run without it, seconds from
SIGTERM to the end. Then five faults that mean everybody, each before 1,000 messages: dead letters
while it lasts, whether readiness names what to do, messages a second once it is mended. Exit code 1
where a figure is not as demanded.

    python -m tests.poison           both tables, in about four minutes
    python -m tests.poison poison    the first alone; `faults`: the second
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from service.demo.broker import EmbeddedBroker
from tests.process.conftest import Scene
from tests.support.endpoint import Asked, Endpoint, Latency, Step
from tests.support.service import Service, service
from tests.support.topics import producer

T = TypeVar("T")

MESSAGES = 1000
SLOTS = 8
LATENCY_S = 0.075
EVERY_S = LATENCY_S / SLOTS / 0.5
"""Messages come at half of what the slots can do."""
POISON = "Bo is 5, and refused"
RATIO_MAX = 1.2
STOP_MAX_S = 20.0

REFUSALS: dict[str, Step] = {
    "403, a firewall's page": Step("given", status=403, body=b"<html>403 Forbidden</html>"),
    "451": Step("given", status=451, body=b'{"error": {"message": "Unavailable"}}'),
    "429, larger than a minute's tokens": Step(
        "given",
        status=429,
        body=b'{"error": {"message": "Request too large for gpt on tokens per min (TPM): Limit '
        b'30000, Requested 40000.", "type": "tokens", "code": "rate_limit_exceeded"}}',
    ),
    "429, without a word": Step("given", status=429, body=b'{"error": {"message": "slow down"}}'),
    "503": Step("given", status=503, body=b'{"error": {"message": "Service Unavailable"}}'),
    "406": Step("given", status=406, body=b"<html>Not Acceptable!</html>"),
}
FAULTS: dict[str, tuple[str, Step]] = {
    "key expired (Gemini)": (
        "OPENAI_API_KEY",
        Step(
            "given",
            status=400,
            body=b'{"error": {"code": 400, "message": "API key expired. '
            b'Please renew the API key.", "status": "INVALID_ARGUMENT"}}',
        ),
    ),
    "credit used up (Anthropic)": (
        "add credit",
        Step(
            "given",
            status=400,
            body=b'{"type": "error", "error": {"type": '
            b'"invalid_request_error", "message": "Your credit balance is too low to access the '
            b'Anthropic API. Please go to Plans & Billing."}}',
        ),
    ),
    "response_format refused": (
        "extraction.mode",
        Step(
            "given",
            status=400,
            body=b'{"error": {"message": "This response_format type is '
            b'unavailable now", "type": "invalid_request_error", "code": "invalid_request_error"}}',
        ),
    ),
    "a keyword of the schema refused": (
        "extraction.mode or the record type",
        Step(
            "given",
            status=400,
            body=b'{"object": "error", "message": "The provided JSON schema '
            b'contains features not supported by xgrammar.", "type": "BadRequestError", '
            b'"code": 400}',
        ),
    ),
    "unknown model": (
        "extraction.model",
        Step(
            "given",
            status=404,
            body=b'{"error": {"message": "The model `x` does not exist", '
            b'"type": "invalid_request_error", "code": "model_not_found"}}',
        ),
    ),
}


async def arrive(scene: Scene, texts: Sequence[str]) -> None:
    """At a steady rate."""
    async with producer(scene.servers) as client:
        begin_s = time.monotonic()
        for number, text in enumerate(texts):
            await asyncio.sleep(max(0.0, begin_s + number * EVERY_S - time.monotonic()))
            await client.send(scene.input, text.encode())


async def until_finished(running: Service, messages: int, within_s: float) -> None:
    await running.until("sluice_messages_finished_total", messages, within_s)


async def poisoned(scene: Scene, step: Step | None) -> tuple[int, float, float]:
    """Dead letters, the others' median from arrival to output, seconds of the stop."""
    texts = [f"Ann is 30, number {number}" for number in range(MESSAGES)]
    if step is not None:
        texts.insert(MESSAGES // 4, POISON)
    scene.endpoint.latency = Latency(LATENCY_S)
    scene.endpoint.script = lambda asked: step if step and asked.text == POISON else Step()
    settings = {"SLUICE_LIMITS__CONCURRENCY": str(SLOTS), "SLUICE_OUTPUT__TIMESTAMP": "now"}
    async with service(scene.environment | settings) as running:
        await running.until("sluice_slots", 1)
        await arrive(scene, texts)
        await until_finished(running, len(texts), within_s=120)
        stopped_s = time.monotonic()
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
        stopped_s = time.monotonic() - stopped_s
    took_ms = [
        each.timestamp_ms - int(each.header["sluice.source.timestamp"])
        for each in await scene.outputs()
    ]
    assert len(took_ms) == MESSAGES, f"{len(took_ms)} outputs"
    return len(await scene.letters()), statistics.median(took_ms), stopped_s


async def faulty(scene: Scene, named: str, step: Step) -> tuple[int, bool, float]:
    """Dead letters, whether the sentence came, messages a second once it is mended."""
    mended = False

    def script(_: Asked) -> Step:
        return Step() if mended else step

    scene.endpoint.script = script
    scene.endpoint.latency = Latency(LATENCY_S)
    await scene.send(*(f"Ann is 30, number {n}".encode() for n in range(MESSAGES)))
    async with service(scene.environment) as running:
        said, until_s = "", time.monotonic() + 30
        while named not in said and time.monotonic() < until_s:
            _, said = await running.get("/readyz")
            await asyncio.sleep(0.1)
        await asyncio.sleep(5)
        mended = True
        await running.until("sluice_messages_finished_total", 1, 60)
        began_s = time.monotonic()
        await until_finished(running, MESSAGES, within_s=60)
        rate = MESSAGES / (time.monotonic() - began_s)
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
    assert len(await scene.outputs()) + len(await scene.letters()) == MESSAGES
    return len(await scene.letters()), named in said, rate


async def table_of_poison() -> bool:
    print(
        f"one text of {MESSAGES + 1}, {SLOTS} slots".ljust(38), "letters   p50 ms  ratio   stop s"
    )
    _, without_ms, stop_s = await _on_a_scene(lambda scene: poisoned(scene, None))
    print(f"{'none':38} {0:7} {without_ms:8.0f} {1:6.2f} {stop_s:8.1f}")
    right = True
    for name, step in REFUSALS.items():
        letters, ms, stop_s = await _on_a_scene(lambda scene, step=step: poisoned(scene, step))
        ratio = ms / without_ms
        right &= letters == 1 and ratio <= RATIO_MAX and stop_s <= STOP_MAX_S
        print(f"{name:38} {letters:7} {ms:8.0f} {ratio:6.2f} {stop_s:8.1f}", flush=True)
    return right


async def table_of_faults() -> bool:
    print(f"a fault before {MESSAGES} messages".ljust(38), "letters  named  messages/s once mended")
    right = True
    for name, (named, step) in FAULTS.items():
        letters, said, rate = await _on_a_scene(
            lambda scene, named=named, step=step: faulty(scene, named, step)
        )
        right &= letters == 0 and said
        print(f"{name:38} {letters:7}  {'yes' if said else 'no':5} {rate:8.0f}", flush=True)
    return right


async def _on_a_scene(act: Callable[[Scene], Awaitable[T]]) -> T:
    with EmbeddedBroker() as broker:
        async with Endpoint(record=False) as endpoint:
            scene = Scene(broker.bootstrap_servers, endpoint)
            for topic in (scene.input, scene.output, scene.dead_letters):
                broker.create_topic(topic, 1)
            return await act(scene)


async def run(words: Sequence[str]) -> int:
    right = True
    if not words or "poison" in words:
        right &= await table_of_poison()
    if not words or "faults" in words:
        right &= await table_of_faults()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))
