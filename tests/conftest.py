"""Brokers for tests: one real Kafka for the whole run, an embedded one for each test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.demo.broker import EmbeddedBroker
from tests.support.kafka import Broker, KafkaUnavailable, RealKafka, find_broker
from tests.support.redis import RealRedis, RedisUnavailable
from tests.support.started import do_without, for_tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m 'not real_kafka'` leaves out whatever asks for the fixture."""
    for item in items:
        if {"real_kafka", "real_broker", "own_broker"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real_kafka)
        if "redis" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_redis)


@pytest.fixture(scope="session")
def real_broker() -> Iterator[Broker]:
    """A real Kafka of our own that lives as long as the run; don't kill it in a test."""
    yield from _broker()


@pytest.fixture(scope="module")
def own_broker() -> Iterator[Broker]:
    """A real Kafka of one test file's own: it may be killed, stopped and started again."""
    yield from _broker()


def _broker() -> Iterator[Broker]:
    yield from for_tests(find_broker, KafkaUnavailable, "TEST_KAFKA")


@pytest.fixture(scope="session")
def real_kafka(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers of a real Kafka: the one in the environment, else our own."""
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    return given or request.getfixturevalue("real_broker").bootstrap_servers


@pytest.fixture
def mock_kafka() -> Iterator[EmbeddedBroker]:
    """A fresh embedded broker, without topics."""
    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def redis() -> Iterator[RealRedis]:
    """A real Redis or Valkey of one test's own; it starts within a few hundredths of a second."""
    yield from for_tests(RealRedis, RedisUnavailable, "TEST_REDIS")


@contextmanager
def hanging(broker: Broker) -> Iterator[None]:
    """The broker's process stands still: connections stay open, nobody answers."""
    if not isinstance(broker, RealKafka):
        do_without("only a broker that is a process of ours can be made to stand still")
    assert broker._process is not None
    os.kill(broker._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker._process.pid, signal.SIGCONT)
