"""What a call costs, and what the endpoint says of its tokens."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from service.llm.answers import read_usage
from service.llm.prices import Tokens, bill, cost_of, told_cost
from service.settings import Price, ToldPrice

OPENAI = "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (None, Tokens()),
        ({"prompt_tokens": 10, "completion_tokens": 4}, Tokens(10, 4)),
        ({"prompt_tokens": "many", "completion_tokens": -3, "total_tokens": None}, Tokens()),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "total_tokens": 14,
                "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            Tokens(10, 4, 8, 3),
        ),
        (
            {"prompt_tokens": 10, "completion_tokens": 4, "prompt_cache_hit_tokens": 6},
            Tokens(10, 4, 6),
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "total_tokens": 44,
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
            Tokens(10, 34, 0, 30),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 20}, Tokens(10, 10, 0, 6)),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 99},
                "completion_tokens_details": {"reasoning_tokens": 99},
            },
            Tokens(10, 4, 10, 4),
        ),
        ({"prompt_tokens": 10, "prompt_tokens_details": [], "completion_tokens": 1}, Tokens(10, 1)),
    ],
)
def test_tokens_by_kind_however_they_are_told(usage: object, tokens: Tokens) -> None:
    """OpenAI's details, DeepSeek's own name, reasoning beside the completion (xAI, Gemini), and
    nonsense; parts are never more than their whole."""
    assert read_usage(usage) == tokens


def test_public_prices_come_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known models at their provider's URL have a price, without a look at the network."""

    def no_network(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    cost = cost_of("gpt-4o-mini", {}, OPENAI)
    assert cost is not None
    assert cost(Tokens(1000, 100, 500)) == pytest.approx(0.0001725)
    assert cost_of("never-heard-of", {}, OPENAI) is None
    assert cost_of("gpt-4o-mini", {}, "https://gateway.example.org/v1") is None


def test_own_prices_win() -> None:
    """For a million tokens; cached ones as the input where they have no price of their own."""
    own = {"gpt-4o-mini": Price(input=2, output=4), "free": Price(input=0, output=0)}
    cost = cost_of("gpt-4o-mini", own, OPENAI)
    assert cost is not None
    assert cost(Tokens(1_000_000, 500_000, 250_000)) == pytest.approx(4.0)
    free = cost_of("free", own, OPENAI)
    assert bill(Tokens(5, 5), free).cost_usd == 0.0
    assert bill(Tokens(5, 5), None).cost_usd is None


@pytest.mark.parametrize(
    "url",
    ["http://localhost:8000/v1", "http://10.0.0.7/v1", "http://[::1]/v1", "http://model:8080/v1"],
)
def test_nothing_is_looked_up_for_a_machine_of_ones_own(url: str) -> None:
    """No public price counts there, and the library, slow to import, is left alone."""
    code = (
        "import sys\n"
        "from service.llm.prices import cost_of\n"
        f"assert cost_of('gpt-4o-mini', {{}}, {url!r}) is None\n"
        "assert 'genai_prices' not in sys.modules\n"
    )
    if url.endswith("8000/v1"):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert cost_of("gpt-4o-mini", {}, url) is None


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 60},
            },
            Tokens(100, 4, 10, 0, 60),
        ),
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 4,
                "cache_read_input_tokens": 10,
                "cache_creation_input_tokens": 60,
            },
            Tokens(100, 4, 10, 0, 60),
        ),
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 90, "cache_creation_tokens": 60},
            },
            Tokens(100, 4, 90, 0, 10),
        ),
    ],
)
def test_what_was_written_to_the_cache_is_told_apart(usage: object, tokens: Tokens) -> None:
    """In the words of OpenAI, OpenRouter, LiteLLM and Anthropic; never more than is left."""
    assert read_usage(usage) == tokens


def test_cache_writes_are_priced() -> None:
    """By one's own price, as the input without one; and by the library's, where it has one."""
    told = Tokens(1_000_000, 0, 200_000, 0, 300_000)
    own = {"a": Price(input=2, cached=1, cache_write=4, output=0), "b": Price(input=2, output=0)}
    assert cost_of("a", own, OPENAI)(told) == pytest.approx(1.0 + 0.2 + 1.2)
    assert cost_of("b", own, OPENAI)(told) == pytest.approx(2.0)
    listed = cost_of("gpt-6-luna", {}, OPENAI)
    plain, written = listed(Tokens(100_000, 0)), listed(Tokens(100_000, 0, 0, 0, 100_000))
    assert written == pytest.approx(1.25 * plain)


def test_the_tier_that_answered_is_priced() -> None:
    """Half for flex, twice for priority; one that is not known costs what is usual."""
    cost = cost_of("gpt-6-luna", {}, OPENAI)
    usual = cost(Tokens(1000, 100))
    assert cost(Tokens(1000, 100), "flex") == pytest.approx(usual / 2)
    assert cost(Tokens(1000, 100), "priority") == pytest.approx(usual * 2)
    assert cost(Tokens(1000, 100), "default") == cost(Tokens(1000, 100), "odd") == usual


@pytest.mark.parametrize(
    "tokens",
    [Tokens(5, 1, 9), Tokens(5, 1, 3, 0, 9), Tokens(0, 0, 3, 3, 3), Tokens(20_000_000, 20_000_000)],
)
@pytest.mark.parametrize("model", ["gpt-6-luna", "gpt-4o-mini", "own"])
def test_no_usage_is_too_odd_for_a_bill(model: str, tokens: Tokens) -> None:
    """The library raises where the cache is more than the input; a bill never does, and is never
    below nothing."""
    cost = cost_of(model, {"own": Price(input=1, cached=0, output=1)}, OPENAI)
    cost_usd = bill(tokens, cost).cost_usd
    assert cost_usd is None if tokens[:2] == (0, 0) else cost_usd is not None and cost_usd >= 0.0


@pytest.mark.parametrize(
    ("value", "cost_usd"),
    [
        ("0.00012", 0.00012),
        (0.5, 0.5),
        (0, 0.0),
        ("nan", None),
        ("inf", None),
        (-1, None),
        ("1e400", None),
        (10**400, None),
        (None, None),
        ([1], None),
        ("free", None),
    ],
)
def test_a_told_cost_is_a_number_of_dollars(value: object, cost_usd: float | None) -> None:
    """Whatever an endpoint writes there, no exception and no odd number comes of it."""
    assert told_cost(value) == cost_usd


def test_a_gateway_tells_what_a_call_cost() -> None:
    """With `prices: {model: gateway}`; an answer that says nothing is unpriced."""
    cost = cost_of("m", {"m": ToldPrice()}, "http://localhost:4000/v1")
    assert bill(Tokens(5, 5), cost, None, 0.25).cost_usd == 0.25
    assert bill(Tokens(5, 5), cost).cost_usd is None
