"""One short mixed round on a real cluster; the long ones are `python -m tests.chaos`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.rounds import PLANS, play
from tests.support.cluster import Cluster
from tests.support.kafka import KafkaUnavailable
from tests.support.started import for_tests

SEED = 4


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    yield from for_tests(Cluster, KafkaUnavailable, "TEST_KAFKA")


@pytest.mark.real_kafka
@pytest.mark.timeout(240)
async def test_a_short_round(cluster: Cluster) -> None:
    """A worker killed, one restarted, one a zombie, a broker killed and back, connections cut, a
    storm of 429: nothing is lost, nothing comes twice to the reader, nothing out of order, nothing
    is asked again that Kafka had stored as finished, and all is at work within 30 s of each."""
    plan = PLANS["short"]
    row = await play("short", plan, cluster, seed=SEED, say=print)
    assert row.broken == [], row.folder
    assert {struck.kind for struck, _ in row.report.recoveries} >= {*plan.kinds}
    assert row.report.messages > 1000
