"""The budget of tokens holds whatever the texts are made of."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest

from service.core.admission.admission import Meter
from service.core.admission.budgets import Allowance, Budget, Estimate
from service.core.messages import Extracted
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.endpoint import MODEL, Asked, Endpoint, Step

pytestmark = pytest.mark.usefixtures("certificates_read_once")

PER_MINUTE = 20_000
MINUTES = 5

_TOKEN = re.compile(r" ?[^\W\d]{1,6}|\d{1,3}|[^\w\s]+|\s+")
"""About what a tokenizer makes of a text: pieces of words, digits by threes, runs of signs."""


def tokens_of(text: str) -> int:
    return sum(1 + len(piece.encode()) // 8 for piece in _TOKEN.findall(text))


def csv(draw: random.Random) -> str:
    rows = ([f'"{draw.choice("abc")}{draw.random():.3f}"' for _ in range(6)] for _ in range(40))
    return "\n".join(",".join(row) for row in rows)


def pretty_json(draw: random.Random) -> str:
    value = [{"name": f"n{draw.randrange(999)}", "tags": ["a", "b"], "at": 1} for _ in range(15)]
    return json.dumps(value, indent=4)


def short(draw: random.Random) -> str:
    return f"Bo is {draw.randrange(90)}"


def cyrillic(draw: random.Random) -> str:
    words = ("заказ", "не", "пришёл", "вовремя", "прошу", "вернуть", "деньги")
    return " ".join(draw.choice(words) for _ in range(120))


def mixed(draw: random.Random) -> str:
    return draw.choice((csv, pretty_json, short, cyrillic))(draw)


class Clocked(Meter):
    """A budget on a clock of the test's own, charged as the pipeline does, and what was used."""

    def __init__(self) -> None:
        self.now_s, self.used_tokens = 0.0, 0
        self.budget = Budget(PER_MINUTE, smallest_burst=1.0)

    def admit(self, extractor: OpenAIExtractor, text: str) -> None:
        """Waits as admission does, which asks anew each time."""
        while True:
            estimate = extractor.estimate(text, None)
            wait_s = self.budget.wait_s(self.now_s, estimate.tokens, estimate.tokens_max)
            if wait_s <= 0:
                break
            self.now_s += wait_s
        self.budget.take(self.now_s, estimate.tokens, estimate.tokens_max)

    def again(self, now_s: float, estimate: Estimate) -> bool:
        raise AssertionError("nothing is asked again")

    def used(self, now_s: float, estimate: Estimate, tokens: int) -> None:
        self.used_tokens += tokens
        self.budget.correct(self.now_s, estimate.tokens, tokens)

    def told(self, now_s: float, allowance: Allowance) -> None:
        raise AssertionError("the endpoint says nothing of limits")

    def answered(self, now_s: float, route: str) -> None:
        raise AssertionError("nothing is asked again")


@pytest.mark.parametrize("text_of", [csv, pretty_json, short, cyrillic, mixed])
async def test_the_budget_is_not_overdrawn(
    endpoint: Endpoint, text_of: Callable[[random.Random], str]
) -> None:
    """At most 1.02 of it over five minutes, and nearly all of it."""
    draw = random.Random(11)

    def script(asked: Asked) -> Step:
        said = "".join(message["content"] for message in asked.body["messages"])
        usage = {"prompt_tokens": tokens_of(said), "completion_tokens": 12}
        message = {"role": "assistant", "content": '{"name": "Bo", "age": 5}'}
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        return Step("given", body=json.dumps(body).encode())

    endpoint.script = script
    meter = Clocked()
    settings = Settings(extraction={"model": MODEL}, limits={"tokens_per_minute": PER_MINUTE})
    extractor = OpenAIExtractor(settings, lambda _: None, meter)
    await extractor.start()
    try:
        while meter.now_s < 60 * MINUTES:
            text = text_of(draw)
            meter.admit(extractor, text)
            assert isinstance(await extractor.call(text, None), Extracted)
    finally:
        await extractor.stop()
    share = meter.used_tokens / (PER_MINUTE * meter.now_s / 60)
    assert 0.97 <= share <= 1.02, f"{text_of.__name__}: {share:.3f} of the budget"
