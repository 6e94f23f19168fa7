"""What a call costs: prices of one's own first, then those that genai-prices knows, offline.

Tokens that the provider read from its cache, or wrote to it, are part of the input's, and reasoning
tokens of the output's. The library's data
comes with its package; it asks the network only where it is told to, which nobody here does.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from service.settings import Price, ToldPrice

_MILLION = 1_000_000
TOLD_MAX_USD = 10_000.0
"""Of one call; more is no price."""


class Tokens(NamedTuple):
    """What the endpoint says of one call; without any it has not said."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0
    cache_write: int = 0


UNTOLD = Tokens()


@dataclass(frozen=True, slots=True)
class Bill:
    """One call's tokens and their cost in US dollars, None where nobody knows it."""

    tokens: Tokens = UNTOLD
    cost_usd: float | None = 0.0


class Cost(Protocol):
    """How one call is charged."""

    def __call__(
        self, tokens: Tokens, tier: str | None = None, told_usd: float | None = None
    ) -> float | None:
        """US dollars; `tier` is the one that answered, `told_usd` what the answer says that it
        cost. None where it cannot be known."""


def cost_of(model: str, own: Mapping[str, Price], base_url: str) -> Cost | None:
    """How the model's calls are charged at this endpoint; None where no price is known.

    A public price counts only at the provider that the URL belongs to: what the same model costs
    on a machine of one's own, or behind a gateway, nobody else knows.
    """
    match own.get(model):
        case ToldPrice():
            return lambda tokens, tier=None, told_usd=None: told_usd
        case Price() as price:
            return _own(price)
    return _listed(model, base_url) if _is_public(base_url) else None


def bill(
    tokens: Tokens, cost: Cost | None, tier: str | None = None, told_usd: float | None = None
) -> Bill:
    """An answer's: it was charged, also where the endpoint does not say for how much."""
    said = tokens.input or tokens.output or told_usd is not None
    return Bill(tokens, cost(tokens, tier, told_usd) if cost is not None and said else None)


def told_cost(value: object) -> float | None:
    """What an endpoint says that a call has cost; None for what cannot be that."""
    try:
        cost_usd = float(value) if isinstance(value, str | int | float) else -1.0
    except (ValueError, OverflowError):
        return None
    return cost_usd if 0 <= cost_usd <= TOLD_MAX_USD else None


def _by_kind(tokens: Tokens) -> tuple[int, int, int]:
    """Of the input: neither read from the cache nor written to it, read, written. No kind is more
    than what is left of the whole: some endpoints count the cache beside the input."""
    cached = min(tokens.cached, tokens.input)
    written = min(tokens.cache_write, tokens.input - cached)
    return tokens.input - cached - written, cached, written


def _own(price: Price) -> Cost:
    read = price.input if price.cached is None else price.cached
    write = price.input if price.cache_write is None else price.cache_write

    def cost(
        tokens: Tokens, tier: str | None = None, told_usd: float | None = None
    ) -> float | None:
        fresh, cached, written = _by_kind(tokens)
        inputs = fresh * price.input + cached * read + written * write
        return (inputs + tokens.output * price.output) / _MILLION

    return cost


def _listed(model: str, base_url: str) -> Cost | None:
    # Its import takes a second or two and 27 MB: only where there can be a price to look up.
    from genai_prices import Usage, calc_price

    def price_of(tokens: Tokens, tier: str | None) -> float:
        # Each time anew (0.1 ms): some prices depend on the hour or on the size of the input.
        _, cached, written = _by_kind(tokens)
        usage = Usage(
            input_tokens=tokens.input,
            cache_read_tokens=cached,
            cache_write_tokens=written,
            output_tokens=tokens.output,
        )
        context = None if tier is None else {"service_tier": tier}
        price = calc_price(usage, model, provider_api_url=base_url, price_context=context)
        return float(price.total_price)

    def cost(
        tokens: Tokens, tier: str | None = None, told_usd: float | None = None
    ) -> float | None:
        try:
            return price_of(tokens, tier)
        # The library's own: whatever it makes of an odd usage, an answer is not lost for it.
        except Exception:
            return None

    try:
        price_of(Tokens(1, 1), None)
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
