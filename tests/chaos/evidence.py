"""What was seen from outside: Kafka's topics, the endpoint's journal, the group's stored offsets.

Nothing here or in the checker imports the service. Times are seconds since the epoch, all of one
machine: the broker's append time for records, the endpoint's clock for calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.topics import scan_topic

TOPIC_ID = "sluice.source.topic.id"
HEADERS = ("sluice.id", "sluice.answer.id", "sluice.record.index", "sluice.record.count", TOPIC_ID)
PERSON = re.compile(r"(\w+) is (\d+)")


class Origin(NamedTuple):
    """Where a message stands in the input."""

    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of the input. Its text is no other's."""

    origin: Origin
    key: bytes | None
    text: str
    at_s: float

    @property
    def records(self) -> list[tuple[str, int]]:
        """What the endpoint makes of the text."""
        return [(name, int(age)) for name, age in PERSON.findall(self.text)]


@dataclass(frozen=True, slots=True)
class Published:
    """A record of the output; `header` holds what is needed of its headers."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes
    header: Mapping[str, str]
    at_s: float

    @property
    def identity(self) -> tuple[str, str]:
        """What is the same in a repetition, and no other record's: of a topic that is made again
        offsets come again, and with them `sluice.id`s."""
        return self.header.get(TOPIC_ID, ""), self.header["sluice.id"]


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter."""

    origin: Origin
    reason: str
    at_s: float
    topic_id: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the endpoint saw it; `how` is a status, `cut` (by it) or `gone` (the client)."""

    text: str
    worker: str
    began_s: float
    ended_s: float
    how: str

    @property
    def failed(self) -> bool:
        """The provider failed it, so that another one is no repeat."""
        return self.how not in ("200", "gone")


@dataclass(frozen=True, slots=True)
class Stored:
    """What Kafka had stored for the group at a moment: partition -> next offset, metadata."""

    at_s: float
    offsets: Mapping[int, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was done. `over_s`: from when on it should get better (a kill: at once)."""

    kind: str
    at_s: float
    over_s: float
    worker: str | None = None
    """The one that was hit; None: not one of them alone."""
    deaf: bool = False
    """Whoever was hit could not hear of losing its partitions meanwhile."""


@dataclass
class Evidence:
    """All that the checker judges."""

    sent: list[Sent] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    """The output as a reader with `read_committed` finds it, each partition in its order."""
    letters: list[Letter] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    uncommitted: int = 0
    """Records of the output that no such reader sees: of transactions that were aborted."""


def origin_of(sluice_id: str) -> Origin:
    """`topic:partition:offset`, with or without an index behind it."""
    _, partition, offset = sluice_id.split(":")[:3]
    return Origin(int(partition), int(offset))


async def read_input(servers: str, topic: str) -> list[Sent]:
    return [
        Sent(
            Origin(read.partition, read.offset),
            read.key,
            (read.value or b"").decode(),
            read.timestamp_ms / 1000,
        )
        async for read in scan_topic(servers, topic)
    ]


async def read_output(servers: str, topic: str) -> tuple[list[Published], int]:
    """What is committed, and how many records are not."""
    committed = []
    async for read in scan_topic(servers, topic):
        whole = read.header
        header = {name: whole[name] for name in HEADERS if name in whole}
        at_s = read.timestamp_ms / 1000
        committed.append(
            Published(read.partition, read.offset, read.key, read.value or b"", header, at_s)
        )
    everything = 0
    async for _ in scan_topic(servers, topic, committed_only=False):
        everything += 1
    return committed, everything - len(committed)


async def read_letters(servers: str, topic: str) -> list[Letter]:
    found = []
    async for read in scan_topic(servers, topic):
        header = read.header
        origin = origin_of(header["sluice.id"])
        at_s, topic_id = read.timestamp_ms / 1000, header.get(TOPIC_ID, "")
        found.append(Letter(origin, header["sluice.error.reason"], at_s, topic_id))
    return found


def read_journal(path: Path) -> list[Call]:
    """The endpoint's calls, by when they began."""
    calls = []
    with path.open() as lines:
        for line in lines:
            began_s, ended_s, worker, how, text = json.loads(line)
            calls.append(Call(text, worker, began_s, ended_s, how))
    return sorted(calls, key=lambda call: call.began_s)
