"""Two thousand walks, none of which finds anything: what they check stands in the package.

They run in processes of their own, in which sets are walked through in the same order each time.
A walk that fails is replayed, and cut down, by `python -m tests.walk --seed N`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.walk.plan import Action, Message, draw, shrink

ROOT = Path(__file__).parents[2]

CHUNKS, SEEDS = 20, 100
"""2,000 seeds; a chunk takes some seconds."""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_walk(chunk: int) -> None:
    """Whatever is drawn: nothing lost, nothing twice, in order, bounded, nobody stuck, all given
    back."""
    command = [sys.executable, "-m", "tests.walk"]
    ended = subprocess.run(
        [*command, "--from", str(chunk * SEEDS), "--seeds", str(SEEDS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_plan_is_cut_down_to_what_it_fails_of() -> None:
    """A fault that needs one message and one action leaves these two, and plain settings."""
    plan = draw(8)

    def fails(candidate: object) -> bool:
        events = candidate.events  # type: ignore[attr-defined]
        kinds = {type(each) for each in events}
        return kinds >= {Message, Action}

    assert fails(plan), "this seed draws no action: take another"
    small = shrink(plan, fails)
    assert len(small.events) == 2
    assert small.knobs == type(small.knobs)()


def test_a_plan_is_drawn_from_its_seed_alone() -> None:
    """So that a seed says everything."""
    assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]
