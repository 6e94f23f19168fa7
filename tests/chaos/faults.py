"""The faults: each a small action, drawn from a seed before the round begins."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError
from aiokafka.protocol.group import LeaveGroupRequest

from tests.chaos.evidence import Struck
from tests.chaos.scene import SESSION_S, Scene
from tests.chaos.worker import Worker
from tests.support.proxy import FAIR, Weather
from tests.support.topics import admin

EXTRAS_MAX = 2
"""Workers beyond the round's own that may have joined at a time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the schedule. `pick` in [0, 1) chooses whom among those there are then."""

    kind: str
    pick: float
    length_s: float
    """How long what lasts lasts."""
    pause_s: float
    """Before it."""

    def __str__(self) -> str:
        return f"{self.kind} (pick {self.pick:.3f}, {self.length_s:.1f} s)"


def schedule(
    kinds: Sequence[str], times: int, seed: int, pause_s: tuple[float, float]
) -> list[Fault]:
    """`times` faults, every kind as often as any other, in an order of the seed's."""
    chance = random.Random(seed)
    wanted: list[str] = []
    while len(wanted) < times:
        wanted += chance.sample(list(kinds), len(kinds))
    return [
        Fault(kind, chance.random(), chance.uniform(0.0, 1.0), chance.uniform(*pause_s))
        for kind in wanted[:times]
    ]


async def strike(scene: Scene, fault: Fault) -> None:
    """Do it; what was done is noted in `scene.struck`. Returns when it is over."""
    await FAULTS[fault.kind](scene, fault)


# --- workers -----------------------------------------------------------------------------------


async def kill(scene: Scene, fault: Fault) -> None:
    """kill -9 of a worker; another one starts in its place."""
    worker = _worker(scene, fault)
    await worker.until_settled()  # one without partitions would be missed by nobody
    scene.forget(worker)
    at_s = time.time()
    worker.signal(signal.SIGKILL)
    scene.struck.append(Struck("kill", at_s, at_s, worker.name))
    worker.release()
    scene.start_worker()


async def restart(scene: Scene, fault: Fault) -> None:
    """SIGTERM to a worker; when it has ended, another one starts in its place."""
    worker = _worker(scene, fault)
    await worker.until_settled()
    began_s = time.time()
    await scene.terminate(worker)
    await scene.start_worker().until_settled()
    scene.struck.append(Struck("restart", began_s, time.time()))


async def rolling(scene: Scene, fault: Fault) -> None:
    """Every worker in turn: SIGTERM, its end, a new one, which settles before the next turn."""
    for worker in tuple(scene.workers.values()):
        began_s = time.time()
        await scene.terminate(worker)
        await scene.start_worker().until_settled()
        scene.struck.append(Struck("rolling", began_s, time.time()))


async def zombie(scene: Scene, fault: Fault) -> None:
    """SIGSTOP for longer than the session, then SIGCONT: it wakes with what is another's."""
    worker = _worker(scene, fault)
    await worker.until_settled()
    at_s = time.time()
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(SESSION_S + 3 + 5 * fault.length_s)
    worker.signal(signal.SIGCONT)
    # Its partitions are another's since its session ended: that is what has to recover.
    scene.struck.append(Struck("zombie", at_s, at_s, worker.name))
    scene.struck.append(Struck("woken", at_s, time.time(), worker.name, deaf=True))


async def join(scene: Scene, fault: Fault) -> None:
    """One more worker, or, with as many as may be, one fewer."""
    extras = list(scene.workers.values())[2:]
    if len(extras) >= EXTRAS_MAX or (extras and fault.pick < 0.5):
        await _leave(scene, extras[int(fault.length_s * len(extras))])
    else:
        at_s = time.time()
        worker = scene.start_worker()
        await worker.until_settled()
        scene.struck.append(Struck("join", at_s, time.time()))


async def _leave(scene: Scene, worker: Worker) -> None:
    at_s = time.time()
    await scene.terminate(worker)
    scene.struck.append(Struck("leave", at_s, time.time()))


async def evict(scene: Scene, fault: Fault) -> None:
    """A worker is put out of the group in its name: it learns of it when a commit is refused."""
    worker = _worker(scene, fault)
    await worker.until_settled()
    refused, rebalances = await _refused_commits(worker), await _rebalances(worker)
    at_s = time.time()
    async with admin(scene.cluster.bootstrap_servers) as client:
        node = await client.find_coordinator(scene.group)
        (found,) = await client.describe_consumer_groups([scene.group], node)
        for member in found.to_object()["groups"][0]["members"]:
            if member["client_id"] == worker.name:
                leaving = LeaveGroupRequest(scene.group, member["member_id"])
                await client._send_request_to_node(node, leaving)
                break
        else:
            scene.say(f"! {worker.name} is no member")
    with suppress(TimeoutError):
        async with asyncio.timeout(SESSION_S + 20):
            while await _rebalances(worker) <= rebalances:
                await asyncio.sleep(0.1)
    await worker.until_settled()
    refused = await _refused_commits(worker) - refused
    scene.say(f"  {worker.name} put out, {refused:.0f} of its commits refused")
    scene.struck.append(Struck("evict", at_s, time.time(), worker.name, deaf=True))


async def intruder(scene: Scene, fault: Fault) -> None:
    """A member that joins, takes its share and leaves at once, without a word of progress."""
    at_s = time.time()
    assignor = type("Own", (StickyPartitionAssignor,), {})
    consumer = AIOKafkaConsumer(
        scene.input,
        bootstrap_servers=scene.cluster.bootstrap_servers,
        group_id=scene.group,
        enable_auto_commit=False,
        auto_offset_reset="none",
        session_timeout_ms=int(SESSION_S * 1000),
        rebalance_timeout_ms=20_000,
        partition_assignment_strategy=(assignor,),
    )
    try:
        async with asyncio.timeout(30):
            await consumer.start()
            while not consumer.assignment():
                await asyncio.sleep(0.05)
    except (KafkaError, TimeoutError) as error:
        scene.say(f"! the intruder was not let in: {type(error).__name__}")
    finally:
        await consumer.stop()
    scene.struck.append(Struck("intruder", at_s, time.time()))


async def _refused_commits(worker: Worker) -> float:
    return await worker.metric('sluice_commits_total{result="refused"}') or 0.0


async def _rebalances(worker: Worker) -> float:
    return await worker.metric("sluice_rebalances_total") or 0.0


def _worker(scene: Scene, fault: Fault) -> Worker:
    workers = list(scene.workers.values())
    return workers[int(fault.pick * len(workers))]


# --- brokers -----------------------------------------------------------------------------------


async def broker(scene: Scene, fault: Fault) -> None:
    """kill -9 of any broker, and its return."""
    running = scene.cluster.running
    await _kill_broker(scene, fault, "broker", running[int(fault.pick * len(running))])


async def controller(scene: Scene, fault: Fault) -> None:
    """kill -9 of the broker that leads the metadata quorum, and its return."""
    await _kill_broker(scene, fault, "controller", await scene.cluster.controller())


async def coordinator(scene: Scene, fault: Fault) -> None:
    """kill -9 of the broker that coordinates the workers' group, and its return."""
    node = await scene.cluster.coordinator(scene.group)
    await _kill_broker(scene, fault, "coordinator", node)


async def _kill_broker(scene: Scene, fault: Fault, kind: str, node: int) -> None:
    at_s = time.time()
    await asyncio.to_thread(scene.cluster.kill, node)
    scene.struck.append(Struck(kind, at_s, at_s))
    await asyncio.sleep(5 + 10 * fault.length_s)
    await _back(scene, node)


async def handover(scene: Scene, fault: Fault) -> None:
    """The coordinator's broker is stopped in order, so that the group moves; and its return."""
    node = await scene.cluster.coordinator(scene.group)
    at_s = time.time()
    await asyncio.to_thread(scene.cluster.stop, node)
    scene.struck.append(Struck("handover", at_s, at_s))
    await asyncio.sleep(3 + 5 * fault.length_s)
    await _back(scene, node)


async def hang(scene: Scene, fault: Fault) -> None:
    """A broker halts and keeps its connections; and goes on."""
    running = scene.cluster.running
    node = running[int(fault.pick * len(running))]
    at_s = time.time()
    scene.cluster.pause(node)
    await asyncio.sleep(4 + 10 * fault.length_s)
    scene.cluster.resume(node)
    scene.struck.append(Struck("hang", at_s, time.time(), deaf=True))
    await scene.until_replicated()


async def too_few(scene: Scene, fault: Fault) -> None:
    """What a full disk does: for a while the output takes nothing (NotEnoughReplicas)."""
    running = scene.cluster.running
    node = running[int(fault.pick * len(running))]
    at_s = time.time()
    await scene.configure_output(**{"min.insync.replicas": "3"})
    await asyncio.to_thread(scene.cluster.kill, node)
    await asyncio.sleep(8 + 4 * fault.length_s)
    await scene.configure_output()
    scene.struck.append(Struck("too_few", at_s, time.time()))
    await _back(scene, node)


async def _back(scene: Scene, node: int) -> None:
    await asyncio.to_thread(scene.cluster.start, node)
    await scene.until_replicated()


# --- connections ---------------------------------------------------------------------------------


async def cut(scene: Scene, fault: Fault) -> None:
    """Every connection is reset, of one broker or of all."""
    at_s = time.time()
    number = scene.proxy.cut(_fronts(scene, fault))
    scene.say(f"  {number} connections cut")
    scene.struck.append(Struck("cut", at_s, at_s))


async def slow(scene: Scene, fault: Fault) -> None:
    """Every byte comes late, and few at a time."""
    weather = Weather(delay_s=0.1 + 0.4 * fault.length_s, bytes_per_s=200_000)
    await _weather(scene, fault, "slow", weather, 4 + 6 * fault.length_s)


async def half_open(scene: Scene, fault: Fault) -> None:
    """Sockets stay, bytes vanish; longer than the session, or shorter."""
    await _weather(scene, fault, "half_open", Weather(swallow=True), 3 + 9 * fault.length_s)


async def refused(scene: Scene, fault: Fault) -> None:
    """Connections are reset, and so is every new one for a while."""
    scene.proxy.cut(_fronts(scene, fault))
    await _weather(scene, fault, "refused", Weather(refuse=True), 2 + 6 * fault.length_s)


async def _weather(
    scene: Scene, fault: Fault, kind: str, weather: Weather, length_s: float
) -> None:
    at_s = time.time()
    fronts = _fronts(scene, fault)
    scene.proxy.set(weather, fronts)
    await asyncio.sleep(length_s)
    scene.proxy.set(FAIR, fronts)
    scene.struck.append(Struck(kind, at_s, time.time(), deaf=True))


def _fronts(scene: Scene, fault: Fault) -> list[int]:
    """All of them, or one: half and half."""
    fronts = list(scene.cluster.front_of.values())
    return fronts if fault.pick >= 0.5 else [fronts[int(fault.pick * 2 * len(fronts))]]


# --- provider ------------------------------------------------------------------------------------


async def down(scene: Scene, fault: Fault) -> None:
    """The provider resets every connection."""
    at_s = time.time()
    length_s = 3 + 7 * fault.length_s
    await scene.provider("/_down", {"for_s": length_s})
    await asyncio.sleep(length_s)
    scene.struck.append(Struck("down", at_s, time.time()))


async def storm(scene: Scene, fault: Fault) -> None:
    """Nearly every call gets 429, come back in a second."""
    await _provider(scene, fault, "storm", {"step": "429 retry_after=1", "share": 0.9})


async def errors(scene: Scene, fault: Fault) -> None:
    """Half of the calls get 500."""
    await _provider(scene, fault, "errors", {"step": "500", "share": 0.5})


async def late(scene: Scene, fault: Fault) -> None:
    """Every call takes two to four seconds longer."""
    after_ms = 2000 + 2000 * fault.pick
    await _provider(scene, fault, "late", {"after_ms": after_ms})


async def _provider(scene: Scene, fault: Fault, kind: str, wanted: dict[str, object]) -> None:
    at_s = time.time()
    await scene.provider("/_fault", wanted)
    try:
        await asyncio.sleep(4 + 6 * fault.length_s)
    finally:
        with suppress(OSError):
            await scene.provider("/_fault", {})
    scene.struck.append(Struck(kind, at_s, time.time()))


FAULTS: dict[str, Callable[[Scene, Fault], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        *(kill, restart, rolling, zombie, join, evict, intruder),
        *(broker, controller, coordinator, handover, hang, too_few),
        *(cut, slow, half_open, refused),
        *(down, storm, errors, late),
    )
}
