"""A broker whose disk lost the end of a log: held until a person says so, and then nothing lost."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.process.conftest import Scene
from tests.support import topics
from tests.support.endpoint import Endpoint, Latency
from tests.support.kafka import Broker, RealKafka
from tests.support.service import Service, run, service


def texts(word: str, count: int) -> list[tuple[bytes, bytes]]:
    return [(b"k", f"{word} {n}".encode()) for n in range(count)]


async def until_it_says(running: Service, words: str) -> str:
    async with asyncio.timeout(60):
        while words not in (body := (await running.get("/readyz"))[1]):
            await asyncio.sleep(0.2)
    return body


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
async def test_new_messages_under_the_offsets_of_lost_ones_are_not_passed_over(
    own_broker: Broker, mode: str
) -> None:
    """100 were read, the log ends at 60, 60 new ones come: it says so and waits, over a restart
    too; told to start over it reads the 60 new ones, and asks for no old one again."""
    if not isinstance(own_broker, RealKafka):
        pytest.skip("the data of a container is out of reach")
    async with Endpoint(latency=Latency(median_s=0.01)) as endpoint:
        scene = Scene(own_broker.bootstrap_servers, endpoint)
        environment = {**scene.environment, "SLUICE_DELIVERY__MODE": mode}
        await scene.create_topics(1)
        await scene.send(*texts("old", 60))
        await scene.send(*texts("lost", 40))
        async with service(environment) as running:
            await running.until("sluice_messages_finished_total", 100)
            async with asyncio.timeout(20):
                while await scene.lag():
                    await asyncio.sleep(0.1)
            await asyncio.to_thread(own_broker.kill)
            own_broker.cut_log(scene.input, 0, 60)
            await asyncio.to_thread(own_broker.start)
            said = await until_it_says(running, "the log ends at 60")
            assert f"{scene.input}[0] has been read up to offset 100" in said
            async with asyncio.timeout(20):
                while ":H60" not in (await stored(scene))[1]:
                    await asyncio.sleep(0.1)
            await scene.send(*texts("new", 60))
            await until_it_says(running, "has grown since")
            running.signal(signal.SIGTERM)
            assert (await running.ended()).code == 0
        assert (await stored(scene))[0] == 100
        for command in (["check"], ["run", "--until-caught-up"]):
            ended = await run(environment, *command)
            assert ended.code == 1, ended.printed
            assert "the log ends at 60, and has grown since" in ended.printed
            assert "`sluice run --start-over`, which reads it from 60" in ended.printed
        assert endpoint.total() == 100
        ended = await run(environment, "run", "--until-caught-up", "--start-over")
        assert ended.code == 0, ended.printed
        assert endpoint.total() == 160
        assert (await scene.outcomes()).keys() == (await scene.everything()).keys()
        assert await scene.lag() == 0


async def test_a_cut_that_nobody_saw_is_found_by_the_leaders_epoch(own_broker: Broker) -> None:
    """The log is cut and has grown past the old offset before a worker starts again."""
    if not isinstance(own_broker, RealKafka):
        pytest.skip("the data of a container is out of reach")
    async with Endpoint(latency=Latency(median_s=0.01)) as endpoint:
        scene = Scene(own_broker.bootstrap_servers, endpoint)
        await scene.create_topics(1)
        await scene.send(*texts("old", 60))
        await scene.send(*texts("lost", 40))
        await scene.catch_up()
        assert ":E" in (await stored(scene))[1]
        await asyncio.to_thread(own_broker.kill)
        own_broker.cut_log(scene.input, 0, 60)
        await asyncio.to_thread(own_broker.start)
        await scene.send(*texts("new", 60))
        ended = await run(scene.environment, "run", "--until-caught-up")
        assert ended.code == 1, ended.printed
        assert "read up to offset 100, but the log ends at 60, and has grown" in ended.printed
        assert endpoint.total() == 100
        ended = await run(scene.environment, "run", "--until-caught-up", "--start-over")
        assert ended.code == 0, ended.printed
        assert endpoint.total() == 160
        assert (await scene.outcomes()).keys() == (await scene.everything()).keys()


async def stored(scene: Scene) -> tuple[int, str]:
    return (await topics.committed(scene.servers, scene.group, scene.input, 1))[0]
