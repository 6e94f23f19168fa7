"""The main job on a real Kafka: one outcome for every message, whatever ends the process."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from service.core.completed import finished_ranges
from service.kafka.client.stored import Stored, read
from service.settings.reading import load
from tests.process.conftest import PARTITIONS, Scene
from tests.support.endpoint import Latency, Step, script_in_text
from tests.support.service import service
from tests.support.stopping import longest_stop_s
from tests.support.topics import committed, produce, produce_transaction, read_topic

REAL_TEXTS = Path(__file__).parents[3] / "shared" / "data" / "utterances.jsonl"
"""Real short messages written by people; they stand beside the project, not in it."""

OWN_TEXTS = [f"Message {n}: a person of {20 + n % 50} wrote about number {n}." for n in range(1050)]


def texts() -> list[str]:
    """The 1,050 real texts where they are, else our own; says which."""
    if not REAL_TEXTS.exists():
        print(f"{REAL_TEXTS.name} is not beside the project: these are texts of our own")
        return OWN_TEXTS
    return [json.loads(line)["text"] for line in REAL_TEXTS.read_text().splitlines()]


async def send_texts(scene: Scene) -> int:
    """All texts, under 40 keys and some without one."""
    found = texts()
    await scene.send(
        *((None if n % 10 == 0 else b"key-%d" % (n % 40), t.encode()) for n, t in enumerate(found))
    )
    return len(found)


async def test_real_texts_get_one_outcome_each(scene: Scene) -> None:
    """Over six partitions, run until caught up: one outcome a message, lag 0, key kept."""
    count = await send_texts(scene)
    ended = await scene.catch_up()
    assert await scene.outcomes() == await scene.everything()
    assert await scene.lag() == 0
    assert len(await scene.outputs()) == count
    assert scene.endpoint.total() == count
    assert f"{count} messages finished" in ended.printed


async def test_sigterm_half_way_repeats_nothing(scene: Scene) -> None:
    """Stopped half way and started again: one outcome a message, no call made twice, and the stop
    within what the chart's grace period is computed from."""
    count = await send_texts(scene)
    slow = {**scene.environment, "SLUICE_LIMITS__CONCURRENCY": "10"}
    scene.endpoint.latency = Latency(median_s=0.05)
    async with service(slow) as running:
        await running.until("sluice_messages_finished_total", count / 2)
        asked_s = time.monotonic()
        running.signal(signal.SIGTERM)
        ended = await running.ended()
    assert ended.code == 0, ended.printed
    assert time.monotonic() - asked_s < longest_stop_s(load(None, slow))
    assert scene.endpoint.total() < count
    await scene.catch_up()
    assert await scene.outcomes() == await scene.everything()
    assert scene.endpoint.total() == count


async def finished_in_kafka(scene: Scene) -> set[str]:
    """The texts that the stored offsets and their completed maps say are finished."""
    stored = await committed(scene.servers, scene.group, scene.input, PARTITIONS)
    found = set()
    for message in await read_topic(scene.servers, scene.input):
        progress = read(Stored(*stored[message.partition]))
        assert progress is not None, "metadata that is not ours"
        at = progress[0]
        ranges = (range(at.next_offset), *finished_ranges(at.next_offset, at.runs))
        if any(message.offset in each for each in ranges):
            found.add((message.value or b"").decode())
    return found


async def test_a_catch_up_of_rejects_alone(scene: Scene) -> None:
    """3 where every message was rejected, with the reasons and the command; then nothing is left,
    and 0."""
    await scene.send(*((None, b"\xff") for _ in range(3)))
    ended = await scene.catch_up()
    assert ended.code == 3, ended.printed
    assert "rejected: 3 undecodable (`sluice dead-letters list` shows them)" in ended.printed
    assert (await scene.catch_up()).code == 0


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        (("run", "--until-caught-up"), signal.SIGTERM, 1),
        (("run", "--until-caught-up"), signal.SIGINT, 130),
        (("run",), signal.SIGINT, 130),
        (("run",), signal.SIGHUP, 0),
    ],
)
async def test_the_exit_code_of_a_stop(
    scene: Scene, arguments: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    """It says whether all of the topic was worked off, and who ended it; what was in flight is
    finished each time."""
    await scene.send(*((None, b"Ada is %d [[answer after_ms=500]]" % n) for n in range(50)))
    slow = {**scene.environment, "SLUICE_LIMITS__CONCURRENCY": "5"}
    async with service(slow, arguments) as running:
        await running.until("sluice_messages_finished_total", 5)
        running.signal(number)
        ended = await running.ended()
    assert ended.code == code, ended.printed
    assert scene.endpoint.total() == len(await scene.outputs())


async def test_waiting_is_told(scene: Scene) -> None:
    """While the endpoint fails, one line says so and why; another one when it is over."""
    await scene.send(*((None, b"Ada is %d" % n) for n in range(20)))
    scene.endpoint.script = lambda _: Step("500")
    async with service(scene.environment, ("run", "--until-caught-up")) as running:
        async with asyncio.timeout(60):
            while "waiting for the model's endpoint" not in running.printed:
                await asyncio.sleep(0.1)
        scene.endpoint.script = script_in_text
        ended = await running.ended()
    assert ended.code == 0, ended.printed
    assert ended.printed.count("waiting for the model's endpoint") == 1


async def test_kill_9_loses_nothing(scene: Scene) -> None:
    """Killed half way and started again: no message without an outcome, repeats bounded, and none
    of them stands in what was stored last."""
    count = await send_texts(scene)
    slow = {**scene.environment, "SLUICE_LIMITS__CONCURRENCY": "10"}
    scene.endpoint.latency = Latency(median_s=0.05, sigma=1.0)
    async with service(slow) as running:
        await running.until("sluice_messages_finished_total", count / 2)
        running.signal(signal.SIGKILL)
        await running.ended()
    finished = await finished_in_kafka(scene)
    assert await scene.lag() > count - len(finished), "nothing finished beyond a next offset"
    before = Counter(scene.endpoint.calls)
    await scene.catch_up()
    again = {text for text, calls in scene.endpoint.calls.items() if calls > before[text] > 0}
    assert not again & finished
    outcomes = await scene.outcomes()
    assert outcomes.keys() == (await scene.everything()).keys()
    # What was in the window, and what finished since the last commit (0.2 s at 200 a second).
    assert scene.endpoint.total() - count <= 40 + 100
    assert max(outcomes.values()) <= 2


async def test_an_aborted_tail_ends_caught_up(scene: Scene) -> None:
    """Behind committed and aborted transactions the run ends, with lag 0 and no aborted text."""
    for n in range(3):
        await produce_transaction(scene.servers, scene.input, [b"Ada is %d" % n])
    await produce_transaction(scene.servers, scene.input, [b"never", b"never"], abort=True)
    await scene.catch_up()
    assert len(await scene.outputs()) == 3
    assert await scene.lag() == 0


async def test_key_order_holds(scene: Scene) -> None:
    """With slow first messages, each key's records stand in input order."""
    await scene.send(
        *(
            (b"key-%d" % (n % 7), f"Ada is {n} [[answer after_ms={(n * 37) % 200}]]".encode())
            for n in range(140)
        )
    )
    await scene.catch_up()
    ages: dict[bytes | None, list[int]] = {}
    for record in await scene.outputs():
        ages.setdefault(record.key, []).append(json.loads(record.value or b"")["age"])
    assert len(ages) == 7
    assert all(found == sorted(found) for found in ages.values())


async def test_the_output_says_where_it_came_from(scene: Scene) -> None:
    """Key, the input's own headers, and the provenance headers of the contract."""
    await produce(
        scene.servers,
        scene.input,
        [(b"k", b"Ada Lovelace is 36")],
        headers=[("traceparent", b"00-abc"), ("tenant", b"t1")],
        partition=3,
        timestamp_ms=1_700_000_000_000,
    )
    await scene.catch_up()
    [record] = await scene.outputs()
    assert json.loads(record.value or b"") == {"name": "Ada Lovelace", "age": 36}
    assert record.key == b"k"
    assert record.timestamp_ms == 1_700_000_000_000
    header = record.header
    assert (header["tenant"], header["traceparent"]) == ("t1", "00-abc")
    assert header["sluice.id"] == f"{scene.input}:3:0:0"
    assert header["sluice.source.timestamp"] == "1700000000000"
    assert (header["sluice.record.index"], header["sluice.record.count"]) == ("0", "1")
    assert header["sluice.model"] == "scripted"
    assert header.keys() >= {
        "sluice.answer.id",
        "sluice.source.topic",
        "sluice.source.partition",
        "sluice.source.offset",
        "sluice.source.topic.id",
        "sluice.prompt.version",
        "sluice.schema.version",
        "sluice.tokens.input",
        "sluice.tokens.output",
    }
