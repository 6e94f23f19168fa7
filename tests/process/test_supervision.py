"""What is found from outside of the consumer ends or heals the process as a user runs it."""

from __future__ import annotations

import asyncio

from tests.process.conftest import Scene
from tests.support import topics
from tests.support.service import service


async def test_a_topic_made_again_ends_the_process_with_a_sentence(scene: Scene) -> None:
    """Within two looks; until then it is alive, and no offset of the old log is stored."""
    await scene.send(b"Ada is 36")
    async with service(scene.environment) as running:
        await running.until("sluice_messages_finished_total", 1)
        await running.until("sluice_look_age_seconds", 0.1)
        assert (await running.metrics())["sluice_input_partitions"] == 6
        assert (await running.get("/livez"))[0] == 200
        async with topics.admin(scene.servers) as client:
            await client.delete_topics([scene.input])
        await asyncio.sleep(0.5)
        await topics.create_topic(scene.servers, scene.input, 6)
        ended = await running.ended()
    assert ended.code == 1, ended.printed
    assert f"Topic {scene.input} was deleted" in ended.printed
    assert await topics.committed(scene.servers, scene.group, scene.input, 6) == {}
