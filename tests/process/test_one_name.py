"""Two workers of one `kafka.group_instance_id` on a real Kafka: one of them ends and says why."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from service.core.tracker import UNCLEAN_ENDS_MAX
from tests.process.conftest import PARTITIONS, Scene
from tests.support.endpoint import Latency
from tests.support.service import service

COUNT = 60
HOSTS = """
import os
import socket

socket.gethostname = lambda: os.environ["TEST_HOST"]
"""
NAME = "kafka.group_instance_id worker-0"


async def environment(scene: Scene, folder: Path, median_s: float) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(HOSTS)
    scene.endpoint.latency = Latency(median_s=median_s, sigma=0.1)
    await scene.send(*((b"key-%d" % (n % 7), b"Text number %d" % n) for n in range(COUNT)))
    return {
        **scene.environment,
        "SLUICE_KAFKA__GROUP_INSTANCE_ID": "worker-0",
        "SLUICE_LIMITS__CONCURRENCY": "4",
        "PYTHONPATH": str(folder),
        "TEST_HOST": "one",
    }


async def test_a_second_one_on_the_same_machine_does_not_begin(
    scene: Scene, tmp_path: Path
) -> None:
    """It ends as with any wrong setting and names the first one, which goes on undisturbed."""
    given = await environment(scene, tmp_path, median_s=0.1)
    async with service(given) as first:
        await first.until("sluice_messages_finished_total", COUNT / 6)
        async with service(given) as second:
            ended = await second.ended()
        assert ended.code == 2
        assert NAME in ended.printed
        assert str(first.process.pid) in ended.printed
        await first.until("sluice_messages_finished_total", COUNT)
        first.signal(signal.SIGTERM)
        assert (await first.ended()).code == 0
    assert scene.endpoint.total() == COUNT
    assert await scene.outcomes() == await scene.everything()
    # Whoever has ended bears no name any more, in order or not.
    ended = await scene.catch_up(**given)
    assert NAME not in ended.printed


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
async def test_workers_that_push_each_other_out_have_not_died(
    scene: Scene, tmp_path: Path, mode: str
) -> None:
    """On two machines, each started again whenever it ends, and nothing is finished in between:
    each time the earlier one ends and says so, none takes its place back, and no message is
    blamed for it."""
    given = await environment(scene, tmp_path, median_s=20.0)
    given["SLUICE_DELIVERY__MODE"] = mode
    rounds = UNCLEAN_ENDS_MAX + 3
    async with AsyncExitStack() as running:
        holder = await running.enter_async_context(service(given))
        await holder.until("sluice_slots_busy", 1)
        for number in range(rounds):
            if number == rounds - 1:
                scene.endpoint.latency = Latency(median_s=0.02)
            host = {"TEST_HOST": ("two", "one")[number % 2]}
            newcomer = await running.enter_async_context(service(given | host))
            ended = await holder.ended(within_s=40)
            assert ended.code == 2, ended.printed
            assert NAME in ended.printed
            assert "Traceback" not in ended.printed
            holder = newcomer
            if number < rounds - 1:
                await holder.until("sluice_slots_busy", 1)
        try:
            async with asyncio.timeout(60):
                while await scene.lag() > (mode == "exactly_once") * PARTITIONS:
                    await asyncio.sleep(0.3)
        except TimeoutError:
            said = await holder.get("/readyz"), await holder.metrics()
            pytest.fail(f"lag {await scene.lag()}: {said}\n{holder.printed}")
        holder.signal(signal.SIGTERM)
        assert (await holder.ended()).code == 0
    assert await scene.letters() == []
    assert (await scene.outcomes()).keys() == (await scene.everything()).keys()
