"""Where reading starts, decided from what Kafka stores; pure, so that every case can be tested.

What is stored with an offset is ASCII: `sluice1:NONCE`, then `:gN` while the group is in the
generation N in which it was found new, then room for the completed map. The nonce is one of the
process's, so that a process knows its own commits again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.core.messages import Partition

_METADATA = re.compile(r"sluice1:(?P<nonce>[0-9a-f]{16})(?::g(?P<began>\d{1,10}))?(?:$|:)")


@dataclass(frozen=True, slots=True)
class Stored:
    """A next offset as Kafka holds it for the group."""

    offset: int
    metadata: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """The offsets a partition can be read from: `begin` up to, not including, `end`."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Start:
    """Read from here, or from the log's begin where that is later.

    `pin`: Kafka holds no offset yet, and this one is to be stored at once. Otherwise a group that
    starts at `latest` and ends before its first commit would start at a later `latest`.
    """

    offset: int
    pin: bool = False


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Don't read: only a person can say from where. The text says what it means and what to do."""

    problem: str


def metadata_of(nonce: str, began: int | None) -> str:
    """What is stored with an offset; `began` as long as the group is in that generation."""
    return f"sluice1:{nonce}" if began is None else f"sluice1:{nonce}:g{began}"


def is_foreign(stored: Stored) -> bool:
    """Whether somebody else wrote it, or it is damaged; then only its offset counts."""
    return _METADATA.match(stored.metadata) is None


def is_new(stored: Mapping[Partition, Stored | None], generation: int) -> bool:
    """Whether the group starts in this very generation.

    It does when nothing is stored; and when what is stored was written by members that found it
    new in this generation: they are faster than we by a moment.
    """
    known = [each for each in stored.values() if each is not None]
    began = {found["began"] for each in known if (found := _METADATA.match(each.metadata))}
    return not known or str(generation) in began


def where_to_start(
    partition: Partition, stored: Stored | None, bounds: Bounds, chosen: int | None
) -> Start | HeldOut:
    """The start of one partition; `chosen` by the settings where the group is new, else None."""
    if stored is None:
        return Start(bounds.begin if chosen is None else chosen, pin=True)
    if stored.offset > bounds.end:
        return HeldOut(beyond_the_end(partition, stored.offset, bounds.end))
    return Start(stored.offset)


def beyond_the_end(partition: Partition, offset: int, end: int) -> str:
    """The log is shorter than what was read of it."""
    return (
        f"The group's next offset of {partition} is {offset}, but the log ends at {end}: the topic "
        "was made again, or its log was cut. Starting over would read, and pay for, its "
        f"{end} offsets. To do so, stop every worker and set the group's offsets with "
        "kafka-consumer-groups --reset-offsets, or use a new kafka.group_id."
    )


def all_gone(topics: tuple[str, ...], group_id: str) -> str:
    """This process has read under the group's offsets, and now there are none."""
    return (
        f"Kafka has lost all offsets of the group {group_id} for {', '.join(topics)}: they were "
        "deleted, or the topics were made again. Starting over would read, and pay for, messages "
        "a second time. To start over as a new group does, restart every worker; to go on "
        "elsewhere, stop them and set offsets with kafka-consumer-groups --reset-offsets."
    )
