"""Drawing a dashboard: everything is on it, and nothing that is not."""

import math
from typing import Any
from xml.etree import ElementTree

from tests.support.pictures import picture

PANEL: dict[str, Any] = {
    "type": "timeseries",
    "title": "Calls < slots",
    "gridPos": {"x": 0, "y": 0, "w": 12, "h": 8},
    "fieldConfig": {
        "defaults": {"unit": "ops", "custom": {"stacking": {"mode": "normal"}}},
        "overrides": [],
    },
    "targets": [{"expr": "calls", "legendFormat": "{{result}}"}],
}


def texts(results: list[dict[str, Any]]) -> set[str]:
    """What stands on the picture."""
    drawn = picture({"panels": [PANEL]}, lambda _: results, (0.0, 10.0))
    tree = ElementTree.fromstring(drawn)
    return {one.text or "" for one in tree.iter("{http://www.w3.org/2000/svg}text")}


def series(result: str, *values: float) -> dict[str, Any]:
    points = [(float(at), str(value)) for at, value in enumerate(values)]
    return {"metric": {"result": result}, "values": points}


def test_what_moved_is_shown_with_its_legend() -> None:
    """Title, legends and the height of the stack; what was never anything but 0 is left out."""
    shown = texts([series("ok", 1, 3), series("failed", 0, 1), series("cut", 0, 0)])
    assert {"Calls < slots", "ok", "failed", "4/s"} <= shown
    assert "cut" not in shown


def test_nothing_is_said_to_be_nothing() -> None:
    """No series, or none with a number, is no data and no error."""
    assert "no data" in texts([])
    assert "no data" in texts([series("ok", math.nan)])
