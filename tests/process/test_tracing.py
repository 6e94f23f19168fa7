"""Traces as a user has them: a process, Kafka's headers, an OTLP receiver."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from service.demo.broker import EmbeddedBroker
from service.telemetry.tracing import look_at_collector
from tests.process.conftest import Scene
from tests.support.endpoint import Endpoint
from tests.support.service import run, service
from tests.support.topics import produce, read_topic
from tests.support.traces import receiver

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = ("traceparent", f"00-{TRACE}-{PARENT}-01".encode())


def create_topics(broker: EmbeddedBroker, scene: Scene) -> None:
    for topic in (scene.input, scene.output, scene.dead_letters):
        broker.create_topic(topic, 1)


async def test_a_trace_goes_from_header_to_header(mock_kafka: EmbeddedBroker) -> None:
    """It begins in a producer's header, goes through message, call and publish, and the output's
    header names the publish, an exemplar the trace; all of it is sent before the process ends."""
    async with Endpoint() as endpoint, receiver() as collector:
        scene = Scene(mock_kafka.bootstrap_servers, endpoint)
        create_topics(mock_kafka, scene)
        await produce(scene.servers, scene.input, [b"Ada is 36"], headers=[GIVEN])
        traced = {
            "SLUICE_TELEMETRY__TRACING": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        async with service({**scene.environment, **traced}) as running:
            await running.until("sluice_messages_finished_total", 1)
            _, exposed = await running.get("/metrics", accept="application/openmetrics-text")
            running.signal(signal.SIGTERM)
            assert (await running.ended()).code == 0
        assert f'# {{trace_id="{TRACE}"}}' in exposed
        message, call, send = map(collector.named, ("process", "chat", "send"))
        assert {bytes.fromhex(TRACE)} == {span.trace_id for span in collector.spans}
        assert bytes.fromhex(PARENT) == message.parent_span_id
        assert message.span_id == call.parent_span_id == send.parent_span_id
        assert message.start_time_unix_nano <= call.start_time_unix_nano
        assert {"sluice"} == collector.services
        [output] = await read_topic(scene.servers, scene.output)
        named = [value for name, value in output.headers if name == "traceparent"]
        assert named == [f"00-{TRACE}-{send.span_id.hex()}-01".encode()]


async def test_without_a_collector_messages_go_on(mock_kafka: EmbeddedBroker) -> None:
    """Nobody takes the spans: the run ends well, and its log says that they are lost. Three
    seconds of it are the bound itself, which the exporter's own thread must not outlast."""
    async with Endpoint() as endpoint:
        scene = Scene(mock_kafka.bootstrap_servers, endpoint)
        create_topics(mock_kafka, scene)
        await scene.send(b"Ada is 36")
        ended = await scene.catch_up(
            SLUICE_TELEMETRY__TRACING="true",
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        )
        assert len(await scene.outputs()) == 1
        assert "could not be sent" in ended.printed
        assert "Ada" not in ended.printed


async def test_check_asks_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sluice check` says whether somebody takes spans, and sends none."""
    async with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        assert await look_at_collector() == ("a collector takes spans",)
        assert collector.spans == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("service.telemetry.tracing.CHECK_TIMEOUT_S", 0.2)
    _, besides = await look_at_collector()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in besides


async def test_a_missing_package_is_a_sentence(tmp_path: Path) -> None:
    """Switched on without the extra: exit code 2, and what to install."""
    absent = "raise ModuleNotFoundError('no opentelemetry here')"
    package = tmp_path / "opentelemetry"
    package.mkdir()
    (package / "__init__.py").write_text(absent)
    ended = await run(
        {
            "PYTHONPATH": str(tmp_path),
            "SLUICE_TELEMETRY__TRACING": "true",
            "SLUICE_INPUT__TOPICS": "in",
            "SLUICE_OUTPUT__TOPIC": "out",
            "SLUICE_EXTRACTION__MODEL": "m",
            "SLUICE_EXTRACTION__RECORD": "service.demo.records:Person",
        },
        "run",
    )
    assert ended.code == 2
    assert "pip install 'kafka-sluice[tracing]'" in ended.printed
    assert "Traceback" not in ended.printed
