"""The way of a message: poll, window, admission, call, lane, publish, finish, commit."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

from service.core.messages import Batch, Extracted, Message, Outcome, Partition, Rejected


class Assignment(Protocol):
    """What a source tells about the partitions it holds, from within a rebalance."""

    async def revoked(self) -> None:
        """All partitions are in question: finish what is in flight, bounded, and commit it.

        Returns within the rebalance drain plus one bounded commit. Afterwards nothing of these
        partitions is published or committed until `assigned` says whose they are.
        """

    def assigned(self, epochs: Mapping[Partition, int]) -> None:
        """These are held now, and no others.

        A partition with the epoch it had before keeps its messages and running calls; one with
        a new epoch starts anew; one that is missing is lost: its calls are cancelled, its
        outcomes neither published nor committed. Called after the restore (offset read, seek
        done) and before the first message of the new epochs is returned by `poll`.
        """


class Source(Protocol):
    """Where messages come from."""

    async def poll(self, limit: int, closed: AbstractSet[Partition]) -> Batch:
        """At most `limit` messages, none of `closed` partitions; waits briefly for the first.

        With `limit` 0 it takes nothing but still counts as a poll for the group. Messages come
        in offset order within a partition. Raises `Stop` where going on makes no sense.
        """

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Store next offsets, within a bounded time; raises `CommitFailed`."""


class Extractor(Protocol):
    """What turns a text into records."""

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """One call and its re-asks.

        Raises `TransientFailure` or `ServiceFailure`, whose `progress` is handed back at the
        next attempt, so that answers already paid for are not asked for again.
        """


class Sink(Protocol):
    """Where outcomes go."""

    async def publish(self, message: Message, outcome: Outcome) -> Awaitable[None]:
        """Hand an outcome over; the order of these calls is the order in the log.

        Returns once it is in the producer's hands; the awaitable ends with the acknowledgement
        of all in-sync replicas, or raises `PublishFailed` or `OutputTooLarge`.
        """
