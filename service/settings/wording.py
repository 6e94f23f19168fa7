"""Sentences on settings: their names, what is allowed, what is wrong, and the table of settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from service.settings.sections import Section
from service.settings.settings import PREFIX, Contradictions, Settings

Place: TypeAlias = tuple[str, ...]
"""A setting's names from the outermost section on, such as ("kafka", "group_id")."""

SECTIONS = frozenset({*Settings.model_fields, "security", "confidence", "guard"})

SHOWN_MAX = 60
"""How many characters of a wrong value a sentence repeats."""


def table() -> str:
    """Every setting as a Markdown table, for docs/settings.md."""
    rows = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for place, node in every_setting().items():
        cells = (f"`{dotted(place)}`", _default(node), _allowed(node), _meaning(node))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


@cache
def every_setting() -> Mapping[Place, Mapping[str, Any]]:
    """The JSON schema of each setting, by its place, in the order of the fields."""
    return dict(_leaves(Settings))


def _leaves(model: type[BaseModel], place: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    nodes = model.model_json_schema()["properties"]
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _leaves(kind, (*place, name))
        else:
            yield (*place, name), nodes[name]


def dotted(place: Place) -> str:
    return ".".join(place)


def variable(place: Place) -> str:
    return PREFIX + "__".join(place).upper()


# --- what is wrong, in sentences --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origins:
    """Where the values of settings came from: a line of the file, or a variable that overrides
    it."""

    file: str
    lines: Mapping[Place, int]
    variables: frozenset[str]

    def of(self, place: Place) -> str | None:
        if variable(place) in self.variables:
            return variable(place)
        if place in self.lines:
            return f"{self.file} line {self.lines[place]}: {dotted(place)}"
        return None

    def nearest(self, loc: tuple[str | int, ...]) -> str:
        """The origin of the setting that contains `loc`, followed by the rest of `loc`."""
        names = tuple(str(part) for part in loc)
        for length in range(len(names), 0, -1):
            origin = self.of(names[:length])
            if origin is not None:
                return origin + _rest(loc[length:])
        return dotted(names)


def _rest(loc: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def sentences(error: ErrorDetails, origins: Origins) -> Iterator[str]:
    """Sentences for one error: where each value came from, what is wrong, what is allowed."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Contradictions):
        for one in cause.found:
            places = [tuple(name.split(".")) for name in one.settings]
            where = " and ".join(origins.of(place) or dotted(place) for place in places)
            yield f"{where}: {one.text}"
        return
    loc = error["loc"]
    where = origins.nearest(loc)
    if error["type"] == "extra_forbidden":
        name = dotted(tuple(str(part) for part in loc))
        yield f"{where}: {unheard_of(name, {*map(dotted, every_setting()), *SECTIONS})}"
    elif isinstance(cause, ValueError):
        yield f"{where}: {cause}"
    else:
        yield f"{where}: {_shown(error)}; {_expected(error)}"


def unheard_of(name: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name. It suggests a name that differs by a typing error, else the
    same last name in another section, else the most similar name."""
    names = sorted(known)
    elsewhere = [one for one in names if _last_name(one) == _last_name(name)]
    meant = (
        difflib.get_close_matches(name, names, 1, cutoff=0.85)
        or difflib.get_close_matches(name, elsewhere, 1, cutoff=0.0)
        or difflib.get_close_matches(name, names, 1, cutoff=0.6)
    )
    then = f"did you mean {meant[0]}?" if meant else "`sluice schema --settings` lists them all"
    return f"there is no such setting; {then}"


def _last_name(name: str) -> str:
    return re.split(r"__|\.", name)[-1]


def _shown(error: ErrorDetails) -> str:
    """The wrong value, shortened, and that it is not allowed; secrets are not shown."""
    given, names = error["input"], error["loc"]
    if error["type"] == "missing":
        return "is missing"
    # In the place of a section there may be a secret by mistake.
    if _is_section(names) or not isinstance(given, str | int | float | bool):
        return "is not allowed"
    text = repr(given) if isinstance(given, str) else str(given)
    return f"{text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + '…'} is not allowed"


def _is_section(loc: tuple[str | int, ...]) -> bool:
    """Whether `loc` is a section. It is decided by the whole place and not by the last name: a
    price has an `input` too."""
    return any(place[: len(loc)] == loc and len(place) > len(loc) for place in every_setting())


def _expected(error: ErrorDetails) -> str:
    loc = error["loc"]
    node = every_setting().get(tuple(str(part) for part in loc))
    if node is not None:
        return f"allowed: {_allowed(node)}"
    if _is_section(loc):
        return "allowed: a section with settings below it"
    return error["msg"][:1].lower() + error["msg"][1:]


# --- what is allowed, by default and meant -----------------------------------------------------


def _allowed(node: Mapping[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_allowed(one) for one in node["anyOf"] if one.get("type") != "null")
    if "enum" in node or "const" in node:
        return " or ".join(node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number{_bounds(node)}"
    return _WORDS.get(node.get("format") or kind or "", "text")


_WORDS = {
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "path": "a path",
    "password": "a secret",
    "date-time": "a time such as 2026-01-31T08:00:00+00:00",
}


def _bounds(node: Mapping[str, Any]) -> str:
    """The bounds in words, such as " from 1 up to 10" or " above 0, below 1"; empty without any."""
    low = f" from {node['minimum']}" if "minimum" in node else ""
    high = f" up to {node['maximum']}" if "maximum" in node else ""
    if "exclusiveMaximum" in node:
        high = f" below {node['exclusiveMaximum']}"
    if "exclusiveMinimum" in node:
        low = f" above {node['exclusiveMinimum']}" + ("," if high else "")
    return low + high


def _default(node: Mapping[str, Any]) -> str:
    value = node.get("default")
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        value = ",".join(value)
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _meaning(node: Mapping[str, Any]) -> str:
    return " ".join(str(node.get("description", "")).split())
