"""Offsets of a group that no transaction can change; the rest is in test_transactions.py."""

from __future__ import annotations

import pytest
from aiokafka.protocol.commit import OffsetFetchRequest_v3

from service.core.messages import Partition
from service.demo.broker import EmbeddedBroker
from service.kafka.client import stable_offsets as module
from service.kafka.client.stable_offsets import stable_offsets
from service.kafka.client.stored import Stored
from tests.support.sources import Kafka
from tests.support.topics import admin


async def test_a_broker_that_knows_no_stable_offsets_is_asked_as_before(
    mock_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Kafka 2.5; there is nothing better to ask for."""
    asked: list[object] = []
    build = module._Offsets.build

    def noted(request: module._Offsets, version: object) -> object:
        asked.append(version)
        return build(request, version)

    monkeypatch.setattr(module._Offsets, "build", noted)
    kafka = Kafka(mock_kafka.bootstrap_servers, mock_kafka)
    topic = await kafka.topic(2)
    await kafka.store("g", topic, {0: 5}, "noted")
    first, second = Partition(topic, 0), Partition(topic, 1)
    async with admin(kafka.servers) as client:
        found = await stable_offsets(client, "g", {first, second})
    assert found == {first: Stored(5, "noted"), second: None}
    assert asked == [OffsetFetchRequest_v3]
