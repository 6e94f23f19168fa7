"""A broker that dies under load and comes back: waited out, nothing lost, no restart."""

from __future__ import annotations

import asyncio
import signal

from tests.process.conftest import Scene
from tests.support.endpoint import Endpoint, Latency
from tests.support.kafka import Broker
from tests.support.service import service

COUNT = 600


async def test_a_broker_that_dies_and_comes_back(own_broker: Broker) -> None:
    """Killed with -9 for some seconds: the process lives, its liveness probe too, it says that it
    waits for Kafka, and finishes everything by itself."""
    async with Endpoint(latency=Latency(median_s=0.1)) as endpoint:
        scene = Scene(own_broker.bootstrap_servers, endpoint)
        await scene.create_topics()
        await scene.send(*((b"key-%d" % (n % 50), b"Text %d" % n) for n in range(COUNT)))
        environment = {**scene.environment, "SLUICE_LIMITS__CONCURRENCY": "10"}
        async with service(environment) as running:
            await running.until("sluice_messages_finished_total", COUNT / 4)
            await asyncio.to_thread(own_broker.kill)
            async with asyncio.timeout(40):
                while "waiting_for_kafka" not in (await running.get("/readyz"))[1]:
                    await asyncio.sleep(0.2)
            assert (await running.get("/livez"))[0] == 200
            await asyncio.to_thread(own_broker.start)
            async with asyncio.timeout(60):
                while await scene.lag():
                    await asyncio.sleep(0.5)
            running.signal(signal.SIGTERM)
            ended = await running.ended()
        assert ended.code == 0, ended.printed
        assert "Traceback" not in ended.printed
        outcomes = await scene.outcomes()
        assert outcomes.keys() == (await scene.everything()).keys()
        assert await scene.letters() == []
