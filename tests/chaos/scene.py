"""Where a round takes place: topics, endpoint, proxy, workers, load, and a watch on it all."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from tests.chaos.evidence import (
    Evidence,
    Stored,
    Struck,
    read_input,
    read_journal,
    read_letters,
    read_output,
)
from tests.chaos.worker import Worker
from tests.support.cluster import Cluster
from tests.support.kafka import dying_with_us
from tests.support.proxy import Proxy
from tests.support.service import ROOT
from tests.support.topics import admin, create_topic, end_offsets, unique_name

PARTITIONS = 6
KEYS = 12
"""For each partition: few enough that lanes are seldom empty."""
BACKLOG = 200
"""Unfinished messages for each partition while the load goes on."""
REFUSED_EACH = 97
"""One message in so many is refused by the model, so that dead letters take part."""
SAMPLE_S = 0.5
"""Between two looks at what Kafka has stored for the group."""
CAUGHT_UP_S = 180.0
"""From the end of the load to lag 0."""
ENDED_S = 90.0
"""From SIGTERM to a worker's end: a drain, a commit, a broker that is slow."""
WRONG_SETTINGS = 2
"""The service's exit code for them."""
SESSION_S = 6.0
"""The workers' session timeout: the shortest that brokers allow by default."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """The model's and the workers': seconds, calls at once, seconds between commits."""

    median_s: float = 0.25
    sigma: float = 1.0
    longest_s: float = 5.0
    concurrency: int = 25
    commit_interval_s: float = 0.5


@dataclass
class Scene:
    """Everything that faults act on. Made by `scene`."""

    cluster: Cluster
    proxy: Proxy
    endpoint_url: str
    folder: Path
    pace: Pace
    settings: Mapping[str, str]
    """Of the workers, over the ones below."""
    proxied: bool
    """Workers reach the brokers through the proxy."""
    say: Say
    input: str = field(default_factory=lambda: unique_name("input"))
    output: str = field(default_factory=lambda: unique_name("output"))
    dead_letters: str = field(default_factory=lambda: unique_name("dead-letters"))
    group: str = field(default_factory=lambda: unique_name("group"))
    workers: dict[str, Worker] = field(default_factory=dict)
    """Those that should run."""
    struck: list[Struck] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """partition -> next offset of the input, as acknowledged to the load."""
    ended_alone: list[str] = field(default_factory=list)
    """Workers that ended without being told to, or not with exit code 0."""
    loading: bool = True
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    """The load has ended, and what it sent is acknowledged."""
    paused: bool = False
    """The load sends nothing for now."""
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    """It is paused, and what it sent is acknowledged."""
    cuttable: bool = False
    """The input has two replicas, one of which is enough: its log can be cut."""
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _texts: Any = field(default_factory=itertools.count)

    # --- topics --------------------------------------------------------------------------------

    async def create_topics(self) -> None:
        stamped = {"message.timestamp.type": "LogAppendTime"}
        unclean = {"unclean.leader.election.enable": "true", "min.insync.replicas": "1"}
        for topic in (self.input, self.output, self.dead_letters):
            cuttable = self.cuttable and topic == self.input
            await create_topic(
                self.cluster.bootstrap_servers,
                topic,
                PARTITIONS,
                replication=2 if cuttable else 3,
                config=stamped | (unclean if cuttable else {}),
            )

    async def configure_output(self, **config: str) -> None:
        """The output topic's configuration, anew."""
        configs = {"message.timestamp.type": "LogAppendTime", **config}
        resource = ConfigResource(ConfigResourceType.TOPIC, self.output, configs)
        async with admin(self.cluster.bootstrap_servers) as client:
            await client.alter_configs([resource])

    async def until_replicated(self, within_s: float = 60) -> None:
        """Wait until every partition has all its replicas in sync again."""
        topics = [self.input, self.output, self.dead_letters, "__consumer_offsets"]
        async with asyncio.timeout(within_s):
            while True:
                with suppress(KafkaError, OSError, TimeoutError):
                    async with asyncio.timeout(10), admin(self.cluster.bootstrap_servers) as client:
                        found = await client.describe_topics(topics)
                        partitions = [p for topic in found for p in topic["partitions"]]
                        if partitions and all(
                            len(p["isr"]) == len(p["replicas"]) for p in partitions
                        ):
                            return
                await asyncio.sleep(0.5)

    # --- workers -------------------------------------------------------------------------------

    def start_worker(self, *options: str) -> Worker:
        worker = Worker(f"w{next(self._numbers)}", self._environment(), self.folder, options)
        self.workers[worker.name] = worker
        return worker

    def _environment(self) -> dict[str, str]:
        servers = self.cluster.bootstrap_servers
        if self.proxied:
            servers = self.cluster.proxied_bootstrap_servers
        return {
            "SLUICE_KAFKA__BOOTSTRAP_SERVERS": servers,
            "SLUICE_KAFKA__GROUP_ID": self.group,
            "SLUICE_KAFKA__SESSION_TIMEOUT_S": str(SESSION_S),
            "SLUICE_INPUT__TOPICS": self.input,
            "SLUICE_OUTPUT__TOPIC": self.output,
            "SLUICE_DEAD_LETTERS__TOPIC": self.dead_letters,
            "SLUICE_EXTRACTION__MODEL": "scripted",
            "SLUICE_EXTRACTION__RECORD": "service.demo.records:Person",
            "SLUICE_EXTRACTION__CARDINALITY": "many",
            "SLUICE_EXTRACTION__CALL_TIMEOUT_S": "30",
            "SLUICE_LIMITS__CONCURRENCY": str(self.pace.concurrency),
            "SLUICE_DELIVERY__COMMIT_INTERVAL_S": str(self.pace.commit_interval_s),
            "OPENAI_BASE_URL": f"{self.endpoint_url}/v1",
            **self.settings,
        }

    def forget(self, worker: Worker) -> None:
        """It has been told to end, or was killed."""
        self.workers.pop(worker.name, None)

    async def terminate(self, worker: Worker) -> None:
        """SIGTERM, and wait for its end; anything but exit code 0 is noted."""
        self.forget(worker)
        worker.signal(signal.SIGTERM)
        try:
            code = await worker.ended(ENDED_S)
        except TimeoutError:
            await worker.note_metrics()
            worker.release()
            self.ended_alone.append(f"{worker.name} did not end within {ENDED_S:.0f} s of SIGTERM")
        else:
            if code != 0:
                self.ended_alone.append(f"{worker.name} ended with {code} at SIGTERM")

    async def supervise(self) -> None:
        """What ended by itself is noted and started again, as an orchestrator would.

        Wrong settings end the round: another start would not mend them.
        """
        while True:
            for worker in tuple(self.workers.values()):
                if worker.code == WRONG_SETTINGS:
                    raise RuntimeError(worker.log.read_text()[-800:])
                if worker.code is not None:
                    self.ended_alone.append(f"{worker.name} ended with {worker.code} by itself")
                    self.say(f"! {self.ended_alone[-1]}: {worker.log}")
                    self.forget(worker)
                    worker.release()
                    self.start_worker()
            await asyncio.sleep(0.3)

    # --- load ----------------------------------------------------------------------------------

    async def load(self) -> None:
        """Produce, so that every partition has its backlog, until `loading` is over."""
        while self.loading:
            try:
                await self._produce()
            except (KafkaError, OSError) as error:
                self.say(f"! the load's producer is replaced: {type(error).__name__}")
        self.loaded.set()

    async def _produce(self) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self.cluster.bootstrap_servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=20,
            request_timeout_ms=60_000,
        )
        await producer.start()
        try:
            while self.loading:
                if self.paused:
                    self.quiet.set()
                    await asyncio.sleep(0.1)
                    continue
                waiting = []
                for partition in range(PARTITIONS):
                    for _ in range(BACKLOG - self.backlog(partition)):
                        # No text comes twice, whatever became of the producer before.
                        key, text = message(next(self._texts), partition)
                        waiting.append(
                            await producer.send(self.input, text, key, partition=partition)
                        )
                acknowledged, failed = await all_settled(waiting)
                for done in acknowledged:
                    self.sent[done.partition] = max(self.sent[done.partition], done.offset + 1)
                if failed:
                    raise failed[0]
                await asyncio.sleep(0.1)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await producer.stop()

    async def pause_load(self) -> None:
        """Returns when nothing is on its way."""
        self.quiet.clear()
        self.paused = True
        await self.quiet.wait()

    async def resume_load(self) -> None:
        """Goes on from where the log ends now, which may be before what was acknowledged."""
        self.sent.update(await end_offsets(self.cluster.bootstrap_servers, self.input))
        self.paused = False

    def backlog(self, partition: int) -> int:
        """Messages of this partition that are sent and not stored as finished."""
        stored = self.stored[-1].offsets.get(partition, (0, ""))[0] if self.stored else 0
        return self.sent[partition] - stored

    # --- watch ---------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Note what Kafka has stored for the group, twice a second, whatever breaks."""
        while True:
            with suppress(KafkaError, OSError, TimeoutError):
                async with admin(self.cluster.bootstrap_servers) as client:
                    while True:
                        async with asyncio.timeout(5):
                            self.stored.append(await self._look(client))
                        await asyncio.sleep(SAMPLE_S)
            await asyncio.sleep(SAMPLE_S)

    async def _look(self, client: AIOKafkaAdminClient) -> Stored:
        wanted = [TopicPartition(self.input, each) for each in range(PARTITIONS)]
        found = await client.list_consumer_group_offsets(self.group, partitions=wanted)
        offsets = {
            each.partition: (stored.offset, stored.metadata)
            for each, stored in found.items()
            if stored.offset >= 0
        }
        return Stored(time.time(), offsets)

    async def until_moved(self, within_s: float = 90) -> bool:
        """Wait until every partition has stored progress that came after now; whether it did."""
        began_s = time.time()
        before: Mapping[int, tuple[int, str]] | None = None
        moved: set[int] = set()
        while len(moved) < PARTITIONS:
            if time.time() - began_s > within_s:
                self.say(f"! partitions that did not move: {set(range(PARTITIONS)) - moved}")
                return False
            await asyncio.sleep(0.1)
            if not self.stored or self.stored[-1].at_s < began_s:
                continue
            now = self.stored[-1].offsets
            before = now if before is None else before  # what a dead worker stored is in it
            moved |= {p for p in now if now[p][0] > before.get(p, (-1, ""))[0]}
        return True

    async def until_caught_up(self) -> bool:
        """End the load and wait for lag 0; whether it came in time."""
        self.loading = False
        await self.loaded.wait()
        # What was sent without an acknowledgement may stand in the input all the same.
        self.sent |= await end_offsets(self.cluster.bootstrap_servers, self.input)
        began_s = time.time()
        while time.time() - began_s < CAUGHT_UP_S:
            fresh = self.stored and self.stored[-1].at_s > began_s
            if fresh and all(self.backlog(partition) <= 0 for partition in range(PARTITIONS)):
                return True
            await asyncio.sleep(0.2)
        left = {partition: self.backlog(partition) for partition in range(PARTITIONS)}
        self.say(f"! not caught up within {CAUGHT_UP_S:.0f} s: {left}")
        return False

    # --- endpoint ------------------------------------------------------------------------------

    async def provider(self, path: str, wanted: Mapping[str, Any]) -> None:
        """Tell the endpoint what to do: `/_fault` or `/_down`."""
        url = f"{self.endpoint_url}{path}"
        async with aiohttp.ClientSession() as session, session.post(url, json=wanted) as reply:
            assert reply.status == 200

    # --- the end -------------------------------------------------------------------------------

    async def evidence(self) -> Evidence:
        """What there is to see, once the endpoint has ended."""
        servers = self.cluster.bootstrap_servers
        published, uncommitted = await read_output(servers, self.output)
        return Evidence(
            sent=await read_input(servers, self.input),
            published=published,
            letters=await read_letters(servers, self.dead_letters),
            calls=read_journal(self.folder / "calls"),
            stored=self.stored,
            struck=self.struck,
            uncommitted=uncommitted,
        )


async def all_settled(
    sent: Sequence[asyncio.Future[RecordMetadata]],
) -> tuple[list[RecordMetadata], list[BaseException]]:
    """What was acknowledged of it, and why the others were not, once all of it is settled.

    None is left unread: a log that was cut fails hundreds at once, and asyncio prints each that
    nobody looked at.
    """
    if sent:
        await asyncio.wait(sent)
    failed = [error for each in sent if (error := each.exception()) is not None]
    return [each.result() for each in sent if each.exception() is None], failed


def message(number: int, partition: int) -> tuple[bytes, bytes]:
    """Key and text of a message: one or two persons, and now and then one that is refused."""
    text = f"Person{number} is {number % 90}"
    if number % 2:
        text += f" and Friend{number} is {number % 80}"
    if number % REFUSED_EACH == 0:
        text += " [[refuse]]"
    return b"p%d-k%d" % (partition, number // PARTITIONS % KEYS), text.encode()


@asynccontextmanager
async def scene(
    cluster: Cluster,
    pace: Pace,
    *,
    seed: int,
    settings: Mapping[str, str],
    proxied: bool,
    say: Say,
    cuttable: bool = False,
) -> AsyncIterator[Scene]:
    """Topics, endpoint, proxy; load, watch and supervision run. Workers are up to the caller.

    At the end workers that still run are killed. The folder of logs stays.
    """
    folder = Path(tempfile.mkdtemp(prefix="sluice-chaos-"))
    async with (
        Proxy(cluster.fronts) as proxy,
        _endpoint(folder, pace, seed) as url,
    ):
        made = Scene(cluster, proxy, url, folder, pace, settings, proxied, say, cuttable=cuttable)
        await made.create_topics()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(each()) for each in (made.watch, made.supervise)]
            load = tasks.create_task(made.load())
            try:
                yield made
            finally:
                made.loading = False
                for task in (*background, load):
                    task.cancel()
                for worker in made.workers.values():
                    worker.release()


@asynccontextmanager
async def _endpoint(folder: Path, pace: Pace, seed: int) -> AsyncIterator[str]:
    """The scripted endpoint as a process; its address."""
    command = [sys.executable, "-m", "tests.support.endpoint", "--seed", str(seed)]
    command += ["--latency-median-ms", str(pace.median_s * 1000)]
    command += ["--latency-sigma", str(pace.sigma)]
    command += ["--latency-max-ms", str(pace.longest_s * 1000)]
    command += ["--journal", str(folder / "calls")]
    process = await asyncio.create_subprocess_exec(
        *dying_with_us(command),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.terminate()
        while process.returncode is None:  # its watcher holds the pipes for longer
            await asyncio.sleep(0.05)
        process.stdin.close()
