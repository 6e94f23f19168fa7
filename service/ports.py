"""What the pipeline asks of what stands around it: adapters implement these, and import no more.

Rules of this file: protocols and the types in their signatures, nothing that runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from service.core.admission.budgets import Estimate
from service.core.messages import (
    Aborted,
    Batch,
    Extracted,
    Message,
    Outcome,
    Part,
    Partition,
    Publishable,
    Rejected,
)
from service.core.tracker import Given, Progress

Piece: TypeAlias = Part | Extracted | Aborted
"""One step of a set of records that goes out while the model still writes."""

Publish: TypeAlias = Callable[[Part], Awaitable[None]]
"""What an extractor hands records to, one at a time; it waits while Kafka is slow, which is not
the model's time, and raises `OutputTooLarge`, which ends the answer."""


class Assignment(Protocol):
    """What a source tells about the partitions it holds, from within a rebalance."""

    async def revoked(self) -> None:
        """All partitions are in question: finish what is in flight, bounded, and commit it.

        Returns within the rebalance drain plus one bounded commit. Afterwards nothing of these
        partitions is published or committed until `assigned` says whose they are.
        """

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        """These are held now, and no others.

        A partition with the epoch it had before keeps its messages and running calls; one with
        a new epoch starts anew; one that is missing is lost: its calls are cancelled, its
        outcomes neither published nor committed. Called after the restore (offset and completed
        map read, seek done) and before the first message of the new epochs is returned by `poll`.
        """

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        """What Kafka should hold of a partition, once `finishing` has finished too.

        None where it is not held.
        """

    def has_room(self, partition: Partition) -> bool:
        """Whether the completed map surely holds whatever finishes of what was taken until now.

        Quick; where it says no, `progress` tells what the map would be.
        """

    def stored(self, partition: Partition, progress: Progress) -> None:
        """Kafka holds this now; told only while the partition is held as it was when asked."""

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """Every partition of the input topics, whoever holds it, and its lag where it is known."""


class Source(Protocol):
    """Where messages come from."""

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages, none of `closed` partitions; waits briefly for the first.

        With `limit` 0 it takes nothing but still counts as a poll for the group. Messages come
        in offset order within a partition. Raises `Stop` where going on makes no sense.
        """

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store their progress, within a bounded time; raises `CommitFailed`.

        It asks its `Assignment` for it, in the moment in which it is sent, and tells it when it
        is stored.
        """


class Extractor(Protocol):
    """What turns a text into records."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """One call and its re-asks.

        Raises `TransientFailure` or `ServiceFailure`, whose `progress` is handed back at the
        next attempt, so that answers already paid for are not asked for again. Raises `NoRoom`
        where `Admission.again` has no room for a re-ask.
        """

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens of the next call for it."""

    async def probe(self) -> None:
        """One tiny call, the same each time, whose answer nobody reads; raises as `call` does."""


class Streams(Protocol):
    """An extractor that lets go of a record while the model writes the next one."""

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        """As `Extractor.call`; the outcome holds the records that did not go out before."""


class Sink(Protocol):
    """Where outcomes go."""

    async def publish(self, message: Message, outcome: Publishable) -> asyncio.Future[None]:
        """Hand an outcome over; the order of these calls is the order in the log.

        Returns once it is in the producer's hands; the future ends with the acknowledgement
        of all in-sync replicas, or with `PublishFailed` or `OutputTooLarge`, which `publish`
        itself never raises.
        """


class Trace(Protocol):
    """One message's way through the pipeline, as somebody records it."""

    def asking(self) -> AbstractContextManager[None]:
        """Around an attempt: what is told in its task belongs to this message."""

    async def publish(
        self, sink: Sink, message: Message, outcome: Publishable
    ) -> asyncio.Future[None]:
        """The sink's `publish`, whose outputs then name this trace."""

    def ended(self, outcome: Outcome | None) -> None:
        """Its outcome is acknowledged; None: it was let go of or lost, and comes again."""
