"""Where reading starts, decided from what Kafka stores; pure, so that every case can be tested.

What is stored with an offset is ASCII, its fields in this order, all but the first where needed:

    sluice1:NONCE  the version and 16 hexadecimal digits of the process that wrote it, so that it
                   knows its own commits again
    :gN            while the group is in the generation N in which it was found new
    :tID           the topic's id, so that an offset is not taken for one of a topic made again
    :uN            unclean ends at this next offset, the writer's own in advance
    :aN            the offset of the message that runs alone
    :mMAP          the completed map (core/completed.py)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from service.core.completed import Damaged, decode, encode
from service.core.messages import Partition
from service.core.offsets import Progress
from service.core.window import MAP_CHARS_MAX

_METADATA = re.compile(
    r"sluice1:(?P<nonce>[0-9a-f]{16})(?::g(?P<began>[0-9]{1,10}))?(?::t(?P<topic_id>[\w-]{1,64}))?"
    r"(?::u(?P<unclean_ends>[0-9]{1,9}))?(?::a(?P<alone>[0-9]{1,19}))?(?::m(?P<map>[^:]+))?",
    re.ASCII,
)


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
class HeldOut:
    """Don't read: only a person can say from where. The text says what it means and what to do."""

    problem: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in the metadata beside the progress: who wrote it, when, about which topic."""

    nonce: str
    began: int | None = None
    topic_id: str | None = None


def to_store(progress: Progress, mark: Mark) -> Stored:
    """Offset and metadata; of a completed map that is too long the end is left out."""
    fields = (
        ("g", mark.began),
        ("t", mark.topic_id),
        ("u", progress.unclean_ends or None),
        ("a", progress.alone),
        ("m", encode(progress.runs, MAP_CHARS_MAX) or None),
    )
    written = "".join(f":{letter}{value}" for letter, value in fields if value is not None)
    return Stored(progress.next_offset, f"sluice1:{mark.nonce}{written}")


def read(stored: Stored) -> tuple[Progress, Mark] | None:
    """What `to_store` wrote; None where somebody else did, or it is damaged."""
    found = _METADATA.fullmatch(stored.metadata)
    if found is None:
        return None
    try:
        runs = decode(found["map"] or "")
    except Damaged:
        return None
    progress = Progress(
        stored.offset, runs, int(found["unclean_ends"] or 0), _number(found["alone"])
    )
    return progress, Mark(found["nonce"], _number(found["began"]), found["topic_id"])


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def is_new(stored: Mapping[Partition, Stored | None], generation: int) -> bool:
    """Whether the group starts in this very generation.

    It does when nothing is stored; and when what is stored was written by members that found it
    new in this generation: they are faster than we by a moment.
    """
    known = [each for each in stored.values() if each is not None]
    began = {found[1].began for each in known if (found := read(each)) is not None}
    return not known or generation in began


def taken_over(offset: int, stored: Stored | None, nonce: str) -> Progress:
    """The progress with which the process of this nonce reads a partition on from `offset`.

    Its own end counts as unclean until it has finished something or come to a clean end. What it
    has stored itself has that in it: it lives, and has only taken the partition over again.
    """
    found = None if stored is None else read(stored)
    if found is None or found[0].next_offset != offset:
        return Progress(offset, unclean_ends=1)
    progress, mark = found
    counted = mark.nonce == nonce and progress.unclean_ends > 0
    return progress if counted else replace(progress, unclean_ends=progress.unclean_ends + 1)


def where_to_start(
    partition: Partition,
    stored: Stored | None,
    bounds: Bounds,
    chosen: int | None,
    topic_id: str | None = None,
) -> int | HeldOut:
    """The offset to read from; `chosen` by the settings where the group is new, else None.

    Below the log's begin it stays what is stored: that something is missing is for others to say.
    `topic_id` is the topic's now, None where brokers don't tell.
    """
    if stored is None:
        return bounds.begin if chosen is None else chosen
    found = read(stored)
    then = None if found is None else found[1].topic_id
    if then is not None and topic_id is not None and then != topic_id:
        return HeldOut(made_again(partition, stored.offset, bounds.end))
    if stored.offset > bounds.end:
        return HeldOut(beyond_the_end(partition, stored.offset, bounds.end))
    return stored.offset


def beyond_the_end(partition: Partition, offset: int, end: int) -> str:
    """The log is shorter than what was read of it."""
    return (
        f"The group's next offset of {partition} is {offset}, but the log ends at {end}: the topic "
        "was made again, or its log was cut. Starting over would read, and pay for, its "
        f"{end} offsets. To do so, stop every worker and set the group's offsets with "
        "kafka-consumer-groups --reset-offsets, or use a new kafka.group_id."
    )


def made_again(partition: Partition, offset: int, end: int) -> str:
    """What is stored was read from another topic of this name."""
    return (
        f"The group's next offset of {partition}, {offset}, was stored for a topic of this name "
        "that has been deleted since, and says nothing of the one that is there now. Starting over "
        f"would read, and pay for, its {end} offsets. To do so, stop every worker and set the "
        "group's offsets with kafka-consumer-groups --reset-offsets, or use a new kafka.group_id."
    )


def all_gone(topics: tuple[str, ...], group_id: str) -> str:
    """This process has read under the group's offsets, and now there are none."""
    return (
        f"Kafka has lost all offsets of the group {group_id} for {', '.join(topics)}: they were "
        "deleted, or the topics were made again. Starting over would read, and pay for, messages "
        "a second time. To start over as a new group does, restart every worker; to go on "
        "elsewhere, stop them and set offsets with kafka-consumer-groups --reset-offsets."
    )
