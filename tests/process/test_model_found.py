"""Which model is asked where the settings name none; needs no Kafka."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.support.endpoint import Endpoint
from tests.support.service import run, service

NOWHERE = {"SLUICE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1", "OPENAI_API_KEY": "test"}
DOWN = "http://127.0.0.1:9/v1"


async def test_several_models_end_the_start_with_their_names() -> None:
    """Exit code 2 and a sentence, from `run` and from `check`, before Kafka is asked for."""
    async with Endpoint(models=("small", "large")) as endpoint:
        environment = {**NOWHERE, "OPENAI_BASE_URL": endpoint.url}
        for command in ("run", "check"):
            ended = await run(environment, command)
            assert ended.code == 2, ended.printed
            assert "extraction.model is not set" in ended.printed
            assert "small, large" in ended.printed
            assert "Traceback" not in ended.printed


async def test_a_limit_of_dollars_without_a_price_ends_the_start() -> None:
    """Exit code 2; the sentence names the ways out."""
    async with Endpoint() as endpoint:
        environment = {
            **NOWHERE,
            "OPENAI_BASE_URL": endpoint.url,
            "SLUICE_LIMITS__SPEND_USD_PER_HOUR": "1",
        }
        ended = await run(environment, "run")
        assert ended.code == 2, ended.printed
        assert "prices: {scripted: gateway}" in ended.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_endpoint_that_is_down_is_waited_for(number: signal.Signals) -> None:
    """Alive and not ready, until it is told to stop."""
    async with service({**NOWHERE, "OPENAI_BASE_URL": DOWN}) as running:
        async with asyncio.timeout(30):
            while "The start waits for it" not in running.printed:
                assert running.process.returncode is None, running.printed
                await asyncio.sleep(0.05)
        assert (await running.get("/livez"))[0] == 200
        assert (await running.get("/readyz"))[0] == 503
        running.signal(number)
        ended = await running.ended(within_s=20)
    assert "Traceback" not in ended.printed
    assert ended.code in (0, 130), ended.printed
