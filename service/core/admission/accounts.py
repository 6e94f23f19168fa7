"""Accounts: what was spent in the last hour, kept for each partition and handed on with it.

A partition's account says how much of the hour's limit was spent on it; it does not say which
messages have cost it. Rules of this file: pure. Time comes in as seconds since the epoch, because
another process reads the account later; money is in millionths of a dollar.
"""

from __future__ import annotations

import re
from typing import TypeAlias

PERIOD_S = 600
"""Money is counted in periods of this many seconds. Seven of them overlap with the last hour."""

PERIODS_MAX = 3600 // PERIOD_S + 1

MICRO_MAX = 36**8 - 1
"""The most that a period can hold: 2.8 million dollars, which no settings allow."""

Account: TypeAlias = tuple[tuple[int, int], ...]
"""For each period its number since the epoch and the millionths of a dollar, the oldest first."""

TEXT = re.compile(rf"[0-9a-z]{{1,8}}(\.[0-9a-z]{{0,8}}){{1,{PERIODS_MAX}}}", re.ASCII)
"""The form of the text that `written` returns, in base 36: the number of the last period, then what
was spent in it and in each one before it; empty where nothing was spent in it."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def period_of(wall_s: float) -> int:
    return int(wall_s // PERIOD_S)


def added(account: Account, wall_s: float, usd: float) -> Account:
    """The account with `usd` more in it, and without periods that have left the hour."""
    now = period_of(wall_s)
    kept = dict(each for each in account if now - PERIODS_MAX < each[0] <= now)
    kept[now] = min(MICRO_MAX, kept.get(now, 0) + round(usd * 1e6))
    return tuple(sorted(kept.items()))


def total_usd(account: Account) -> float:
    return sum(micro for _, micro in account) / 1e6


def written(account: Account) -> str | None:
    """The account as text; None where nothing was spent."""
    if not account:
        return None
    spent, last = dict(account), account[-1][0]
    periods = range(last, account[0][0] - 1, -1)
    return ".".join([_base36(last), *(_base36(spent.get(period, 0)) for period in periods)])


def read(text: str) -> Account:
    """Reads a text that `written` has made, also in another process; it must match `TEXT`."""
    last, *spent = text.split(".")
    periods = ((int(last, 36) - back, int(each or "0", 36)) for back, each in enumerate(spent))
    return tuple(sorted((period, micro) for period, micro in periods if micro))


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits
