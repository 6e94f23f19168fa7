"""The dashboards: up to date, of Grafana's model, and as Grafana's own linter wants them.

tests/data/grafana_dashboard_schema.json is the type `Dashboard` of npm's @grafana/schema 13.2.3
(Apache-2.0), by ts-json-schema-generator. What no linter sees, whether a query returns anything, is
seen by `python -m tests.drill`.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.core.status import State
from service.telemetry.metrics import END_TO_END_EDGES_S
from tests.support.prometheus import exposed_series, load, promtool

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
SCHEMA = Path(__file__).parents[1] / "data" / "grafana_dashboard_schema.json"


dashboard = load(GRAFANA / "dashboard.py")
PAGES: dict[str, Any] = {page.uid: page for page in dashboard.PAGES}


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> Any:
    return PAGES[request.param]


@pytest.fixture
def model(page: Any) -> dict[str, Any]:
    return dict(dashboard.built(page))


def panels(model: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in model["panels"] if panel["type"] != "row"]


def queries(model: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(model) for target in panel["targets"]]


def test_the_file_is_what_its_source_writes(page: Any) -> None:
    """The committed JSON is the output of dashboard.py."""
    assert page.file.read_text() == dashboard.text(page), "run deploy/grafana/dashboard.py"


def test_no_other_files_lie_there() -> None:
    """A page that is gone takes its file with it."""
    assert set((GRAFANA / "dashboards").iterdir()) == {page.file for page in PAGES.values()}


def test_it_is_of_grafanas_model(model: dict[str, Any]) -> None:
    """Every field is one that Grafana knows, with a value of its type."""
    for annotation in model["annotations"]["list"]:
        # Prometheus's own field, which the model leaves to data sources.
        del annotation["expr"]
    jsonschema.validate(model, json.loads(SCHEMA.read_text()))


def test_the_schema_refuses_what_is_wrong(model: dict[str, Any]) -> None:
    """It is not so wide that anything passes."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**model, "refresh": 5}, json.loads(SCHEMA.read_text()))


def test_every_panel_says_what_it_means_and_what_to_do(page: Any, model: dict[str, Any]) -> None:
    """A question and a sentence after it, a title of its own, a unit, a query; the templated data
    source; and none stands on another."""
    shown = panels(model)
    titles = [panel["title"] for panel in shown]
    assert len(set(titles)) == len(titles)
    assert all(re.search(r"\w", title) for title in titles)
    for panel in (panel for row in page.rows for panel in row.panels):
        assert panel.question.endswith("?"), panel.title
        assert panel.remedy.endswith("."), panel.title
    for panel in shown:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        for source in (panel["datasource"], *(one["datasource"] for one in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    assert not overlaps(shown)


def overlaps(shown: list[dict[str, Any]]) -> bool:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in shown)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    return len(cells) != len(set(cells)) or max(x for x, _ in cells) >= dashboard.WIDTH


def test_variables_follow_the_linter(page: Any, model: dict[str, Any]) -> None:
    """A data source called so; job and instance that follow the time range, and where several may
    be chosen, all of them at first. Not where one worker is looked at: its page is for one
    instance. Workers of an instance last, all of them or the only one, which has no number."""
    source, *choices = model["templating"]["list"]
    assert (source["name"], source["label"], source["type"]) == (
        "datasource",
        "Data source",
        "datasource",
    )
    assert [(one["name"], one["label"]) for one in choices] == [
        ("job", "Job"),
        ("instance", "Instance"),
        ("worker", "Worker"),
    ]
    for one in choices:
        assert one["datasource"]["uid"] == "${datasource}"
        assert one["refresh"] == 2
        if page.several or one["name"] == "worker":
            everything = ".*" if one["name"] == "worker" else ".+"
            assert (one["multi"], one["includeAll"], one["allValue"]) == (True, True, everything)


def test_nobody_edits_it_in_place(model: dict[str, Any]) -> None:
    """A change belongs into its source, where it is reviewed."""
    assert model["editable"] is False


def test_every_query_is_bound_to_the_chosen_instances(model: dict[str, Any]) -> None:
    """Two deployments in one Prometheus don't mix, rates span more than one scrape, and no counter
    is shown bare."""
    for query in queries(model):
        selectors = re.findall(r"(?:sluice|process)_\w+\{([^}]*)\}", query)
        assert selectors, query
        assert len(selectors) == len(re.findall(r"(?:sluice|process)_\w+", query)), query
        assert all(dashboard.CHOSEN in selector for selector in selectors), query
        windows = re.findall(r"\[([^\]]*)\]", query)
        assert set(windows) <= {"$__rate_interval"}, query
        counters = re.findall(r"\w+_(?:total|bucket|count|sum)\{", query)
        assert len(re.findall(r"\brate\(", query)) == len(counters), query


def test_every_metric_exists(model: dict[str, Any]) -> None:
    """Names and labels in queries are those of the golden list of metrics."""
    exposed = exposed_series()
    own = {"job", "instance", "worker"}
    for query in queries(model):
        names = set(re.findall(r"sluice_\w+", query))
        assert names <= exposed.keys(), query
        kept = {each for by in re.findall(r" by \(([^)]*)\)", query) for each in by.split(", ")}
        matched = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", query))
        known = set().union(*(exposed[name] for name in names))
        assert (kept | matched) - own <= known, query


def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    """promtool parses each, annotations included."""
    models = [dashboard.built(page) for page in PAGES.values()]
    found = [query for model in models for query in queries(model)]
    found += [one["expr"] for model in models for one in model["annotations"]["list"]]
    rules = [
        {"record": f"query:{number}:x", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(found)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(found)} rules found" in promtool("check", "rules", str(path))


def test_every_state_has_a_colour() -> None:
    """The state panel knows the states that the service has, and no others."""
    assert set(dashboard.STATES) == {state.value for state in State}


def test_late_is_what_the_alerts_call_late() -> None:
    """Dashboard and alerts count at the same edge, and it is one of the histogram's."""
    rules = (GRAFANA.parent / "prometheus" / "sluice.rules.yml").read_text()
    late = set(re.findall(r'sluice_end_to_end_seconds_bucket\{le="([^"]*)"\}', rules))
    assert late == {dashboard.LATE_S}
    assert float(dashboard.LATE_S) in END_TO_END_EDGES_S


def test_it_finds_its_datasource(model: dict[str, Any]) -> None:
    """The uid that it starts with is the one that is provisioned."""
    path = GRAFANA / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    variables = {one["name"]: one for one in model["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
