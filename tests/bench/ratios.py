"""What the figures of one run say: a table, and the ratios that are promised."""

from __future__ import annotations

from service.commands.plan import Demand, rates
from tests.bench.driver import Figures
from tests.bench.latency import Added

HEAD = f"{'':20}{'msg/s':>8}{'CPU ms/msg':>12}{'slots busy':>12}{'most':>7}{'MB':>7}"


def table(rows: list[Figures]) -> str:
    """A line for each peer."""
    return "\n".join([HEAD, *map(_line, rows)])


def _line(row: Figures) -> str:
    return (
        f"{row.peer:20}{row.rate:>8.0f}{row.cpu_ms:>12.2f}{row.busy:>12.3f}"
        f"{row.most:>7.0f}{row.memory_mb:>7.0f}"
    )


def verdicts(found: dict[str, list[Figures]], added: list[Added]) -> str:
    """Each promise that this run can speak of, and what it came to."""
    by = {letter: {row.peer: row for row in rows} for letter, rows in found.items()}
    lines = [
        _ratio(by, "b", "window", "CPU in (b), sliding window with instructor / Sluice", 8.0, ">="),
        _ratio(by, "a", "bare", "CPU in (a), Sluice / bare loop", 1.4, "<="),
        _figure(by, "a", "busy", "slots busy in (a)", 0.98),
        _planned(by),
        _figure(by, "b", "rate", "messages/s in (b)", 1100.0),
        _figure(by, "c", "rate", "messages/s in (c), key order", 1350.0),
    ]
    lines += [_memory(by), *map(_added, added[:1])]
    return "\n".join(line for line in lines if line)


def _memory(by: dict[str, dict[str, Figures]]) -> str:
    row = by.get("e1", {}).get("sluice")
    if row is None:
        return ""
    claim = f"MB at {row.most:.0f} in flight"
    return _verdict(claim, row.memory_mb, 200.0, row.memory_mb <= 200.0, "at most")


def _added(added: Added) -> str:
    claim = f"latency added at 70 % load, ms: p50 {added.p50_ms:.1f} (at most 5), p99"
    kept = added.p50_ms <= 5.0 and added.p99_ms <= 50.0
    return _verdict(claim, added.p99_ms, 50.0, kept, "at most")


def _ratio(
    by: dict[str, dict[str, Figures]], letter: str, peer: str, claim: str, bound: float, way: str
) -> str:
    rows = by.get(letter, {})
    if peer not in rows or "sluice" not in rows:
        return ""
    ratio = rows["sluice"].cpu_ms / rows[peer].cpu_ms
    if way == ">=":
        ratio = 1 / ratio
        return _verdict(claim, ratio, bound, ratio >= bound, "at least")
    return _verdict(claim, ratio, bound, ratio <= bound, "at most")


def _planned(by: dict[str, dict[str, Figures]]) -> str:
    """`sluice plan` against this run: all slots at the utilisation that it reckons with."""
    row = by.get("a", {}).get("sluice")
    if row is None:
        return ""
    # Median, spread and slots of (a).
    (planned,) = rates(Demand(messages_per_s=0.0, latency_median_s=0.3, latency_sigma=1.0), 200)
    share = row.rate / planned
    return _verdict(
        "messages/s in (a) / what the plan says", share, 0.95, share >= 0.95, "at least"
    )


def _figure(
    by: dict[str, dict[str, Figures]], letter: str, name: str, claim: str, least: float
) -> str:
    row = by.get(letter, {}).get("sluice")
    if row is None:
        return ""
    value = getattr(row, name)
    return _verdict(claim, value, least, value >= least, "at least")


def _verdict(claim: str, value: float, bound: float, kept: bool, word: str) -> str:
    return f"{'✓' if kept else '✗'} {claim}: {value:.2f} ({word} {bound:g})"
