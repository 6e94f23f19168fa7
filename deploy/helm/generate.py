"""Writes what the chart holds of other files: `python deploy/helm/generate.py` after a change.

values.yaml, values.schema.json and the table of the README come from values.py and the service's
settings; files/ holds the settings' defaults (templates compute with them), and copies of the
alert rules and dashboards, because a chart can read only files inside itself. A test compares.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

HELM = Path(__file__).resolve().parent
DEPLOY, CHART = HELM.parent, HELM / "sluice"
sys.path[:0] = [str(HELM), str(DEPLOY.parent)]

from values import SHARED, Values  # noqa: E402 (beside this file, which is run as a program)

from service.settings import Settings  # noqa: E402

BEGIN, END = "<!-- values:begin -->\n", "<!-- values:end -->"


def contents() -> dict[Path, str]:
    """Every generated file and what belongs into it."""
    readme = (CHART / "README.md").read_text()
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return {
        CHART / "values.yaml": values_text(),
        CHART / "values.schema.json": json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": before + BEGIN + table() + END + after,
        CHART / "files" / "defaults.yaml": defaults(),
        **copies(),
    }


def copies() -> dict[Path, str]:
    """Alert rules and dashboards."""
    rules = DEPLOY.glob("prometheus/*.rules.yml")
    dashboards = DEPLOY.glob("grafana/dashboards/*.json")
    return {CHART / "files" / kind / file.name: file.read_text() for kind, found in
            (("rules", rules), ("dashboards", dashboards)) for file in sorted(found)}  # fmt: skip


def defaults() -> str:
    """What holds where settings say nothing."""
    values = Settings().model_dump(mode="json", exclude_none=True)
    return "# Generated: the defaults of the service's settings.\n" + yaml.safe_dump(values)


# --- values.yaml and the table ----------------------------------------------------------------


def values_text() -> str:
    lines = ["# Generated from ../values.py, which says more: bounds, and what is refused."]
    lines += _lines(Values(), 0)
    return "\n".join(lines) + "\n"


def _lines(group: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        meaning = " ".join((field.description or "").split())
        for line in textwrap.wrap(meaning, 98 - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, BaseModel):
            yield f"{indent}{field.alias or name}:"
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{field.alias or name}: {_flow(value)}"
        if depth == 0:
            yield ""


def _flow(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def table() -> str:
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, meaning, value in _rows(Values(), ""):
        rows.append(
            f"| `{path}` | {f'`{_flow(value)}`' if value not in (None, '') else ''} | {meaning} |"
        )
    return "\n".join(rows) + "\n"


def _rows(group: BaseModel, prefix: str) -> Iterator[tuple[str, str, Any]]:
    for name, field in type(group).model_fields.items():
        value, path = getattr(group, name), f"{prefix}{field.alias or name}"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        if isinstance(value, BaseModel):
            inner = list(_rows(value, f"{path}."))
            yield path, meaning, None
            yield from inner
        else:
            yield path, meaning, value


# --- values.schema.json -----------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The values' schema; `settings` is the service's own, so a misspelt setting fails the lint."""
    whole = Values.model_json_schema()
    settings = Settings.model_json_schema(ref_template="#/$defs/Settings.{model}")
    inner = {f"Settings.{name}": one for name, one in settings.pop("$defs").items()}
    definitions = {**whole.pop("$defs"), **inner, "Settings": settings}
    for name, one in definitions.items():
        if name not in REQUIRED:  # whatever is left out has its default
            one.pop("required", None)
    for section in inner.values():
        section["properties"] = {name: _or_text(one) for name, one in section["properties"].items()}
    properties = whole["properties"]
    properties["settings"]["$ref"] = "#/$defs/Settings"
    definitions["Extraction"]["properties"] |= {
        name: one for name, one in properties.items() if name not in SHARED
    }
    properties["global"] = {"type": "object", "description": "Helm's own."}
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return cast(dict[str, Any], _bare({"$schema": dialect, **whole, "$defs": definitions}))


def _or_text(one: dict[str, Any]) -> dict[str, Any]:
    """A list of names may be one text with commas, in the file as in the environment."""
    if one.get("type") != "array" or one["items"].get("type") != "string":
        return one
    rest = {name: value for name, value in one.items() if name not in ("type", "items")}
    return {**rest, "anyOf": [{"type": "array", "items": one["items"]}, {"type": "string"}]}


REQUIRED = ("Extraction", "Settings.Example")


def _bare(node: Any) -> Any:
    """Without titles, and without defaults, which stand in values.yaml."""
    if isinstance(node, dict):
        named = node.get("properties")
        kept = {
            name: _bare(one)
            for name, one in node.items()
            if name not in ("title", "default", "format", "properties")
        }
        if named is not None:
            kept["properties"] = {name: _bare(one) for name, one in named.items()}
        return kept
    return [_bare(one) for one in node] if isinstance(node, list) else node


def main() -> None:
    """Write them, and remove copies of what is there no more."""
    wanted = contents()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in (CHART / "files").rglob("*.*"):
        if path not in wanted:
            path.unlink()


if __name__ == "__main__":
    main()
