"""A log loses its end while workers read it: the round `cut_log`.

The input has two replicas, one of which is enough, and its leaders may be elected unclean. A
broker that follows is killed and misses what comes; when the group has gone past what it has, the
leader is killed and the follower comes back alone. The partitions that these two have between them
end before the group's next offset then; the others lose nothing.

What must hold: of the messages that the log holds in the end none is lost. A partition that was
cut is held with a sentence on /readyz, while the others are read; it stays held when the log has
grown past the next offset again, and over a restart of every worker; `--start-over` reads on from
the cut. Messages that went with the tail are nobody's fault: their outcomes may stand in the
output. They are told apart by their texts, of which no two are alike, since new messages take
their offsets, and with these their `sluice.id`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from aiokafka.errors import KafkaError

from tests.chaos.evidence import PERSON, Origin, Struck, read_input
from tests.chaos.scene import PARTITIONS, Pace, Say, Scene, scene
from tests.support.cluster import NODES, Cluster
from tests.support.topics import admin, end_offsets, scan_topic

T = TypeVar("T")

PACE = Pace(median_s=0.1, sigma=0.5, longest_s=2.0)
WORKERS = 2
PAST = 50
"""Offsets between the follower's end and the group's next offset when the leader is killed."""
BEHIND_S = 90.0
"""For the group to get so far."""
LED_S = 60.0
"""For the follower to come back and lead: its start, and the session of the one that led."""
SAID_S = 60.0
"""From the cut to a worker that says so."""
HELD_S = 10.0
"""That a held partition is watched, while its log grows past the next offset."""
SAYS = "--start-over"
"""Part of the sentence that a person reads, whatever its other words are."""


@dataclass
class Row:
    """One line of the table, and what was broken."""

    seed: int
    mode: str
    cuts: int
    folder: Path
    messages: int = 0
    lost_with_the_log: int = 0
    lost: list[Origin] = field(default_factory=list)
    repeated: int = 0
    ids_twice: int = 0
    broken: list[str] = field(default_factory=list)
    lasted_s: float = 0.0

    def __str__(self) -> str:
        cells = (
            f"cut_log, {self.cuts} cuts",
            self.mode,
            f"{self.messages:,}",
            f"{self.lost_with_the_log:,}",
            str(len(self.lost)),
            str(self.repeated),
            str(self.ids_twice),
            f"{self.lasted_s:.0f}",
        )
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| round | mode | messages in the log | gone with its end | lost | outcomes repeated "
    "| ids of two texts | duration s |\n|---|---|---|---|---|---|---|---|"
)


async def play(cluster: Cluster, *, seed: int, mode: str, times: int, say: Say) -> Row:
    """Cut so often, each time until all is read again; then judge."""
    began_s = time.time()
    settings = {"SLUICE_DELIVERY__MODE": mode}
    at = scene(cluster, PACE, seed=seed, settings=settings, proxied=False, say=say, cuttable=True)
    async with at as made:
        row = Row(seed, mode, times, made.folder)
        say(f"cut_log: seed {seed}, {times} cuts, {mode}; logs in {made.folder}")
        gone: set[str] = set()
        for _ in range(WORKERS):
            made.start_worker()
        if not await made.until_moved():
            row.broken.append("the workers did not begin")
        for number in range(times):
            follower = NODES[(seed + number) % len(NODES)]
            leader = NODES[(seed + number + 1) % len(NODES)]
            gone |= await _cut_and_mend(made, row, follower, leader)
        say(f"the load ends after {time.time() - began_s:.0f} s")
        if not await made.until_caught_up():
            row.broken.append("lag 0 was not reached")
        for worker in tuple(made.workers.values()):
            await made.terminate(worker)
    row.broken += made.ended_alone
    await _judge(made, row, gone)
    row.lasted_s = time.time() - began_s
    if not row.broken:
        shutil.rmtree(made.folder, ignore_errors=True)
    return row


async def _cut_and_mend(made: Scene, row: Row, follower: int, leader: int) -> set[str]:
    """One cut, what workers make of it, and the person's word; the texts that are gone."""
    shared = await _shared(made, follower, leader)
    cut, gone = await _cut(made, shared, follower, leader)
    held = {each: _next_offset(made, each) for each in cut}
    made.say(f"  next offset and end of each cut log: { {p: (held[p], cut[p]) for p in cut} }")
    if not cut:
        row.broken.append("no log was cut: the leader was not elected unclean, or too late")
    if cut and not await _said(made):
        row.broken.append("no worker says on /readyz that a log was cut")
    await made.resume_load()
    row.broken += [line async for line in _held(made, held)]
    for worker in tuple(made.workers.values()):
        await made.terminate(worker)
    for _ in range(WORKERS):
        await made.start_worker().until_settled()
    if cut and not await _said(made):
        row.broken.append("after a restart no worker says on /readyz that a log was cut")
    row.broken += [f"after a restart: {line}" async for line in _held(made, held)]
    for worker in tuple(made.workers.values()):
        await made.terminate(worker)
    for _ in range(WORKERS):
        made.start_worker("--start-over")
    if not await made.until_moved():
        row.broken.append("with --start-over not every partition went on")
    return gone


async def _shared(made: Scene, follower: int, leader: int) -> set[int]:
    """The input's partitions that have their two replicas on these brokers."""
    async with admin(made.cluster.bootstrap_servers) as client:
        (topic,) = await client.describe_topics([made.input])
    return {
        each["partition"]
        for each in topic["partitions"]
        if set(each["replicas"]) == {follower, leader}
    }


async def _cut(
    made: Scene, shared: set[int], follower: int, leader: int
) -> tuple[dict[int, int], set[str]]:
    """Partition -> where its log ends now, for those that end before the next offset; and the
    texts that are gone."""
    at_s = time.time()
    await asyncio.to_thread(made.cluster.kill, follower)
    missed = await _ends(made)
    await _until(
        lambda: all(_next_offset(made, each) > missed[each] + PAST for each in shared),
        BEHIND_S,
    )
    await made.pause_load()
    before = await _texts(made)
    await asyncio.to_thread(made.cluster.kill, leader)
    await asyncio.to_thread(made.cluster.start, follower)
    await _until_led(made, shared, follower)
    await asyncio.to_thread(made.cluster.start, leader)
    await made.until_replicated(within_s=120)
    made.struck.append(Struck("cut_log", at_s, time.time()))
    ends = await _ends(made)
    cut = {each: ends[each] for each in shared if ends[each] < _next_offset(made, each)}
    return cut, before - await _texts(made)


def _next_offset(made: Scene, partition: int) -> int:
    """As it was last seen: while the group's coordinator moves, a look may not show all."""
    seen = (each.offsets.get(partition) for each in reversed(made.stored))
    return next((at[0] for at in seen if at is not None), 0)


async def _texts(made: Scene) -> set[str]:
    sent = await read_input(made.cluster.bootstrap_servers, made.input)
    return {message.text for message in sent}


async def _until_led(made: Scene, partitions: set[int], node: int) -> None:
    async with asyncio.timeout(LED_S):
        while True:
            led = await _patiently(lambda: _led(made, node))
            if partitions <= led:
                return
            await asyncio.sleep(0.5)


async def _led(made: Scene, node: int) -> set[int]:
    async with admin(made.cluster.bootstrap_servers) as client:
        (topic,) = await client.describe_topics([made.input])
    return {each["partition"] for each in topic["partitions"] if each["leader"] == node}


async def _ends(made: Scene) -> dict[int, int]:
    servers = made.cluster.bootstrap_servers
    return await _patiently(lambda: end_offsets(servers, made.input))


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer of a cluster that has just lost a broker."""
    async with asyncio.timeout(LED_S):
        while True:
            with suppress(KafkaError, OSError):
                return await ask()
            await asyncio.sleep(0.5)


async def _said(made: Scene) -> bool:
    """Whether a worker says what to do, in time."""
    deadline_s = time.time() + SAID_S
    while time.time() < deadline_s:
        for worker in tuple(made.workers.values()):
            if SAYS in (page := await worker.readiness()):
                made.say(f"  {worker.name}: {page.strip()[:300]}")
                return True
        await asyncio.sleep(0.5)
    return False


async def _held(made: Scene, held: dict[int, int]) -> AsyncIterator[str]:
    """What moved that must not, and what did not though it should."""
    others = set(range(PARTITIONS)) - held.keys()
    before = {each: _next_offset(made, each) for each in others}
    await asyncio.sleep(HELD_S)
    now = {each: _next_offset(made, each) for each in range(PARTITIONS)}
    ends = await _ends(made)
    for each, offset in held.items():
        made.say(f"  partition {each}: held at {now[each]}, its log ends at {ends[each]}")
        if now[each] != offset:
            yield f"partition {each} was cut and went on: {offset} -> {now[each]}"
        if ends[each] <= offset:
            yield f"partition {each} did not grow past {offset} again: nothing is shown"
    for each in others:
        if now[each] <= before[each]:
            yield f"partition {each} was not cut and stood still at {now[each]}"


async def _judge(made: Scene, row: Row, gone: set[str]) -> None:
    servers = made.cluster.bootstrap_servers
    persons: Counter[str] = Counter()
    names: dict[str, set[str]] = {}
    async for read in scan_topic(servers, made.output):
        persons[name := json.loads(read.value or b"")["name"]] += 1
        names.setdefault(read.header["sluice.id"], set()).add(name)
    letters: Counter[str] = Counter()
    async for read in scan_topic(servers, made.dead_letters):
        letters[(read.value or b"").decode()] += 1
    sent = await read_input(servers, made.input)
    row.messages, row.lost_with_the_log = len(sent), len(gone)
    row.ids_twice = sum(len(each) > 1 for each in names.values())
    for message in sent:
        outcomes = (
            [letters[message.text]]
            if letters[message.text]
            else [persons[name] for name, _ in PERSON.findall(message.text)]
        )
        if not all(outcomes):
            row.lost.append(message.origin)
        row.repeated += max(outcomes) > 1
    if row.lost:
        row.broken.append(f"lost: {len(row.lost)}, the first is {row.lost[0]}")
    if row.mode == "exactly_once" and row.repeated:
        row.broken.append(f"outcomes repeated: {row.repeated}")


async def _until(holds: Callable[[], bool], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.2)
