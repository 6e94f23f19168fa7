"""The demo's screen: texts with their records, rejections, figures, and what is simulated.

Rules of this file: it draws a `Board` and does not know where the board's contents come from.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.align import Align
from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from service.core.words import how_many
from service.demo.figures import Figures

ROWS_KEPT = 60
"""How many records are kept: as many as a very tall terminal can show."""
REJECTED_ROWS = 2
LAST_ROWS = 5
"""How many of the newest rows are told once more after the screen has closed."""
RATE_WINDOW_S = 15.0
"""The throughput on the screen is the mean over this many seconds. Calls take seconds, so a shorter
mean would jump."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CURVE_POINTS = 18
_ACCENT = "cyan"


@dataclass(frozen=True, slots=True)
class Extraction:
    """A text and one of its records, which came `seconds` after the text was written."""

    text: str
    record: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Rejection:
    """A text that became a dead letter, and why."""

    text: str
    reason: str
    detail: str


@dataclass
class Board:
    """Everything on the screen. `now_s` is any clock that only goes forward."""

    example: str
    broker: str
    model: str
    metrics_url: str
    goal: int | None
    notes: str = "starting the service …"
    sent: int = 0
    figures: Figures = field(default_factory=Figures)
    began_s: float | None = None
    now_s: float = 0.0
    extractions: deque[Extraction] = field(default_factory=lambda: deque(maxlen=ROWS_KEPT))
    last: deque[Extraction | Rejection] = field(default_factory=lambda: deque(maxlen=LAST_ROWS))
    rejections: deque[Rejection] = field(default_factory=lambda: deque(maxlen=REJECTED_ROWS))
    _history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1200))

    def arrived(self, row: Extraction | Rejection) -> None:
        """Take over a record or a dead letter."""
        self.last.append(row)
        if isinstance(row, Extraction):
            self.extractions.append(row)
        else:
            self.rejections.append(row)

    def scraped(self, figures: Figures, now_s: float) -> None:
        """Take over the figures of a new scrape."""
        self.figures, self.now_s, self.notes = figures, now_s, ""
        if self.began_s is None and figures.slots_busy:
            self.began_s = now_s
        self._history.append((now_s, figures.finished))

    @property
    def running_s(self) -> float:
        """Seconds since the first call."""
        return 0.0 if self.began_s is None else self.now_s - self.began_s

    @property
    def mean_rate(self) -> float:
        """Messages a second since the first call."""
        return self.figures.finished / self.running_s if self.running_s else 0.0

    def rate(self, at_s: float) -> float:
        """Messages a second over the window that ends at `at_s`."""
        seen = [point for point in self._history if at_s - RATE_WINDOW_S <= point[0] <= at_s]
        if len(seen) < 2 or seen[-1][0] == seen[0][0]:
            return 0.0
        return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])

    def curve(self) -> list[float]:
        """The rate over the last minute, oldest first."""
        step_s = 60 / _CURVE_POINTS
        ages_s = [step_s * point for point in reversed(range(_CURVE_POINTS))]
        return [self.rate(self.now_s - age_s) for age_s in ages_s]


def screen(board: Board) -> RenderableType:
    """The whole screen. It is made for 100 columns and 30 rows, but other sizes work too."""
    layout = Layout()
    layout.split_column(
        Layout(_head(board), size=2),
        Layout(_records(board), name="records", ratio=1),
        Layout(_rejected(board), size=REJECTED_ROWS + 2),
        Layout(_figures(board), size=6),
        Layout(_foot(board), size=3),
    )
    return layout


def line(row: Extraction | Rejection) -> str:
    """A row as one line of text, for an output that is no terminal."""
    if isinstance(row, Extraction):
        return f"{row.text}  ->  {json.dumps(row.record, ensure_ascii=False)}"
    return f"{row.text}  ->  rejected, {row.reason}: {row.detail}"


def farewell(board: Board) -> list[str]:
    """The newest rows as lines, oldest first: the screen takes everything with it when it
    closes."""
    return [line(row) for row in board.last]


def summary(board: Board) -> list[str]:
    """The demo's result in a few lines."""
    seen = board.figures
    return [
        f"{how_many(seen.finished, 'message')}, {how_many(seen.records, 'record')}, "
        f"{seen.rejected} rejected",
        f"{board.mean_rate:.2f} messages/s over {board.running_s:.0f} s",
        f"call p50 {seconds(seen.call_p50_s)}, p95 {seconds(seen.call_p95_s)}; "
        f"end to end p50 {seconds(seen.end_to_end_p50_s)}, p95 {seconds(seen.end_to_end_p95_s)}",
        f"{how_many(seen.calls, 'call')}, {how_many(seen.tokens_input, 'token')} in, "
        f"{seen.tokens_output} out",
    ]


def seconds(value: float | None) -> str:
    """A duration in words, no more precise than a histogram's quantile is."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


# --- parts --------------------------------------------------------------------------------------


def _head(board: Board) -> RenderableType:
    left = Text.assemble(
        (" sluice demo ", f"bold black on {_ACCENT}"),
        ("  messages ", "bold"),
        ("──▶", _ACCENT),
        (" model ", "bold"),
        ("──▶", _ACCENT),
        (f" {board.example} records", "bold"),
    )
    minutes, rest = divmod(int(board.running_s), 60)
    state = board.notes or board.figures.state.replace("_", " ")
    row = Table.grid(expand=True)
    row.add_column()
    row.add_column(justify="right")
    row.add_row(left, Text.assemble((state, "italic"), f"  {minutes:02}:{rest:02} "))
    return row


def _records(board: Board) -> RenderableType:
    table = Table(
        box=None, expand=True, padding=(0, 1), show_header=True, header_style=f"bold {_ACCENT}"
    )
    table.add_column("text", ratio=6, no_wrap=True, overflow="ellipsis")
    table.add_column("record", ratio=5, no_wrap=True, overflow="ellipsis")
    table.add_column("took", justify="right", width=6, no_wrap=True, style="dim")
    for row in reversed(board.extractions):
        table.add_row(Text(row.text), _record(row.record), seconds(row.seconds))
    body: RenderableType = table
    if not board.extractions:
        body = Align.center(
            Text("the model reads its instructions; the first records are on their way …", "dim"),
            vertical="middle",
        )
    return Panel(body, title="[bold]output topic[/]", title_align="left", border_style=_ACCENT)


def _record(record: Mapping[str, Any]) -> Text:
    """A record's values in the order of its fields, each behind its dimmed name."""
    parts: list[tuple[str, str]] = []
    for name, value in record.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts += [(f"{name} ", "dim"), (f"{shown}  ", "bold green")]
    return Text.assemble(*parts)


def _rejected(board: Board) -> RenderableType:
    table = Table(box=None, expand=True, padding=(0, 1), show_header=False)
    table.add_column(ratio=6, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=6, no_wrap=True, overflow="ellipsis")
    for row in reversed(board.rejections):
        table.add_row(
            Text(row.text, "dim"), Text.assemble((row.reason, "bold red"), f"  {row.detail}")
        )
    if not board.rejections:
        table.add_row(Text("none so far; one message in twelve is broken on purpose", "dim"), "")
    return Panel(table, title="[bold]dead letter topic[/]", title_align="left", border_style="red")


def _figures(board: Board) -> RenderableType:
    seen = board.figures
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(3):
        table.add_column(ratio=1)
    busy = Text.assemble(*_bar(seen.slots_busy, seen.slots), f" {seen.slots_busy}/{seen.slots}")
    goal = "" if board.goal is None else f" of {board.goal}"
    cells = (
        ("throughput", Text(f"{board.rate(board.now_s):.2f} messages/s")),
        ("call p50 / p95", Text(f"{seconds(seen.call_p50_s)} / {seconds(seen.call_p95_s)}")),
        ("slots busy", busy),
        ("last minute", Text(_curve(board.curve()), "green")),
        (
            "end to end",
            Text(f"{seconds(seen.end_to_end_p50_s)} / {seconds(seen.end_to_end_p95_s)}"),
        ),
        ("window", Text(f"{seen.window} of {seen.window_max}, lag {seen.lag}")),
        ("finished", Text(f"{seen.finished}{goal}, {seen.rejected} rejected")),
        ("calls", Text(str(seen.calls))),
        ("tokens", Text(f"{seen.tokens_input:,} in, {seen.tokens_output:,} out")),
    )
    for row in _in_threes(cells):
        table.add_row(*row)
    title = f"[bold]figures[/] [dim]from {board.metrics_url}[/]"
    return Panel(table, title=title, title_align="left", border_style="dim")


def _in_threes(cells: Iterable[tuple[str, Text]]) -> list[list[Text]]:
    labelled = [Text.assemble((f"{name}  ", "dim"), value) for name, value in cells]
    return [labelled[first : first + 3] for first in range(0, len(labelled), 3)]


def _bar(busy: int, slots: int) -> tuple[tuple[str, str], tuple[str, str]]:
    width = min(slots, 10)
    filled = round(width * busy / slots) if slots else 0
    return ("■" * filled, "green"), ("□" * (width - filled), "dim")


def _curve(rates: list[float]) -> str:
    top = max(rates) or 1.0
    return "".join(_BLOCKS[round(rate / top * (len(_BLOCKS) - 1))] for rate in rates)


def _foot(board: Board) -> RenderableType:
    return Group(
        Text.assemble((" simulated  ", "yellow"), board.broker),
        Text.assemble((" real       ", "green"), board.model),
        Text.assemble((" Ctrl-C     ", "dim"), ("ends it, with a summary", "dim")),
    )
