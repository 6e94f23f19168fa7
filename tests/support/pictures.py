"""A dashboard drawn as SVG from what Prometheus returned, for where no Grafana runs.

Layout, titles and legends are the dashboard's; lines and areas are drawn plainly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

Ask: TypeAlias = Callable[[str], list[dict[str, Any]]]
"""What a range query for this expression returns."""

COLUMN_PX, ROW_PX = 60, 32
GAP_PX, TITLE_PX, LEGEND_PX = 6, 24, 22
SERIES_MAX = 8
"""Of a panel; more cannot be told apart by colour."""

COLORS = {
    "green": "#56a64b",
    "orange": "#ff780a",
    "blue": "#3274d9",
    "red": "#e02f44",
    "purple": "#a352cc",
    "yellow": "#f2cc0c",
    "teal": "#3fb1a3",
    "brown": "#8f6a3d",
}


@dataclass(frozen=True)
class Series:
    """One line: its legend and its points, (seconds, value)."""

    legend: str
    points: tuple[tuple[float, float], ...]

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def largest(self) -> float:
        return max(value for _, value in self.points)


@dataclass(frozen=True)
class Box:
    """A place on the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float


def picture(model: Mapping[str, Any], ask: Ask, span: tuple[float, float]) -> str:
    """The dashboard as SVG; `span` is the begin and end of what `ask` returns."""
    bottom = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in model["panels"])
    width, height = 24 * COLUMN_PX, bottom * ROW_PX
    parts = [part for panel in model["panels"] for part in _panel(panel, ask, span)]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>',
            *parts,
            "</svg>\n",
        )
    )


def _panel(panel: Mapping[str, Any], ask: Ask, span: tuple[float, float]) -> Iterator[str]:
    place = panel["gridPos"]
    box = Box(
        place["x"] * COLUMN_PX + GAP_PX / 2,
        place["y"] * ROW_PX + GAP_PX / 2,
        place["w"] * COLUMN_PX - GAP_PX,
        place["h"] * ROW_PX - GAP_PX,
    )
    if panel["type"] == "row":
        yield _text(box.x + 4, box.y + 18, panel["title"], 'font-weight="bold" font-size="15"')
        return
    yield f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" fill="white"/>'
    yield _text(box.x + 8, box.y + 17, panel["title"], 'font-weight="bold"')
    found = list(_series(panel, ask))
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        value = _shown(found[-1].last, unit) if found else "no data"
        style = 'font-size="30" fill="#3274d9" text-anchor="middle"'
        yield _text(box.x + box.width / 2, box.y + box.height / 2 + 20, value, style)
    else:
        yield from _graph(panel, found, box, span)


def _series(panel: Mapping[str, Any], ask: Ask) -> Iterator[Series]:
    for target in panel["targets"]:
        for one in ask(target["expr"]):
            points = [(at, float(value)) for at, value in one["values"]]
            finite = tuple((at, value) for at, value in points if math.isfinite(value))
            if finite:
                yield Series(_legend(target["legendFormat"], one["metric"]), finite)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template)


def _graph(
    panel: Mapping[str, Any], found: list[Series], box: Box, span: tuple[float, float]
) -> Iterator[str]:
    """Lines, or areas on top of each other; those that are never anything but 0 are left out."""
    shown = [one for one in found if one.largest > 0] or found
    shown = sorted(shown, key=lambda one: -one.largest)[:SERIES_MAX]
    if not shown:
        yield _text(box.x + 8, box.y + 40, "no data", 'fill="#999"')
        return
    plot = Box(box.x + 50, box.y + TITLE_PX + 6, box.width - 60, box.height - TITLE_PX - 30)
    custom = panel["fieldConfig"]["defaults"]["custom"]
    lines = _stacked(shown) if custom["stacking"]["mode"] == "normal" else shown
    top = max(one.largest for one in lines) or 1.0
    yield from _axis(plot, top, panel["fieldConfig"]["defaults"]["unit"])
    colors = _colors(panel, shown)
    # From the highest down, so that each area covers what belongs to those below it.
    for line, color in reversed(list(zip(lines, colors, strict=True))):
        opacity = 1.0 if lines is not shown else 0.0
        yield _line(line, plot, top, span, color, opacity)
    yield from _legends(shown, colors, box)


def _stacked(shown: Sequence[Series]) -> list[Series]:
    """Each on top of those before it."""
    height: dict[float, float] = {}
    stacked = []
    for one in shown:
        points = []
        for at, value in one.points:
            height[at] = height.get(at, 0.0) + value
            points.append((at, height[at]))
        stacked.append(Series(one.legend, tuple(points)))
    return stacked


def _colors(panel: Mapping[str, Any], shown: Sequence[Series]) -> list[str]:
    painted = {
        override["matcher"]["options"]: override["properties"][0]["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
    }
    palette = list(COLORS)
    return [
        COLORS[painted.get(one.legend, palette[index % len(palette)])]
        for index, one in enumerate(shown)
    ]


def _axis(plot: Box, top: float, unit: str) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        y = plot.y + plot.height * (1 - share)
        yield f'<path d="M{plot.x},{y:.1f}h{plot.width}" stroke="#e5e5e5"/>'
        style = 'text-anchor="end" font-size="10" fill="#777"'
        yield _text(plot.x - 4, y + 4, _shown(top * share, unit), style)


def _line(
    line: Series, plot: Box, top: float, span: tuple[float, float], color: str, opacity: float
) -> str:
    begin, end = span
    places = [
        (
            plot.x + plot.width * (at - begin) / (end - begin),
            plot.y + plot.height * (1 - value / top),
        )
        for at, value in line.points
    ]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.3"/>'
    if opacity:
        base = plot.y + plot.height
        area = f"{path}L{places[-1][0]:.1f},{base:.1f}L{places[0][0]:.1f},{base:.1f}Z"
        drawn += f'<path d="{area}" fill="{color}" fill-opacity="{opacity}"/>'
    return drawn


def _legends(shown: Sequence[Series], colors: Sequence[str], box: Box) -> Iterator[str]:
    x = box.x + 8
    for one, color in zip(shown, colors, strict=True):
        width = 18 + 6.2 * len(one.legend)
        if x + width > box.x + box.width:
            return
        y = box.y + box.height - 8
        yield f'<rect x="{x:.0f}" y="{y - 7:.0f}" width="9" height="4" fill="{color}"/>'
        yield _text(x + 12, y, one.legend, 'font-size="11"')
        x += width


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(text)}</text>'


def _shown(value: float, unit: str) -> str:
    match unit:
        case "percentunit":
            return f"{value:.1%}"
        case "currencyUSD":
            return f"${value:.3g}"
        case "s":
            return f"{value:.3g} s"
        case "bytes":
            return f"{value / 1e6:.3g} MB" if value >= 1e6 else f"{value:.3g} B"
        case "ops":
            return f"{value:.3g}/s"
        case _:
            return f"{value:,.4g}"
