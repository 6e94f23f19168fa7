"""How a reader of the output sees every message once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar


class Record(Protocol):
    """A record of the output topic; `header` holds its headers as text."""

    @property
    def header(self) -> Mapping[str, str]: ...


R = TypeVar("R", bound=Record)


def first_complete_sets(records: Iterable[R]) -> Iterator[list[R]]:
    """For each message the records of one answer of the model: the first that is there whole.

    After a crash a message may be asked again, and another answer may hold other records. All
    records of one answer carry its `sluice.answer.id` and say how many they are; of an answer
    that was published while it was written, only the last one does. An answer that was given up
    is closed by a marker, or by nothing: it is never whole. `records` come in the order of their
    partition; sets come out in the order in which they were complete.
    """
    waiting: dict[str, dict[int, R]] = {}
    counts: dict[str, int] = {}
    seen: set[tuple[str | None, str]] = set()
    for record in records:
        header = record.header
        # A topic that is made again repeats its offsets, and with them the ids.
        message = header.get("sluice.source.topic.id"), header["sluice.id"].rpartition(":")[0]
        answer = header["sluice.answer.id"]
        if message in seen:
            continue
        if "sluice.record.aborted" in header:
            waiting.pop(answer, None)
            continue
        found = waiting.setdefault(answer, {})
        found[int(header["sluice.record.index"])] = record
        if "sluice.record.count" in header:
            counts[answer] = int(header["sluice.record.count"])
        if len(found) == counts.get(answer):
            seen.add(message)
            yield [found[index] for index in sorted(found)]
