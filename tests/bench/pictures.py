"""Charts of one run: a picture for each scenario, a bar for each peer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.driver import Figures

OURS, OTHERS = "#1f6f8b", "#b8c4cc"
MEASURES = (
    ("cpu_ms", "CPU, ms a message", "{:.2f}"),
    ("rate", "messages/s", "{:,.0f}"),
    ("busy", "share of slots busy", "{:.3f}"),
)
AT_ONCE = "bd"
"""Scenarios without a latency: there a slot is hardly ever busy."""


def draw(found: dict[str, list[Figures]], folder: Path) -> Iterator[Path]:
    """Writes SVG files; yields where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for letter, rows in found.items():
        path = folder / f"bench-{letter}.svg"
        _picture(letter, rows).savefig(path, metadata={"Date": None})
        yield path


def _picture(letter: str, rows: list[Figures]) -> Figure:
    measures = MEASURES[:2] if letter in AT_ONCE else MEASURES
    figure = Figure(figsize=(11, 0.45 * len(rows) + 1.2), layout="constrained")
    for axes, (name, title, form) in zip(figure.subplots(1, len(measures)), measures, strict=True):
        _bars(axes, rows, name, form)
        axes.set_title(f"({letter}) {title}", fontsize=10)
    return figure


def _bars(axes: Axes, rows: list[Figures], name: str, form: str) -> None:
    values = [getattr(row, name) for row in rows]
    colours = [OURS if row.peer == "sluice" else OTHERS for row in rows]
    bars = axes.barh([row.peer for row in rows], values, color=colours)
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
