"""What a benchmark's figures are made into: promises kept or not, never a silence."""

from __future__ import annotations

from tests.bench.driver import Figures
from tests.bench.latency import Added
from tests.bench.ratios import verdicts


def figures(peer: str, cpu_ms: float, *, rate: float = 1200.0, busy: float = 0.99) -> Figures:
    return Figures(peer, rate, cpu_ms, busy, 200, 150.0)


def test_each_promise_is_kept_or_not() -> None:
    """The ratio that is promised, with its bound, and a mark that says which side it is on."""
    found = {"b": [figures("window", 8.0), figures("sluice", 0.8)]}
    assert verdicts(found, []).splitlines() == [
        "✓ CPU in (b), sliding window with instructor / Sluice: 10.00 (at least 8)",
        "✓ messages/s in (b): 1200.00 (at least 1100)",
    ]
    found = {"a": [figures("bare", 0.5), figures("sluice", 0.8, rate=300.0, busy=0.9)]}
    assert [line[0] for line in verdicts(found, []).splitlines()] == ["✗", "✗", "✗"]


def test_latency_has_two_bounds() -> None:
    """A good p99 does not hide a bad p50."""
    added = Added(slots=1000, messages=1, rate=100.0, p50_ms=6.0, p99_ms=20.0, memory_mb=150.0)
    assert verdicts({}, [added]).startswith("✗ latency added")
