"""What the chart holds of other files is what they say, and nothing of it is wrong in itself."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import yaml
from pydantic import BaseModel

from service.settings import Settings
from tests.support.stopping import BOUNDS_S, CLOSING_S

HELM = Path(__file__).parents[2] / "deploy" / "helm"


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HELM / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


values, generate = _loaded("values"), _loaded("generate")


def test_generated_files_are_up_to_date() -> None:
    """values.yaml, its schema, the README's table, defaults, and the copies of alert rules and
    dashboards: run `python deploy/helm/generate.py` after a change."""
    wanted = generate.contents()
    copies = {path for path in (generate.CHART / "files").rglob("*.*") if path.is_file()}
    assert copies <= wanted.keys(), "copies of what is no more"
    assert [path.name for path, text in wanted.items() if path.read_text() != text] == []


def test_values_are_the_defaults() -> None:
    """values.yaml read back is what values.py says."""
    found = yaml.safe_load((generate.CHART / "values.yaml").read_text())
    assert found == json.loads(values.Values().model_dump_json(by_alias=True))


def test_every_setting_can_be_set_in_the_chart() -> None:
    """The schema names each section and each setting of the service."""
    definitions = generate.schema()["$defs"]
    for section, field in Settings.model_fields.items():
        assert section in definitions["Settings"]["properties"]
        if isinstance(kind := field.annotation, type) and issubclass(kind, BaseModel):
            named = definitions[f"Settings.{kind.__name__}"]["properties"]
            assert set(named) == set(kind.model_fields)


def test_closing_fits_what_the_chart_allows_for_it() -> None:
    """The last commit, leaving the group, flushing and closing are bounded, and add up to less."""
    assert sum(BOUNDS_S) <= CLOSING_S
    helpers = (generate.CHART / "templates" / "_helpers.tpl").read_text()
    assert f"$drain $call {CLOSING_S:g} |" in helpers


def test_no_secret_can_stand_in_a_config_map() -> None:
    """The templates refuse each setting that is a secret; a new one needs its sentence."""
    sections = json.loads(json.dumps(Settings.model_json_schema()["$defs"]))
    secret = {
        name
        for section in sections.values()
        for name, one in section.get("properties", {}).items()
        if any(each.get("writeOnly") for each in (one, *one.get("anyOf", [])))
    }
    helpers = (generate.CHART / "templates" / "_helpers.tpl").read_text()
    assert secret >= {"password"}
    refused = re.findall(r"settings\.[a-z_.]+\.([a-z_]+) would stand in a ConfigMap", helpers)
    assert set(refused) == secret
