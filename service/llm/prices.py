"""What a call costs: prices of one's own first, then those that genai-prices knows, offline.

Cached tokens are part of the input's and reasoning tokens of the output's. The library's data
comes with its package; it asks the network only where it is told to, which nobody here does.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

from service.settings import Price

_MILLION = 1_000_000


class Tokens(NamedTuple):
    """What the endpoint says of one call; without any it has not said."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0


UNTOLD = Tokens()


@dataclass(frozen=True, slots=True)
class Bill:
    """One call's tokens and their cost in US dollars, None where nobody knows it."""

    tokens: Tokens = UNTOLD
    cost_usd: float | None = 0.0


Cost: TypeAlias = Callable[[Tokens], float]
"""US dollars for the tokens of one call."""


def cost_of(model: str, own: Mapping[str, Price], base_url: str) -> Cost | None:
    """How the model's calls are charged at this endpoint; None where no price is known.

    A public price counts only at the provider that the URL belongs to: what the same model costs
    on a machine of one's own, or behind a gateway, nobody else knows.
    """
    if model in own:
        return _own(own[model])
    return _listed(model, base_url) if _is_public(base_url) else None


def bill(tokens: Tokens, cost: Cost | None) -> Bill:
    """An answer's: it was charged, also where the endpoint does not say for how much."""
    said = tokens.input or tokens.output
    return Bill(tokens, cost(tokens) if cost is not None and said else None)


def _own(price: Price) -> Cost:
    cached = price.input if price.cached is None else price.cached

    def cost(tokens: Tokens) -> float:
        full = (tokens.input - tokens.cached) * price.input + tokens.cached * cached
        return (full + tokens.output * price.output) / _MILLION

    return cost


def _listed(model: str, base_url: str) -> Cost | None:
    # Its import takes a second or two and 27 MB: only where there can be a price to look up.
    from genai_prices import Usage, calc_price

    def cost(tokens: Tokens) -> float:
        # Each time anew (0.1 ms): some prices depend on the hour or on the size of the input.
        usage = Usage(
            input_tokens=tokens.input,
            cache_read_tokens=tokens.cached,
            output_tokens=tokens.output,
        )
        return float(calc_price(usage, model, provider_api_url=base_url).total_price)

    try:
        cost(Tokens(1, 1))
    except LookupError:
        return None
    return cost


def _is_public(base_url: str) -> bool:
    """Whether a provider could be there: not at an address, nor at a name of one's own network."""
    host = urlsplit(base_url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".svc", ".localhost"))
    return False
