"""The provider's limits, as the headers of its answers tell them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from service.core.admission.budgets import Allowance, Quota

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_allowance(headers: Mapping[str, str], asked_at_s: float) -> Allowance | None:
    """`x-ratelimit-limit|remaining|reset-requests|tokens`, as OpenAI, Azure and others send them.

    None where nothing is told that could be read.
    """
    requests, tokens = _quota(headers, "requests"), _quota(headers, "tokens")
    if requests is None and tokens is None:
        return None
    return Allowance(asked_at_s, requests, tokens)


def _quota(headers: Mapping[str, str], kind: Literal["requests", "tokens"]) -> Quota | None:
    limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
    remaining = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
    if limit is None or remaining is None or limit <= 0:
        return None
    return Quota(limit, remaining, duration_s(headers.get(f"x-ratelimit-reset-{kind}")))


def duration_s(text: str | None) -> float | None:
    """Seconds in "6m0s", "1h2m", "1.5s", "20ms" or a plain number; None if it is none of them."""
    if text is None:
        return None
    number = _number(text)
    if number is not None:
        return number
    parts = _PART.findall(text.strip())
    if not parts or "".join(figure + unit for figure, unit in parts) != text.strip():
        return None
    return sum(float(figure) * _SECONDS[unit] for figure, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) and number >= 0 else None
