"""The drill's own arithmetic: what it does to the rules, and what it lets pass."""

import re
from pathlib import Path

import pytest
import yaml

from tests.drill import NOT_WAITED_FOR, PHASES, RULES, Phase, Seen, Stage, faster
from tests.support.prometheus import promtool

SHORT = faster(RULES.read_text())


def test_only_time_runs_faster(tmp_path: Path) -> None:
    """Each duration is a sixtieth, a message is late after 5 s; the rest is as it is shipped, and
    Prometheus takes it."""
    before, after = RULES.read_text(), SHORT
    times = r'\[\d+[smhd]\]|for: \d+[smhd]|le="(?:300|5)\.0"|:max\) > (?:300|5)'
    assert re.sub(times, "", before) == re.sub(times, "", after)
    assert "[60s]" in after
    assert re.findall(r"(?:\[|for: )\d+[mhd]", after) == []
    path = tmp_path / "rules.yml"
    path.write_text(after)
    promtool("check", "rules", str(path))


def test_phases_name_alerts_that_exist() -> None:
    """A misspelt one would never fire, or never be missed."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    there = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    named = set(NOT_WAITED_FOR).union(*(phase.fires | phase.may for phase in PHASES))
    assert named <= there


PHASE = Phase("fire", Stage.nothing, {"A"}, {"B"}, ends=True)


@pytest.mark.parametrize(
    ("fired", "ended_s", "good"),
    [
        ({"A"}, 9.0, True),
        ({"A", "B", "Carried", *NOT_WAITED_FOR}, 9.0, True),
        ({"B"}, 9.0, False),
        ({"A", "C"}, 9.0, False),
        ({"A"}, None, False),
    ],
    ids=["as named", "what may", "missing", "another", "no end"],
)
def test_a_phase_is_judged(fired: set[str], ended_s: float | None, good: bool) -> None:
    """An alert that is missing, one that is not named and one that does not end fail it."""
    seen = Seen(PHASE, 10.0, dict.fromkeys(fired, 1.0), ended_s, frozenset({"Carried"}))
    assert seen.good is good
