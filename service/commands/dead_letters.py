"""`sluice dead-letters`: prints dead letters, and asks before a redrive.

Their texts were written by strangers and by the model. Characters that could steer the terminal are
escaped, and bytes that are not UTF-8 are shown as bytes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from service.core.errors import CannotRun
from service.core.messages import Coordinates
from service.core.words import how_many
from service.kafka.letters.reader import Letter, Redriven, Selection, opened
from service.kafka.letters.redrive import RedrivePlan, RedriveRequest, plan_redrive, redrive
from service.settings import Settings

WIDTH_WITHOUT_TERMINAL = 200
"""How many characters wide a table is in a pipe: a terminal's width would cut texts that grep looks
for."""

DETAIL_SHOWN_MAX = 120


def list_letters(
    settings: Settings, selection: Selection, limit: int | None, *, count: bool, as_json: bool
) -> int:
    """Prints a table and counts by reason, or one JSON object a line; returns the exit code."""
    return asyncio.run(_list(settings, selection, limit, count=count, as_json=as_json))


async def _list(
    settings: Settings, selection: Selection, limit: int | None, *, count: bool, as_json: bool
) -> int:
    table, reasons, again = _table(), Counter[str](), 0
    async with opened(settings) as reader:
        redriven = await reader.redriven()
        async for letter in reader.letters(selection):
            if limit is not None and reasons.total() >= limit:
                break
            reasons[letter.reason or "unknown"] += 1
            again += redriven.when_ms(letter) is not None
            if as_json and not count:
                print(as_json_line(as_object(letter, redriven)))
            elif not count:
                table.add_row(*(Text(cell) for cell in _row(letter, redriven)))
    if as_json and count:
        print(as_json_line({"letters": reasons.total(), "redriven": again, "reasons": reasons}))
    if as_json:
        return 0
    if table.row_count:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)
        console.print(table)
    print(counted(reasons, again))
    return 0


def counted(reasons: Counter[str], redriven: int) -> str:
    """The last line of the list: how many letters there are, by reason, and how many were sent
    again."""
    counts = ", ".join(f"{number} {one_line(reason)}" for reason, number in reasons.most_common())
    letters = how_many(reasons.total(), "dead letter")
    return f"{letters} ({counts or 'none'}), {redriven} of them redriven"


def _table() -> Table:
    columns = ("letter", "origin", "reason", "detail", "when", "attempts", "model", "cost $")
    return Table(*columns, "redriven", box=None, pad_edge=False)


def _row(letter: Letter, redriven: Redriven) -> Iterator[str]:
    yield place(letter.at)
    yield one_line(str(letter.origin))
    yield one_line(letter.reason)
    yield plain((letter.detail.splitlines() or [""])[0])[:DETAIL_SHOWN_MAX]
    yield moment(letter.written_ms)
    yield str(letter.attempts)
    yield one_line(letter.said("sluice.model"))
    yield one_line(letter.said("sluice.cost.usd"))
    at_ms = redriven.when_ms(letter)
    yield "" if at_ms is None else moment(at_ms)


# --- one letter -------------------------------------------------------------------------------


def show_letter(settings: Settings, at: tuple[int, int], *, as_json: bool) -> int:
    """Prints everything in one letter; returns the exit code."""
    return asyncio.run(_show(settings, at, as_json=as_json))


async def _show(settings: Settings, at: tuple[int, int], *, as_json: bool) -> int:
    async with opened(settings) as reader:
        letter = await reader.letter(*at)
        redriven = await reader.redriven()
    if letter is None:
        topic = settings.dead_letters.topic
        raise CannotRun(f"No dead letter stands at {at[0]}:{at[1]} of {topic}.")
    if as_json:
        print(as_json_line(as_object(letter, redriven)))
        return 0
    for name, text in _everything(letter, redriven):
        first, *more = text.split("\n")
        print(f"{name:<16} {first}")
        for line in more:
            print(f"{'':<16} {line}")
    return 0


def _everything(letter: Letter, redriven: Redriven) -> Iterator[tuple[str, str]]:
    yield "letter", str(letter.at)
    yield "origin", plain(str(letter.origin))
    yield "written", moment(letter.written_ms)
    failed_ms, first_ms = letter.history.first_failed_at_ms, letter.history.timestamp_ms
    yield "first failed", moment(failed_ms)
    yield "sent first", moment(first_ms) if first_ms >= 0 else "unknown"
    yield "reason", plain(letter.reason)
    yield "detail", plain(letter.detail)
    yield "attempts", str(letter.attempts)
    at_ms = redriven.when_ms(letter)
    yield (
        "redriven",
        f"{letter.redrives} times before"
        + ("" if at_ms is None else f", and this letter at {moment(at_ms)}"),
    )
    for name, header in _PROVENANCE.items():
        yield name.replace("_", " "), plain(letter.said(header)) or "unknown"
    yield "answer", plain(letter.said("sluice.answer"))
    for header, value in letter.own_headers:
        yield "header", f"{plain(header)} = {shown(value)}"
    yield "key", shown(letter.key)
    yield "value", shown(letter.value)


_PROVENANCE = {
    "model": "sluice.model",
    "prompt_version": "sluice.prompt.version",
    "schema_version": "sluice.schema.version",
    "tokens_input": "sluice.tokens.input",
    "tokens_output": "sluice.tokens.output",
    "cost_usd": "sluice.cost.usd",
}


def as_object(letter: Letter, redriven: Redriven) -> dict[str, Any]:
    """A letter for scripts. Bytes are text where they are UTF-8, else base64 under `…_base64`."""
    numbers = ("tokens_input", "tokens_output")
    cost = letter.said("sluice.cost.usd")
    return {
        "letter": letter.at._asdict(),
        "origin": letter.origin._asdict(),
        "reason": letter.reason,
        "detail": letter.detail,
        "written_ms": letter.written_ms,
        "first_failed_ms": letter.history.first_failed_at_ms,
        "timestamp_ms": letter.history.timestamp_ms,
        "attempts": letter.attempts,
        "redrives": letter.redrives,
        "redriven_ms": redriven.when_ms(letter),
        **{name: letter.said(_PROVENANCE[name]) or None for name in _PROVENANCE},
        **{name: letter.number(_PROVENANCE[name]) for name in numbers},
        "cost_usd": float(cost) if re.fullmatch(r"\d+(\.\d+)?", cost) else None,
        "answer": letter.said("sluice.answer") or None,
        **_bytes("key", letter.key),
        **_bytes("value", letter.value),
        "headers": [{"name": name, **_bytes("value", value)} for name, value in letter.own_headers],
    }


def _bytes(name: str, value: bytes | None) -> dict[str, str | None]:
    try:
        return {name: None if value is None else value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value or b"").decode()}


def shown(value: bytes | None) -> str:
    """A value for the terminal: UTF-8 as text, other bytes as Python writes them."""
    if value is None:
        return "none"
    try:
        return plain(value.decode())
    except UnicodeDecodeError:
        return repr(value)


def plain(text: str) -> str:
    """The text with characters escaped that steer a terminal or change the reading order; line
    breaks stay."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def one_line(text: str) -> str:
    """As `plain`, with line breaks escaped too."""
    return plain(text).replace("\n", "\\n")


def as_json_line(value: object) -> str:
    """A value as JSON, in which letters of all scripts stay and other characters are escaped."""
    return "".join(
        each if each.isprintable() else json.dumps(each)[1:-1]
        for each in json.dumps(value, ensure_ascii=False)
    )


def moment(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat("T", "seconds")[:19] + "Z"
    except (OverflowError, ValueError, OSError):
        return str(at_ms)


def place(at: Coordinates) -> str:
    """A letter's place in the form that `show` and `redrive` take."""
    return f"{at.partition}:{at.offset}"


# --- redrive ----------------------------------------------------------------------------------


def redrive_letters(
    settings: Settings, request: RedriveRequest, *, dry_run: bool, yes: bool
) -> int:
    """Sends letters again; returns the exit code. 0: all letters that were meant are sent; 1: some
    were refused, or the person said no."""
    if dry_run:
        plan = asyncio.run(plan_redrive(settings, request))
        print(f"{how_many(plan.sent, 'dead letter')} would be sent again")
    else:
        with _Bar() as bar:
            plan = asyncio.run(redrive(settings, request, bar.ask(yes), bar.sent))
        print(f"sent again: {how_many(bar.done, 'dead letter')}")
    for sentence in plan.sentences():
        print(sentence)
    return 1 if plan.refused or plan.declined else 0


class _Bar:
    """Asks before a redrive, and on a terminal shows its progress."""

    def __init__(self) -> None:
        self.done = 0
        columns = (TextColumn("redriven"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def ask(self, yes: bool) -> Callable[[RedrivePlan], bool]:
        def may_go(plan: RedrivePlan) -> bool:
            if not yes and not _confirmed(plan):
                return False
            self._progress.update(self._task, total=plan.sent)
            if sys.stderr.isatty():
                self._progress.start()
            return True

        return may_go

    def sent(self, letters: int) -> None:
        self.done += letters
        self._progress.update(self._task, advance=letters)


def _confirmed(plan: RedrivePlan) -> bool:
    for sentence in plan.sentences():
        print(sentence)
    if not sys.stdin.isatty():
        letters = how_many(plan.sent, "dead letter")
        raise CannotRun(f"{letters} would be sent again: add --yes to do so.")
    return typer.confirm(f"Send {how_many(plan.sent, 'dead letter')} to the input again?", err=True)
