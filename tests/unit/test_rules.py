"""Alerts and recording rules: what each has to say, and that promtool agrees."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.core.status import State
from service.telemetry.metrics import CALL_RESULTS, COMMITS, OUTCOMES, RETRY_REASONS
from tests.support.prometheus import exposed_series, promtool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "sluice.rules.yml"
CASES = DEPLOY / "prometheus" / "sluice.rules.test.yml"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDS = {rule["record"]: rule for group in GROUPS for rule in group["rules"] if "record" in rule}
SECTIONS = re.split(r"^## ", RUNBOOK, flags=re.M)[1:]


def test_promtool_accepts_the_rules() -> None:
    """Every expression and template parses, and no rule stands there twice."""
    said = promtool("check", "rules", "--lint-fatal", str(RULES))
    assert f"{len(ALERTS) + len(RECORDS)} rules found" in said


@pytest.mark.timeout(400)  # seconds of CPU for hours of series; a busy machine makes minutes of it
def test_each_alert_fires_and_is_silent() -> None:
    """promtool plays the cases of sluice.rules.test.yml: at each look exactly the alerts that are
    named there fire."""
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


def test_each_alert_has_its_case() -> None:
    """Each fires in some case, and is silent in another: a look names all that fire."""
    looks = [
        {re.findall(r'"(\w+)"', one["labels"])[0] for one in look["exp_samples"]}
        for case in yaml.safe_load(CASES.read_text())["tests"]
        for look in case["promql_expr_test"]
        if "ALERTS" in look["expr"]
    ]
    assert set().union(*looks) == set(ALERTS)
    assert looks.count(set()) > len(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_what_it_means(name: str) -> None:
    """One word of ours first, a known severity, a sentence that stays the same and one that tells
    more, and its section of the runbook."""
    alert = ALERTS[name]
    annotations = alert["annotations"]
    severity = alert["labels"]["severity"]
    assert re.fullmatch(r"Sluice([A-Z][a-z]+)+", name)
    assert severity in ("critical", "warning", "info")
    assert annotations["summary"].endswith(".")
    assert "{{" not in annotations["summary"]
    assert annotations["description"].endswith((".", ").", "is."))
    assert annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    (section,) = [one for one in SECTIONS if one.startswith(f"{name}\n")]
    assert section.split("\n\n")[1].startswith(f"*{severity}.*")


def test_the_runbook_has_no_other_sections() -> None:
    """An alert that is gone takes its section with it, and links lead somewhere."""
    names = {section.split("\n")[0] for section in SECTIONS}
    assert names == set(ALERTS)
    assert set(re.findall(r"\(#(\w+)\)", RUNBOOK)) <= {name.lower() for name in names}


def test_the_runbook_knows_every_state() -> None:
    """Its table explains each value of sluice_state."""
    table = RUNBOOK.split("\n\n## ")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line[:40])}
    assert {state.value for state in State} <= named


def test_recording_rules_say_level_metric_operations() -> None:
    """And each is read by an alert."""
    readers = "".join(alert["expr"] for alert in ALERTS.values())
    for name in RECORDS:
        assert re.fullmatch(r"[a-z_]+:sluice_\w+:\w+", name)
        assert name in readers


def test_every_metric_of_the_rules_exists() -> None:
    """Names and labels in expressions are those of the golden list of metrics."""
    series = exposed_series()
    for rule in (*ALERTS.values(), *RECORDS.values()):
        for name, matchers in re.findall(r"(?<![:\w])(sluice_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            assert name in series, rule
            assert set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", matchers)) <= series[name], rule


def test_reasons_and_states_of_the_rules_exist() -> None:
    """A label's value that no worker exposes would never fire."""
    known = {*RETRY_REASONS, *COMMITS, *OUTCOMES, *CALL_RESULTS, *(one.value for one in State)}
    for rule in (*ALERTS.values(), *RECORDS.values()):
        for label, values in re.findall(r'(reason|result|outcome|state)=~?"([^"]*)"', rule["expr"]):
            assert label
            assert all(one in known or one == "waiting_for_.*" for one in values.split("|")), rule
