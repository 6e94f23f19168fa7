"""Shares: all workers divide one budget among them without talking to each other.

Each worker takes the share that its partitions have among all partitions of the input topics,
weighted by their lag where that is known. All workers see the same lags in Kafka, at most a few
seconds apart, so their shares add up to 1. Each backlog shrinks in proportion to its lag, so the
proportions between the lags, and with them the shares, stay nearly the same.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from service.core.messages import Partition

EVEN_SHARE = 0.05
"""The part of the budget that is spread evenly over all partitions. With it a worker whose
partitions are empty can call for new messages before it reads the lags again, and a single
partition with a backlog still gets 95 %."""


def even_share(held: AbstractSet[Partition], all_of_them: Collection[Partition]) -> float:
    """The share of all partitions that we hold; 1 while the partitions are not known."""
    if not all_of_them:
        return 1.0
    return sum(partition in held for partition in all_of_them) / len(all_of_them)


def share(held: AbstractSet[Partition], lags: Mapping[Partition, int | None]) -> float:
    """Our share of a budget, 0 to 1. `lags` names every partition of the input topics.

    While `lags` is empty (not read yet) the whole budget is ours. A partition whose lag is not
    known counts as the mean of the others. Where each partition is held by one worker, the shares
    of all workers add up to 1.
    """
    if not lags:
        return 1.0
    even = even_share(held, lags)
    weights = _weights(lags)
    total = sum(weights.values())
    if not total:
        return even
    weighted = sum(weight for partition, weight in weights.items() if partition in held) / total
    return EVEN_SHARE * even + (1 - EVEN_SHARE) * weighted


def _weights(lags: Mapping[Partition, int | None]) -> dict[Partition, float]:
    known = [lag for lag in lags.values() if lag is not None]
    mean = sum(known) / len(known) if known else 0.0
    return {partition: mean if lag is None else lag for partition, lag in lags.items()}
