"""The cache as a user has it: a process that is killed, and one that goes on from Redis."""

from __future__ import annotations

import signal

from tests.process.conftest import Scene
from tests.support.redis import RealRedis
from tests.support.service import service

TEXTS = 40


async def test_a_replay_after_kill_9_costs_nothing(scene: Scene, redis: RealRedis) -> None:
    """Answers that wait in a lane behind a hanging call are paid for and not published: after a
    kill -9 each of them comes from the store, and only what had no answer is asked again."""
    cached = {"SLUICE_CACHE__MODE": "redis", "SLUICE_CACHE__REDIS_URL": redis.url}
    patient = {**cached, "SLUICE_CACHE__REDIS_TIMEOUT_S": "5"}  # a busy machine is no outage
    await scene.send((b"k", b"Slow Sam is 1 [[hang, answer]]"))
    await scene.send(*((b"k", b"Ada is %d" % n) for n in range(TEXTS)))
    async with service({**scene.environment, **patient}) as running:
        await running.until("sluice_messages_waiting_in_lane", TEXTS)
        running.signal(signal.SIGKILL)
        await running.ended()
    assert await scene.outputs() == []
    assert scene.endpoint.total() == 1 + TEXTS
    await scene.catch_up(**patient)
    assert scene.endpoint.total() == 2 + TEXTS
    assert await scene.outcomes() == await scene.everything()
    first, *others = [record.header for record in await scene.outputs()]
    assert first["sluice.tokens.input"] != "0"
    assert {header["sluice.tokens.input"] for header in others} == {"0"}
    assert len({header["sluice.answer.id"] for header in others}) == TEXTS
    assert {header["sluice.cached"] for header in others} == {"true"}
