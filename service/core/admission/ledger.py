"""What was spent within the hour, as it travels with a partition from one worker to the next.

A partition's entry says how much of the hour's limit is used up on its account; it does not say
which messages have cost it. Rules of this file: pure; time comes in as seconds since the epoch,
since it is read by another process; money in millionths of a dollar.
"""

from __future__ import annotations

import re
from typing import TypeAlias

SLOT_S = 600
"""Money is counted in slots of ten minutes: seven of them touch the last hour."""

SLOTS_MAX = 3600 // SLOT_S + 1

MICRO_MAX = 36**8 - 1
"""Of a slot: 2.8 million dollars, which no settings allow."""

Ledger: TypeAlias = tuple[tuple[int, int], ...]
"""Number of the slot since the epoch and millionths of a dollar, the oldest first."""

TEXT = re.compile(rf"[0-9a-z]{{1,8}}(\.[0-9a-z]{{0,8}}){{1,{SLOTS_MAX}}}", re.ASCII)
"""What `written` gives: the number of the last slot, then what was spent in it and in those before
it, in base 36; nothing where nothing was."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def slot_of(wall_s: float) -> int:
    return int(wall_s // SLOT_S)


def added(ledger: Ledger, wall_s: float, usd: float) -> Ledger:
    """With so much more, and without what has left the hour."""
    now = slot_of(wall_s)
    kept = dict(each for each in ledger if now - SLOTS_MAX < each[0] <= now)
    kept[now] = min(MICRO_MAX, kept.get(now, 0) + round(usd * 1e6))
    return tuple(sorted(kept.items()))


def total_usd(ledger: Ledger) -> float:
    return sum(micro for _, micro in ledger) / 1e6


def written(ledger: Ledger) -> str | None:
    """As text; None where there is nothing to say."""
    if not ledger:
        return None
    spent, last = dict(ledger), ledger[-1][0]
    slots = range(last, ledger[0][0] - 1, -1)
    return ".".join([_base36(last), *(_base36(spent.get(slot, 0)) for slot in slots)])


def read(text: str) -> Ledger:
    """What `written` has made, in whatever process; only after `TEXT` has matched."""
    last, *spent = text.split(".")
    slots = ((int(last, 36) - back, int(each or "0", 36)) for back, each in enumerate(spent))
    return tuple(sorted((slot, micro) for slot, micro in slots if micro))


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits
