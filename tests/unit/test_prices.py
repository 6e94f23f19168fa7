"""What a call costs, and what the endpoint says of its tokens."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from service.llm.answers import read_usage
from service.llm.prices import Tokens, bill, cost_of
from service.settings import Price

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
