"""Streaming on a real Kafka: readers see records of an answer that the model still writes."""

from __future__ import annotations

import json

from tests.chaos.reader import first_complete_sets
from tests.process.conftest import Scene
from tests.support.service import run, service

STREAMING = {
    "SLUICE_EXTRACTION__STREAMING": "true",
    "SLUICE_EXTRACTION__CARDINALITY": "many",
    "SLUICE_DELIVERY__ORDERING": "none",
}
PEOPLE = ", ".join(f"Person{chr(65 + n)} is {n}" for n in range(20))


async def test_records_are_there_before_the_call_has_ended(scene: Scene) -> None:
    """Of a list of 20 a reader sees most while the call runs; then all, the last with the count.
    An answer that is cut half way is closed by a marker and asked for again."""
    await scene.send(
        (b"a", f"{PEOPLE} [[answer piece_ms=15]]".encode()),
        (b"b", f"{PEOPLE} [[cut, answer]]".encode()),
        (b"c", f"{PEOPLE} [[bad_element]]".encode()),
    )
    async with service({**scene.environment, **STREAMING, "SLUICE_LIMITS__CONCURRENCY": "3"}) as it:
        await it.until("sluice_records_published_total", 45)
        while len(early := [r for r in await scene.outputs() if r.key == b"a"]) < 5:
            assert scene.endpoint.in_flight, "the call had ended before"
        still_writing = scene.endpoint.in_flight
        await it.until("sluice_messages_finished_total", 3)
        metrics = await it.metrics()
    assert still_writing == 1
    assert not any("sluice.record.count" in read.header for read in early)
    outputs = await scene.outputs()
    sets = {found[0].key: found for found in first_complete_sets(outputs)}
    assert sets.keys() == {b"a", b"b"}
    for found in sets.values():
        assert [json.loads(read.value or b"")["age"] for read in found] == list(range(20))
        assert found[-1].header["sluice.record.count"] == "20"
        assert int(found[-1].header["sluice.tokens.output"]) > 0
        assert len({read.header["sluice.answer.id"] for read in found}) == 1
    [letter] = await scene.letters()
    markers = [read for read in outputs if "sluice.record.aborted" in read.header]
    assert all(read.value is None for read in markers)
    out = [int(read.header["sluice.record.aborted"]) for read in markers]
    assert len(out) == 4, "one that was cut, and three invalid answers"
    assert letter.header["sluice.error.reason"] == "invalid"
    assert int(letter.header["sluice.records.out"]) == 30
    assert metrics["sluice_records_published_total"] == len(outputs) - len(markers)
    assert metrics["sluice_first_record_seconds_count"] == 4


async def test_it_is_refused_where_it_cannot_hold(scene: Scene) -> None:
    """Exit code 2 and a sentence for what cannot stand together."""
    ended = await run({**scene.environment, **STREAMING, "SLUICE_DELIVERY__ORDERING": "key"}, "run")
    assert ended.code == 2
    assert "don't wait for earlier messages" in ended.printed
