"""The protocols between the pipeline and its adapters, which import nothing else of the pipeline.

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
"""What is published for a streamed answer: one record, the last ones, or the marker that aborts the
answer."""

Publish: TypeAlias = Callable[[Part], Awaitable[None]]
"""An extractor hands records to this function, one at a time. It waits while Kafka is slow; that
time does not count as the model's. It raises `OutputTooLarge`, which ends the answer."""


class Assignment(Protocol):
    """The pipeline as its source sees it: the source tells it which partitions are held, from
    within a rebalance, and asks it what to store."""

    async def revoked(self) -> None:
        """A rebalance has begun: finish what is in flight, within a bound, and commit it.

        Returns within the rebalance drain plus one bounded commit. Afterwards nothing of these
        partitions is published or committed until `assigned` says which of them we hold.
        """

    def assigned(self, given: Mapping[Partition, Given]) -> None:
        """Exactly these partitions are held now.

        A partition with the epoch it had before keeps its messages and running calls. A partition
        with a new epoch starts anew. One that is missing is lost: its calls are cancelled, and its
        outcomes are neither published nor committed. The source calls this after the restore
        (offset and completed map read, seek done) and before `poll` returns the first message of a
        new epoch.
        """

    def progress(
        self, partition: Partition, finishing: frozenset[int] = frozenset()
    ) -> Progress | None:
        """The progress to store for a partition, as it is once `finishing` has finished too.

        None where the partition is not held.
        """

    def has_room(self, partition: Partition) -> bool:
        """Whether the completed map surely has room, whichever of the messages taken until now
        finish.

        It takes no time. Where it returns False, `progress` tells what the map would be.
        """

    def stored(self, partition: Partition, progress: Progress) -> None:
        """Kafka holds this progress now. The source calls it only where the partition is still held
        under the epoch for which it asked `progress`."""

    def seen(self, lags: Mapping[Partition, int | None]) -> None:
        """The source has read the lags: `lags` names every partition of the input topics, ours and
        those of others; None: the lag is not known."""


class Source(Protocol):
    """Where messages come from."""

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages, none of `closed` partitions; waits briefly for the first.

        With `limit` 0 it takes nothing but still counts as a poll for the group. Messages come
        in offset order within a partition. Raises `Stop` where going on makes no sense.
        """

    async def commit(self, partitions: AbstractSet[Partition]) -> None:
        """Store the progress of these partitions, within a bounded time; raises `CommitFailed`.

        The source asks its `Assignment` for the progress in the moment in which it sends it, and
        tells the `Assignment` what is stored.
        """


class Extractor(Protocol):
    """Turns a text into records."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """One call and its re-asks.

        Raises `TransientFailure` or `ServiceFailure`, whose `progress` is handed back at the
        next attempt, so that answers already paid for are not asked for again. Raises `NoRoom`
        where `Admission.again` has no room for a re-ask.
        """

    def route(self, progress: object | None) -> str:
        """The route of the next call for a message; without progress, that of its first call."""

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens and the route of the next call for this text."""

    async def probe(self, route: str) -> None:
        """One tiny call on a route, the same each time, whose answer is not read; raises as `call`
        does."""


class Streams(Protocol):
    """An extractor that publishes a record while the model writes the next one."""

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        """As `Extractor.call`; the outcome holds only the records that are not published yet."""


class Sink(Protocol):
    """Where outcomes go."""

    async def publish(self, message: Message, outcome: Publishable) -> asyncio.Future[None]:
        """Hand an outcome over; the order of these calls is the order in the log.

        Returns once it is in the producer's hands; the future ends with the acknowledgement
        of all in-sync replicas, or with `PublishFailed` or `OutputTooLarge`, which `publish`
        itself never raises.
        """


class Trace(Protocol):
    """The recording of one message's way through the pipeline."""

    def asking(self) -> AbstractContextManager[None]:
        """A context for one attempt: the events of its task belong to this message."""

    async def publish(
        self, sink: Sink, message: Message, outcome: Publishable
    ) -> asyncio.Future[None]:
        """Calls the sink's `publish` so that the outputs name this trace."""

    def ended(self, outcome: Outcome | None) -> None:
        """The outcome is acknowledged. None: the message was let go or lost, and will be delivered
        again."""
