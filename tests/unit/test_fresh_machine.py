"""On a machine with Python alone, tests that need more are skipped with a reason: none fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import prometheus
from tests.support.kafka import KafkaUnavailable, RealKafka


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program on the path, and no cache of what was fetched before."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_no_java_is_a_kafka_that_cannot_be_had() -> None:
    """A broker with settings of its own says so too, instead of failing to find a program."""
    with pytest.raises(KafkaUnavailable, match="Java"), RealKafka():
        pass


def test_no_debian_is_a_prometheus_that_cannot_be_had() -> None:
    """Neither on the path nor to be unpacked."""
    with pytest.raises(prometheus.PrometheusUnavailable, match="on the path"):
        prometheus.tool("promtool")


def test_a_package_without_the_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 13 has promtool in another package than Debian 12: what is missing is named."""
    monkeypatch.setattr(prometheus, "_unpack_debians", lambda folder: folder.mkdir(parents=True))
    with pytest.raises(prometheus.PrometheusUnavailable, match="no promtool here"):
        prometheus.tool("promtool")
