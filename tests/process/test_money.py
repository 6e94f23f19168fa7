"""Two models, their prices and what they cost, from the settings to Kafka and the last line."""

from __future__ import annotations

from tests.process.conftest import Scene

PRICES = '{"small": {"input": 1, "output": 2}, "large": {"input": 10, "output": 20}}'


async def test_a_cascade_is_priced_from_settings_to_headers(scene: Scene) -> None:
    """The one that answered and the cost of all stand on record and dead letter; their sum is in
    the last line. On a real Kafka, because settings, headers and summary meet only there."""
    scene.endpoint.models = ("small", "large")
    await scene.send(
        b"Ada is 36 [[small: refuse; large: answer cached=5 reasoning=2]]",
        b"Bo is 5 [[small: refuse; large: refuse]]",
    )
    ended = await scene.catch_up(SLUICE_EXTRACTION__MODEL="small,large", SLUICE_PRICES=PRICES)
    [record] = await scene.outputs()
    [letter] = await scene.letters()
    assert (record.header["sluice.model"], record.header["sluice.cached"]) == ("large", "false")
    assert record.header["sluice.tokens.cached"] == "5"
    assert record.header["sluice.tokens.reasoning"] == "2"
    assert letter.header["sluice.model"] == "large"
    assert "small: refused: " in letter.header["sluice.error.detail"]
    costs = [float(one.header["sluice.cost.usd"]) for one in (record, letter)]
    assert min(costs) > 0
    assert f"{sum(costs):.4f} USD" in ended.printed
