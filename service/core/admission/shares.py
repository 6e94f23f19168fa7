"""One budget for all workers, without a place where they could meet.

Each worker takes the part of it that its partitions have in all partitions of the input topics,
weighted by their lag where that is known. All of them see the same lags in Kafka, a few seconds
apart, so that the parts come to one. Budgets are drawn in proportion to the lags, which keeps the
proportion between the lags as it is, and so the parts.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from service.core.messages import Partition

EVEN_SHARE = 0.05
"""Of the budget, spread over all partitions alike: so a worker whose partitions are empty can
start on what arrives before its next look, and a lone backlog still gets 95 %."""


def share(held: AbstractSet[Partition], lags: Mapping[Partition, int | None]) -> float:
    """Our part of a budget, 0 to 1. `lags` names every partition of the input topics.

    Without it (nothing was heard of them yet) all of it is ours. A partition whose lag is not
    known counts as the mean of the others. The parts of workers that hold every partition once
    add up to 1.
    """
    if not lags:
        return 1.0
    ours = sum(partition in held for partition in lags)
    even = ours / len(lags)
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
