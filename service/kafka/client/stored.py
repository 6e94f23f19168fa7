"""What a commit's metadata holds: the text that is stored beside a group's next offset.

What is stored with an offset is ASCII of at most `METADATA_CHARS_MAX` characters: the version and
16 hexadecimal digits of the process that wrote it, so that it knows its own commits again, then
fields. A field is a colon, a letter that stands once, and its value; those that are not needed
are left out, and the map comes last:

    sluice1:NONCE
    :gN            while the group is in the generation N in which it was found new
    :tID           the topic's id, so that an offset is not taken for one of a topic made again
    :iBEARER       who wrote it, where workers have names (instances.py)
    :uN            unclean ends at this next offset, the writer's own in advance
    :aN            the offset of the message that runs alone
    :sACCOUNT      what was spent on its account in the last hour (core/admission/accounts.py)
    :EN            the leader epoch of the last message that is finished, map included
    :HN            the log was cut: it ended at N, before what had been read of it
    :mMAP          the completed map (core/completed.py)

A worker keeps the fields whose letters it does not know, for whoever comes after it. A small
letter stands for something that is true whatever is committed next; a capital one is true of the
next offset beside which it was read, and goes when that moves. The map has `MAP_CHARS_MAX`
characters for certain and whatever the fields leave it besides: foreign fields that would take
its part are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from service.core.admission import accounts
from service.core.completed import Damaged, decode, encode
from service.core.tracker import Progress
from service.core.window import MAP_CHARS_MAX
from service.kafka.client import instances
from service.kafka.client.instances import Bearer, bearer

METADATA_CHARS_MAX = 4_096
"""Brokers take this many characters by default (offset.metadata.max.bytes)."""

FIELDS_CHARS_MAX = METADATA_CHARS_MAX - MAP_CHARS_MAX - len(":m")
"""All fields before the map may have this many characters together."""

_METADATA = re.compile(r"sluice1:([0-9a-f]{16})((?::[A-Za-z][!-9;-~]+)*)", re.ASCII)
"""The whole metadata matches this. Values are printable and hold no colon."""

_KNOWN = {
    "g": re.compile("[0-9]{1,10}"),
    "t": re.compile(r"[\w-]{1,64}", re.ASCII),
    "i": instances.TEXT,
    "u": re.compile("[0-9]{1,9}"),
    "a": re.compile("[0-9]{1,19}"),
    "s": accounts.TEXT,
    "E": re.compile("[0-9]{1,10}"),
    "H": re.compile("[0-9]{1,19}"),
    "m": re.compile(".+"),
}
"""The values of our own fields match these, by the field's letter."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A next offset as Kafka holds it for the group."""

    offset: int
    metadata: str


@dataclass(frozen=True, slots=True)
class Others:
    """Fields that we do not know, letter and value each, as they were read beside the offset `at`.

    A newer version has written them: they are written back for as long as they are true.
    """

    fields: tuple[str, ...] = ()
    at: int = 0

    def true_of(self, next_offset: int) -> tuple[str, ...]:
        """Those that may be written beside this offset."""
        moved = next_offset != self.at
        return tuple(each for each in self.fields if each[0].islower() or not moved)


NO_OTHERS = Others()


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in the metadata beside the progress: who wrote it, when, about which topic."""

    nonce: str
    began: int | None = None
    topic_id: str | None = None
    others: Others = NO_OTHERS
    cut_at: int | None = None
    bearer: Bearer | None = None
    """Of a worker with a name (`kafka.group_instance_id`)."""
    leader_epoch: int | None = None


def to_store(progress: Progress, mark: Mark) -> Stored:
    """Offset and metadata; of a completed map that is too long the end is left out."""
    fields = (
        ("g", mark.began),
        ("t", mark.topic_id),
        ("i", None if mark.bearer is None else mark.bearer.text),
        ("u", progress.unclean_ends or None),
        ("a", progress.alone),
        ("s", accounts.written(progress.spent)),
        ("E", mark.leader_epoch),
        ("H", mark.cut_at),
    )
    written = "".join(f":{letter}{value}" for letter, value in fields if value is not None)
    metadata = f"sluice1:{mark.nonce}{written}"
    assert len(metadata) <= FIELDS_CHARS_MAX, "our own fields leave the map too little"
    for other in mark.others.true_of(progress.next_offset):
        if len(metadata) + len(other) < FIELDS_CHARS_MAX:
            metadata += f":{other}"
    encoded = encode(progress.runs, METADATA_CHARS_MAX - len(metadata) - len(":m"))
    return Stored(progress.next_offset, f"{metadata}:m{encoded}" if encoded else metadata)


def read(stored: Stored) -> tuple[Progress, Mark] | None:
    """What `to_store` wrote, in this version or another; None where somebody else did, or it is
    damaged."""
    found = _METADATA.fullmatch(stored.metadata)
    if found is None:
        return None
    fields = found[2].split(":")[1:]
    values = {field[0]: field[1:] for field in fields}
    known = values.keys() & _KNOWN.keys()
    damaged = not all(_KNOWN[letter].fullmatch(values[letter]) for letter in known)
    if damaged or len(values) < len(fields) or ("m" in values and fields[-1][0] != "m"):
        return None
    try:
        runs = decode(values.get("m", ""))
    except Damaged:
        return None
    spent = accounts.read(values["s"]) if "s" in values else ()
    progress = Progress(
        stored.offset, runs, int(values.get("u", 0)), _number(values.get("a")), spent
    )
    unknown = tuple(field for field in fields if field[0] not in _KNOWN)
    others = Others(unknown, stored.offset) if unknown else NO_OTHERS
    began, cut_at = _number(values.get("g")), _number(values.get("H"))
    named = values.get("i")
    by = None if named is None else bearer(named)
    epoch = _number(values.get("E"))
    return progress, Mark(found[1], began, values.get("t"), others, cut_at, by, epoch)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def held_out_for_good(stored: Stored, cut_at: int, nonce: str) -> Stored:
    """What is stored, with the trace that the log was cut, so that it counts for whoever comes."""
    found = read(stored)
    progress, mark = (Progress(stored.offset), Mark(nonce)) if found is None else found
    shortest = cut_at if mark.cut_at is None else min(cut_at, mark.cut_at)
    return to_store(progress, replace(mark, cut_at=shortest))


def reached(progress: Progress) -> int:
    """The offset behind the last message that is finished."""
    return progress.next_offset + sum(progress.runs)
