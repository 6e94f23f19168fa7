"""Three real Kafka brokers that are also the controllers, and what can be asked of them.

Every broker has two listeners: one that is reached directly, and one that is advertised on other
ports, where a proxy may stand (`tests.support.proxy`). Whoever bootstraps through the proxy
stays behind it; whoever bootstraps directly sees the cluster as it is.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from aiokafka.errors import KafkaError

from tests.support.kafka import PROPERTIES, KafkaNode, KafkaUnavailable, free_ports, java_can_run_it
from tests.support.started import Started
from tests.support.topics import admin

NODES = (1, 2, 3)
HEAP_MB = 320
"""For each broker: enough for a few topics with a few hundred messages a second."""
BROKER_SESSION_S = 6.0
"""A broker that says nothing for this long is fenced, and its partitions get other leaders; one
that was killed is let in again only after it."""

_DESCRIBE_QUORUM = 55
_TIMEOUT_S = 3.0


class Cluster(Started):
    """Three nodes on free ports of 127.0.0.1: replication 3, two of them must acknowledge.

    A context manager. `kill`, `stop`, `pause` take a node's id (1 to 3), as `start` and `resume`
    do for what comes after. The blocking ones are meant for `asyncio.to_thread`.
    """

    def __init__(self, properties: Mapping[str, str] | None = None) -> None:
        ports = free_ports(4 * len(NODES))
        direct, behind, fronts, controllers = (
            dict(zip(NODES, ports[start::4], strict=True)) for start in range(4)
        )
        self.bootstrap_servers = _servers(direct)
        self.proxied_bootstrap_servers = _servers(fronts)
        self.fronts = {fronts[node]: behind[node] for node in NODES}
        """Port that clients are told -> port where the broker listens: the proxy's work."""
        self.front_of = fronts
        directories = {node: _uuid() for node in NODES}
        voters = ",".join(f"{n}@127.0.0.1:{controllers[n]}:{directories[n]}" for n in NODES)
        self._addresses = {node: f"127.0.0.1:{port}" for node, port in direct.items()}
        self._nodes = {
            node: KafkaNode(
                PROPERTIES
                | _properties(node, direct[node], behind[node], fronts[node], controllers)
                | dict(properties or {}),
                ("--initial-controllers", voters),
                self._addresses[node],
                HEAP_MB,
            )
            for node in NODES
        }

    def begin(self) -> None:
        if not java_can_run_it():
            raise KafkaUnavailable("no cluster: install Java 17 and Maven")
        with ThreadPoolExecutor(len(NODES)) as threads:
            list(threads.map(KafkaNode.launch, self._nodes.values()))
            list(threads.map(KafkaNode.wait_until_it_answers, self._nodes.values()))

    def kill(self, node: int) -> None:
        self._nodes[node].kill()

    def stop(self, node: int) -> None:
        """In order: it hands its leaderships over first."""
        self._nodes[node].stop()

    def start(self, node: int) -> None:
        """After `kill` or `stop`; returns once it answers."""
        self._nodes[node].start()

    def pause(self, node: int) -> None:
        self._nodes[node].pause()

    def resume(self, node: int) -> None:
        self._nodes[node].resume()

    def remove(self) -> None:
        for node in self._nodes.values():
            node.remove()

    def log_text(self, node: int) -> str:
        return self._nodes[node].log_text()

    @property
    def running(self) -> list[int]:
        return [number for number, node in self._nodes.items() if node.running]

    async def controller(self) -> int:
        """The node that leads the metadata quorum now."""
        for node in self.running:
            try:
                leader = await _quorum_leader(self._addresses[node])
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
            if leader in NODES:
                return leader
        raise KafkaUnavailable("no broker knows who the controller is")

    async def coordinator(self, group: str) -> int:
        """The node that coordinates this group now; waits for one while it moves."""
        async with asyncio.timeout(30), admin(self.bootstrap_servers) as client:
            while True:
                try:
                    return int(await client.find_coordinator(group))
                except KafkaError as error:
                    if not error.retriable:
                        raise
                await asyncio.sleep(0.2)


def _properties(
    node: int, direct: int, behind: int, front: int, controllers: Mapping[int, int]
) -> dict[str, str]:
    return {
        "node.id": str(node),
        "listeners": f"PLAIN://127.0.0.1:{direct},PROXIED://127.0.0.1:{behind},"
        f"CONTROLLER://127.0.0.1:{controllers[node]}",
        "advertised.listeners": f"PLAIN://127.0.0.1:{direct},PROXIED://127.0.0.1:{front},"
        f"CONTROLLER://127.0.0.1:{controllers[node]}",
        "listener.security.protocol.map": "PLAIN:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.quorum.bootstrap.servers": _servers(controllers),
        "default.replication.factor": "3",
        "min.insync.replicas": "2",
        "offsets.topic.replication.factor": "3",
        "transaction.state.log.replication.factor": "3",
        "transaction.state.log.min.isr": "2",
        "share.coordinator.state.topic.replication.factor": "3",
        "share.coordinator.state.topic.min.isr": "2",
        "broker.session.timeout.ms": str(int(BROKER_SESSION_S * 1000)),
        # A replica that hangs is given up in a few seconds instead of half a minute.
        "replica.lag.time.max.ms": "6000",
    }


def _servers(ports: Mapping[int, int]) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports.values())


def _uuid() -> str:
    """Kafka's form of a random UUID; one must not begin like an option."""
    while (text := base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")).startswith("-"):
        pass
    return text


async def _quorum_leader(address: str) -> int:
    """One DescribeQuorum request, version 0; the client library has none."""
    topic = b"__cluster_metadata"
    header = struct.pack(">hhih", _DESCRIBE_QUORUM, 0, 1, -1) + b"\0"
    # Compact arrays and strings carry their length plus one; a zero ends each struct (no tags).
    body = b"\2" + bytes([len(topic) + 1]) + topic + b"\2" + struct.pack(">i", 0) + b"\0\0\0"
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(struct.pack(">i", len(header + body)) + header + body)
            size = struct.unpack(">i", await reader.readexactly(4))[0]
            reply = await reader.readexactly(size)
        finally:
            writer.close()
    # Correlation id, tags, error; then one topic with one partition: index, error, leader.
    at = 4 + 1 + 2 + 1 + 1 + len(topic) + 1 + 4 + 2
    return int(struct.unpack_from(">i", reply, at)[0]) if len(reply) >= at + 4 else -1
