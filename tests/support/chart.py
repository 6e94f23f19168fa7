"""The chart as helm renders it, and the golden files of deploy/helm/examples.

`python -m tests.support.chart` writes the golden files anew.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.helm import KUBERNETES, helm

HELM = Path(__file__).parents[2] / "deploy" / "helm"
CHART, EXAMPLES = HELM / "sluice", HELM / "examples"
CASES = sorted(path.parent.name for path in EXAMPLES.glob("*/values.yaml"))


class Refused(Exception):
    """What helm said."""


def rendered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every object of the chart with these values, as release `sluice`; raises `Refused`."""
    command = [helm(), "template", "sluice", str(CHART), "--kube-version", KUBERNETES]
    done = subprocess.run(
        [*command, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise Refused(done.stderr)
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def values_of(case: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / case / "values.yaml").read_text())
    return found


def golden(case: str) -> str:
    """The rendered example as one text; rules and dashboards stand in it by name only, because
    another test compares them with their sources."""
    objects = rendered(values_of(case))
    for each in objects:
        if each["kind"] == "PrometheusRule":
            each["spec"]["groups"] = []
        if "-dashboard-" in each["metadata"]["name"]:
            each["data"] = dict.fromkeys(each["data"], "{}")
    objects.sort(key=lambda each: (each["kind"], each["metadata"]["name"]))
    return yaml.safe_dump_all(objects, sort_keys=False, width=100)


def write() -> None:
    for case in CASES:
        (EXAMPLES / case / "rendered.yaml").write_text(golden(case))


if __name__ == "__main__":
    write()
