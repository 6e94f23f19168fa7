"""A real Kafka for tests and benchmarks: Apache Kafka as one local process, or in a container.

`RealKafka` is one KRaft node run by Java, its jars fetched once by Maven; `DockerKafka` the same
in a container. Both can be killed and started again on the same port with the same data.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from tests.support.started import Started

KAFKA_VERSION = "4.3.1"
CLUSTER_ID = "sluice-test-cluster-id"
"""22 characters, as a base64 UUID has."""
START_TIMEOUT_S = 90.0
"""From the process's start to its first answer; 10 s on a free machine, six share this one."""

POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion>
<groupId>sluice</groupId><artifactId>kafka</artifactId><version>1</version>
<dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
<version>{KAFKA_VERSION}</version></dependency>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId>
<version>{KAFKA_VERSION}</version></dependency>
</dependencies>
</project>
"""

LOG4J = """rootLogger.level = warn
rootLogger.appenderRefs = out
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %p %c{1} %m%n
"""

PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "inter.broker.listener.name": "PLAIN",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAIN:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
    # ACLs can be added for the user of the SASL listener; without one everything is allowed.
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
    "super.users": "User:ANONYMOUS",
    # One node has nobody to replicate to.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # Few partitions of the internal topics: each is a folder to open at the start.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "num.partitions": "6",
    # A first member need not wait three seconds for others.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "auto.create.topics.enable": "false",
    "message.max.bytes": "1048588",
    "log.cleaner.enable": "false",
    "num.network.threads": "2",
    "num.io.threads": "4",
}

SASL_USER = "sluice"
SASL_PASSWORD = "watertight"
SASL_PLAIN_JAAS = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required"
    f' user_{SASL_USER}="{SASL_PASSWORD}";'
)
SASL_SCRAM_JAAS = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


class KafkaUnavailable(Exception):
    """No real Kafka can be had here; the text says why."""


class KafkaNode(Started):
    """One node of Apache Kafka run by Java, its data in a temporary folder.

    `properties` are all that it has, listeners included; `formatting` is what its storage is
    formatted with beside the cluster's id; `bootstrap_servers` is where it answers. `stop` ends it
    in order, `kill` at once (-9); `start` after either runs it again on the same ports and data.
    It dies with the process that started it, even where that one is killed.
    """

    def __init__(
        self,
        properties: Mapping[str, str],
        formatting: Sequence[str],
        bootstrap_servers: str,
        heap_mb: int,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sluice-kafka-"))
        self._properties = {"log.dirs": str(self._folder / "data"), **properties}
        self._formatting = formatting
        self._heap_mb = heap_mb
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap_servers = bootstrap_servers

    def begin(self) -> None:
        self.start()

    def start(self) -> None:
        self.launch()
        self.wait_until_it_answers()

    def launch(self) -> None:
        """Starts it and does not wait: one node of several answers only with the others."""
        assert self._process is None, "it runs already"
        if not java_can_run_it():
            raise KafkaUnavailable("no real Kafka: it needs Java 17 and Maven")
        jars = fetch_jars()
        if not (self._folder / "data").exists():
            self._format(jars)
        with (self._folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_us(self._java(jars, "kafka.Kafka", str(self._config))),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self.bootstrap_servers):
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = self.log_text()[-800:]
                self.kill()
                raise KafkaUnavailable(f"Kafka did not start: {text}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends it in order, within 30 s, else at once."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Halts it as a machine that hangs: connections stay, nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def remove(self) -> None:
        """Kills it and deletes its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def cut_log(self, topic: str, partition: int, offset: int) -> None:
        """While it is down: the log of a partition loses its end from the batch at `offset` on,
        as on a disk that lost it."""
        assert not self.running, "a running broker would not notice"
        folder = self._folder / "data" / f"{topic}-{partition}"
        (log,) = folder.glob("*.log")
        written, at = log.read_bytes(), 0
        while at < len(written):
            base, length = struct.unpack_from(">qi", written, at)
            if base >= offset:
                break
            at += 12 + length
        with log.open("r+b") as file:
            file.truncate(at)
        for each in (*folder.glob("*index"), *folder.glob("*.snapshot")):
            each.unlink()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        """What the broker wrote: warnings and errors."""
        path = self._folder / "broker.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def _config(self) -> Path:
        return self._folder / "server.properties"

    def _format(self, jars: Path) -> None:
        self._config.write_text("".join(f"{k}={v}\n" for k, v in self._properties.items()))
        (self._folder / "log4j2.properties").write_text(LOG4J)
        command = self._java(jars, "kafka.tools.StorageTool", "format", *self._formatting)
        command += ["-t", CLUSTER_ID, "-c", str(self._config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise KafkaUnavailable(f"formatting Kafka's storage failed: {done.stderr[-800:]}")

    def _java(self, jars: Path, *arguments: str) -> list[str]:
        return [
            "java",
            f"-Xmx{self._heap_mb}m",
            "-Xms128m",
            # Half the start-up time of a process that lives for minutes.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}",
            "-cp",
            f"{jars}/*",
            *arguments,
        ]

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.kill(process.pid, how)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdin is not None
        process.stdin.close()  # the watcher ends, and with it what is left of the group


class RealKafka(KafkaNode):
    """A cluster of one node on free ports of 127.0.0.1.

    `properties` are laid over `PROPERTIES`. `sasl_bootstrap_servers` asks for credentials.
    """

    def __init__(self, properties: Mapping[str, str] | None = None, heap_mb: int = 384) -> None:
        port, sasl_port, controller_port = free_ports(3)
        self.sasl_bootstrap_servers = f"127.0.0.1:{sasl_port}"
        own = {
            "listeners": f"PLAIN://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port},"
            f"SASL://{self.sasl_bootstrap_servers}",
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
            "listener.name.sasl.plain.sasl.jaas.config": SASL_PLAIN_JAAS,
            "listener.name.sasl.scram-sha-256.sasl.jaas.config": SASL_SCRAM_JAAS,
        }
        scram = f"SCRAM-SHA-256=[name={SASL_USER},password={SASL_PASSWORD}]"
        super().__init__(
            PROPERTIES | own | dict(properties or {}),
            ("--standalone", "--add-scram", scram),
            f"127.0.0.1:{port}",
            heap_mb,
        )


class DockerKafka(Started):
    """The same broker from its official image, where there is Docker and no Java."""

    def __init__(self) -> None:
        port, self._controller_port = free_ports(2)
        self.bootstrap_servers = f"127.0.0.1:{port}"
        self._container: str | None = None

    def begin(self) -> None:
        self.start()

    def start(self) -> None:
        if self._container is None:
            self._container = _docker("run", "-d", *self._environment(), self._image).strip()
        else:
            _docker("start", self._container)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self.bootstrap_servers):
            if time.monotonic() > deadline:
                raise KafkaUnavailable("the Kafka container does not answer")
            time.sleep(0.2)

    def stop(self) -> None:
        if self._container:
            _docker("stop", self._container)

    def kill(self) -> None:
        if self._container:
            _docker("kill", self._container)

    def remove(self) -> None:
        if self._container:
            _docker("rm", "-f", "-v", self._container)
            self._container = None

    @property
    def _image(self) -> str:
        return f"apache/kafka:{KAFKA_VERSION}"

    def _environment(self) -> list[str]:
        port = self.bootstrap_servers.rsplit(":", 1)[1]
        own = {name: value for name, value in PROPERTIES.items() if not name.startswith("sasl.")}
        own |= {
            "listeners": f"PLAIN://:{port},CONTROLLER://:{self._controller_port}",
            "advertised.listeners": f"PLAIN://{self.bootstrap_servers}",
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.quorum.voters": f"1@localhost:{self._controller_port}",
        }
        options = ["-p", f"127.0.0.1:{port}:{port}"]
        for name, value in own.items():
            options += ["-e", f"KAFKA_{name.upper().replace('.', '_')}={value}"]
        return options


Broker: TypeAlias = "RealKafka | DockerKafka"
"""A real Kafka that tests may stop, kill and start again."""


@contextmanager
def a_kafka() -> Iterator[str]:
    """Bootstrap servers of the one that KAFKA_BOOTSTRAP_SERVERS names, else of one of our own."""
    if given := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        yield given
        return
    with find_broker() as broker:
        yield broker.bootstrap_servers


def find_broker() -> Broker:
    """A broker to start: Java and Maven before Docker. Raises `KafkaUnavailable`."""
    if java_can_run_it():
        return RealKafka()
    if shutil.which("docker"):
        try:
            _docker("info")
        except KafkaUnavailable:
            pass
        else:
            return DockerKafka()
    raise KafkaUnavailable(
        "no real Kafka: set KAFKA_BOOTSTRAP_SERVERS, or install Java 17 and Maven, or run Docker"
    )


def java_can_run_it() -> bool:
    return bool(shutil.which("java") and (shutil.which("mvn") or _jars_folder().exists()))


def fetch_jars() -> Path:
    """The folder of Kafka's jars (54 MB), fetched by Maven at the first use."""
    folder = _jars_folder()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():  # another process may have been faster
            _fetch_jars_into(folder)
    return folder


def _fetch_jars_into(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        pom = Path(work) / "pom.xml"
        pom.write_text(POM)
        jars = Path(work) / "jars"
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise KafkaUnavailable(f"Maven could not fetch Kafka: {done.stdout[-800:]}")
        jars.rename(folder)  # whole or not at all


def _jars_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "kafka-sluice" / f"kafka-{KAFKA_VERSION}"


class _lock:
    """Holds a file lock, so that two test runs don't fetch the same jars side by side."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        import fcntl

        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def dying_with_us(command: list[str]) -> list[str]:
    """The command under a watcher that kills its process group when our end of a pipe closes.

    A process that is killed runs no clean-up; the pipe closes all the same.
    """
    script = 'exec 3<&0; (cat <&3 >/dev/null; kill -9 -$$) & exec "$@" 3<&- </dev/null'
    return ["sh", "-c", script, "sh", *command]


def _docker(*arguments: str) -> str:
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise KafkaUnavailable(f"docker {arguments[0]}: {done.stderr[-400:]}")
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(address: str) -> bool:
    """Whether a Kafka broker answers at host:port: one ApiVersions request, version 0."""
    host, port = address.rsplit(":", 1)
    client = b"sluice-test"
    body = struct.pack(">hhih", 18, 0, 1, len(client)) + client
    try:
        with socket.create_connection((host, int(port)), timeout=2) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            return len(connection.recv(8)) == 8
    except OSError:
        return False
