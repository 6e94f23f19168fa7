"""The two states of a run against the seven booleans that they have replaced."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from service.core.phase import Life, Phase, Tenure


@dataclass(frozen=True)
class Booleans:
    """What the pipeline kept before, and what it asked of it."""

    held_out: bool = True
    reassigning: bool = False
    assigned_once: bool = False
    stopping: bool = False
    draining: bool = False
    forced: bool = False
    ending: bool = False

    def revoke(self) -> "Booleans":
        return replace(self, reassigning=True)

    def let_go(self) -> "Booleans":
        return replace(self, held_out=True)

    def hold(self) -> "Booleans":
        return replace(self, held_out=False, reassigning=False, assigned_once=True)

    def stop(self) -> "Booleans":
        return replace(self, stopping=True)

    def force(self) -> "Booleans":
        return replace(self, forced=True, stopping=True)

    def drain(self) -> "Booleans":
        return replace(self, draining=True)

    def end(self) -> "Booleans":
        return replace(self, ending=True)

    @property
    def said(self) -> dict[str, bool]:
        may_take = not (self.stopping or self.reassigning or self.held_out)
        return {
            "may_take": may_take,
            "may_call": not (self.reassigning or self.held_out),
            "may_publish": not self.held_out,
            "clean": self.held_out or self.ending,
            "finishing": self.draining or (self.assigned_once and self.reassigning),
            "assigned_once": self.assigned_once,
            "stopping": self.stopping,
            "draining": self.draining,
            "forced": self.forced,
        }


def steps(life: Life, tenure: Tenure) -> Iterator[str]:
    """What may happen next: a source revokes, lets go and assigns; a run stops, drains, ends."""
    yield from ("stop", "force")
    if life is Life.STOPPING:
        yield "drain"
    if life is Life.DRAINING:
        yield "end"
    yield "hold"
    if tenure is Tenure.FINISHING:
        yield "let_go"
    else:
        yield "revoke"


def reached() -> list[tuple[str, ...]]:
    """A shortest way to each combination of both states and `forced`."""
    found: dict[tuple[Life, Tenure, bool], tuple[str, ...]] = {}
    ways: list[tuple[str, ...]] = [()]
    for way in ways:
        phase = Phase()
        for step in way:
            getattr(phase, step)()
        state = (phase.life, phase.tenure, phase.forced)
        if state in found:
            continue
        found[state] = way
        ways += [(*way, step) for step in steps(phase.life, phase.tenure)]
    return list(found.values())


WAYS = reached()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "nothing")
def test_each_state_allows_what_the_booleans_did(way: tuple[str, ...]) -> None:
    """In every combination that can be reached, and one step further."""
    for more in steps_behind(way):
        phase, before = Phase(), Booleans()
        for step in (*way, *more):
            getattr(phase, step)()
            before = getattr(before, step)()
        assert {name: getattr(phase, name) for name in before.said} == before.said


def steps_behind(way: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    phase = Phase()
    for step in way:
        getattr(phase, step)()
    yield ()
    for step in steps(phase.life, phase.tenure):
        yield (step,)


def test_all_combinations_are_reached() -> None:
    """Four lives, four tenures; forced only once it stops."""
    assert len(WAYS) == 4 * 4 * 2 - 4
