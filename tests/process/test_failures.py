"""What each bad message, refusal and outage leads to, on a real Kafka; nothing is ever lost."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

from service.llm.extractor import PROBE_TEXT
from tests.process.conftest import Scene
from tests.support.endpoint import Asked, Endpoint, Step, script_in_text
from tests.support.kafka import free_ports
from tests.support.service import run, service
from tests.support.topics import Read, produce

CANARY = "canary-7f3a9"


BAD_MESSAGES = {
    b"x" * 10_000_000: "too_long",
    b"\xff\xfe not UTF-8": "undecodable",
    b"": "undecodable",
    b"Ada is 36 [[invalid]]": "invalid",
    b"Ada is 36 [[refuse]]": "refused",
    b"Ada is 36 [[content_filter]]": "filtered",
    b"Ada is 36 [[truncate]]": "truncated",
    b"Ada is 36 [[too_long]]": "too_long",
    b"Ada is 36 [[400]]": "bad_request",
}

FAULTS = (
    "429 retry_after=1",
    "429 retry_after_date=2",
    "500 x2",
    "503",
    "408",
    "409",
    "cut",
    "cut_at_once",
    "cut_body",
    "html",
    "no_choices",
    "hang",
)


async def test_bad_messages_become_dead_letters(scene: Scene) -> None:
    """10 MB, not UTF-8, empty, never valid, refused, filtered, truncated, over the context, 400:
    each keeps key, value and headers byte for byte and says why it is there."""
    await produce(
        scene.servers,
        scene.input,
        [(b"key", value) for value in BAD_MESSAGES],
        headers=[("tenant", b"\xff1")],
    )
    await scene.catch_up()
    letters = {letter.value or b"": letter for letter in await scene.letters()}
    found = {value: letter.header["sluice.error.reason"] for value, letter in letters.items()}
    assert found == BAD_MESSAGES
    for letter in letters.values():
        assert letter.key == b"key"
        assert letter.headers[0] == ("tenant", b"\xff1")
        assert letter.header["__dlq.errors.topic"] == scene.input
        assert letter.header["sluice.error.detail"]
    assert (await scene.outputs(), await scene.lag()) == ([], 0)


async def only_letter(scene: Scene) -> Read:
    """The one dead letter; there is no output, and nothing is left to do."""
    assert await scene.outputs() == []
    assert await scene.lag() == 0
    [letter] = await scene.letters()
    return letter


async def test_what_never_validates_is_asked_again_in_bounds(scene: Scene) -> None:
    """Two re-asks by default; the dead letter holds the last answer and what it cost."""
    await scene.send(b"Ada is 36 [[invalid]]")
    await scene.catch_up()
    letter = await only_letter(scene)
    assert scene.endpoint.total() == 3
    assert letter.header["sluice.attempts"] == "3"
    assert int(letter.header["sluice.tokens.output"]) > 0
    assert letter.header["sluice.answer"]


async def test_a_tombstone_is_skipped_by_default(scene: Scene) -> None:
    """A null value is finished without a call, an output or a dead letter."""
    await scene.send((b"k", None))
    await scene.catch_up()
    assert (await scene.outputs(), await scene.letters()) == ([], [])
    assert (await scene.lag(), scene.endpoint.total()) == (0, 0)


async def test_a_tombstone_is_passed_on_by_setting(scene: Scene) -> None:
    """With `tombstones: pass` it arrives at the output under its key."""
    await scene.send((b"k", None))
    await scene.catch_up(SLUICE_INPUT__TOMBSTONES="pass")
    [read] = await scene.outputs()
    assert (read.key, read.value) == (b"k", None)


async def test_user_code_that_raises_rejects_its_message(scene: Scene, tmp_path: Path) -> None:
    """A validator with a bug takes down its message, not the process."""
    model = tmp_path / "buggy.py"
    model.write_text(
        "from pydantic import BaseModel, field_validator\n"
        "class Person(BaseModel):\n"
        "    name: str\n"
        "    age: int\n"
        "    @field_validator('age')\n"
        "    @classmethod\n"
        "    def bug(cls, age):\n"
        "        if age == 13:\n"
        "            raise KeyError('a bug')\n"
        "        return age\n"
    )
    await scene.send(b"Ada is 13", b"Bob is 14")
    await scene.catch_up(SLUICE_EXTRACTION__RECORD=f"{model}:Person")
    [letter] = await scene.letters()
    assert letter.value == b"Ada is 13"
    assert letter.header["sluice.error.reason"] == "user_code"
    assert len(await scene.outputs()) == 1


async def test_faults_of_the_provider_are_tried_again(scene: Scene) -> None:
    """Rate limits, errors, cut connections, broken bodies, a call that never returns: each
    message gets its record in the end, none becomes a dead letter."""
    await scene.send(*(f"Ada is {n} [[{f}, answer]]".encode() for n, f in enumerate(FAULTS)))
    await scene.catch_up(
        SLUICE_EXTRACTION__CALL_TIMEOUT_S="2", SLUICE_DELIVERY__DRAIN_TIMEOUT_S="30"
    )
    ages = sorted(json.loads(read.value or b"")["age"] for read in await scene.outputs())
    assert ages == list(range(len(FAULTS)))
    assert (await scene.letters(), await scene.lag()) == ([], 0)
    # Ten failures in a row open the circuit: a probe may have closed it again.
    calls = scene.endpoint.total() - scene.endpoint.calls[PROBE_TEXT]
    assert calls == 2 * len(FAULTS) + 1  # each once more, the 500 twice


async def test_refused_credentials_end_the_start_with_a_sentence(
    real_kafka: str, scene: Scene
) -> None:
    """A wrong key at the start: exit code 1, a sentence that names the variable, no trace."""
    async with Endpoint(api_key="right") as strict:
        environment = {**scene.environment, "OPENAI_BASE_URL": strict.url, "OPENAI_API_KEY": "no"}
        ended = await run(environment, "run")
    assert ended.code == 1
    assert "OPENAI_API_KEY" in ended.printed
    assert "Traceback" not in ended.printed


async def test_a_provider_that_is_down_at_the_start_is_waited_for(scene: Scene) -> None:
    """A start in the middle of an outage goes on, and everything is done when it is over."""
    await scene.send(b"Ada is 36")
    [port] = free_ports(1)
    environment = {**scene.environment, "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
    async with service(environment) as running:
        await running.until("sluice_retries_total", 2)
        async with Endpoint(port=port):
            await running.until("sluice_messages_finished_total", 1)
            running.signal(signal.SIGTERM)
            assert (await running.ended()).code == 0
    assert len(await scene.outputs()) == 1


async def test_credentials_refused_later_stop_intake_and_heal(scene: Scene) -> None:
    """A key that is withdrawn under load: not ready, nothing lost; mended, it goes on alone."""
    mended = False

    def script(asked: Asked) -> Step:
        return script_in_text(asked) if mended else Step("401")

    scene.endpoint.script = script
    await scene.send(*(f"Ada is {n}".encode() for n in range(100)))
    async with service(scene.environment) as running:
        async with asyncio.timeout(30):
            while "OPENAI_API_KEY" not in (await running.get("/readyz"))[1]:
                await asyncio.sleep(0.1)
        assert (await running.get("/readyz"))[0] == 503
        assert (await running.get("/livez"))[0] == 200
        mended = True
        await running.until("sluice_messages_finished_total", 100)
        assert (await running.get("/readyz"))[0] == 200
        running.signal(signal.SIGTERM)
        assert (await running.ended()).code == 0
    assert len(await scene.outputs()) == 100
    assert await scene.letters() == []


async def test_no_broker_is_a_sentence(scene: Scene) -> None:
    """Nothing listens there: exit code 1, the address is named, no trace."""
    environment = {**scene.environment, "SLUICE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    ended = await run(environment, "run")
    assert ended.code == 1
    assert "127.0.0.1:1" in ended.printed
    assert "Traceback" not in ended.printed


async def test_an_unknown_topic_is_a_sentence(scene: Scene) -> None:
    """The topic is named, and the command that makes it; no trace."""
    environment = {**scene.environment, "SLUICE_INPUT__TOPICS": "nowhere"}
    ended = await run(environment, "run")
    assert ended.code == 1
    assert "nowhere" in ended.printed
    assert "sluice topics create" in ended.printed
    assert "Traceback" not in ended.printed


async def test_wrong_settings_are_sentences(scene: Scene) -> None:
    """Exit code 2, one sentence a field, no trace."""
    environment = {
        **scene.environment,
        "SLUICE_LIMITS__CONCURRENCY": "many",
        "SLUICE_DELIVERY__ORDERING": "sideways",
    }
    ended = await run(environment, "run")
    assert ended.code == 2
    assert "SLUICE_LIMITS__CONCURRENCY" in ended.printed
    assert "SLUICE_DELIVERY__ORDERING" in ended.printed
    assert "Traceback" not in ended.printed


async def test_a_second_signal_does_not_wait(scene: Scene) -> None:
    """With a call that never returns, the second signal ends it; the message is not committed."""
    await scene.send(b"Ada is 36 [[hang]]")
    async with service(scene.environment) as running:
        await running.until("sluice_slots_busy", 1)
        running.signal(signal.SIGTERM)
        await asyncio.sleep(1)
        assert running.process.returncode is None
        running.signal(signal.SIGTERM)
        ended = await running.ended(within_s=20)
    assert ended.code == 0, ended.printed
    assert await scene.lag() == 1


async def test_no_text_in_logs_metrics_or_traces(scene: Scene) -> None:
    """A canary in messages, keys and answers shows up nowhere that people look."""
    steps = ("answer", "invalid", "refuse", "truncate", "400", "500", "429", "cut_body", "html")
    await scene.send(
        *((CANARY.encode(), f"{CANARY} is 36 [[{step}, answer]]".encode()) for step in steps),
        (None, CANARY.encode() + b"\xff"),
    )
    for level in ("INFO", "DEBUG"):
        environment = {
            **scene.environment,
            "SLUICE_TELEMETRY__LOG_LEVEL": level,
            "SLUICE_KAFKA__GROUP_ID": f"{scene.group}-{level}",
        }
        async with service(environment) as running:
            await running.until("sluice_messages_finished_total", len(steps) + 1)
            pages = [(await running.get(page))[1] for page in ("/metrics", "/readyz", "/livez")]
            running.signal(signal.SIGTERM)
            ended = await running.ended()
        assert CANARY not in "".join(pages)
        if level != "DEBUG":
            assert CANARY not in ended.printed
    assert any(
        CANARY in (letter.value or b"").decode(errors="replace") for letter in await scene.letters()
    )
