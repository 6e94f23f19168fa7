"""Which changes of the state are told in the log, and in what words."""

from dataclasses import replace

import pytest

from service.core.admission.admission import Cause
from service.core.status import State, Status
from service.telemetry.changes import STEADY_S, Changes, sentence, word
from tests.unit.test_probes import WELL

WAITING = replace(
    WELL, state=State.WAITING_FOR_PROVIDER, not_ready=("the endpoint answers 503 for 12 s",)
)


def told(*seen: tuple[float, Status]) -> list[tuple[float, str]]:
    """Which sentences come when, where the status was looked at at these seconds."""
    changes = Changes()
    said = ((at_s, changes.look(status, at_s)) for at_s, status in seen)
    return [(at_s, text) for at_s, text in said if text is not None]


def test_a_wait_is_told_once() -> None:
    """After some seconds, and not again while it lasts, though its seconds count on."""
    longer = replace(WAITING, not_ready=("the endpoint answers 503 for 99 s",))
    seen = ((0, WELL), (1, WAITING), (2, longer), (1 + STEADY_S, longer), (60, WAITING))
    assert told(*seen) == [(1 + STEADY_S, sentence(longer))]


def test_what_passes_is_not_told() -> None:
    """A slow topic goes from idle to running and back with each message."""
    idle = replace(WELL, state=State.IDLE)
    assert told(*((float(n), idle if n % 2 else WAITING) for n in range(100))) == []


def test_the_end_of_a_wait_is_told() -> None:
    """Whoever read that it waits reads that it goes on."""
    seen = ((0, WAITING), (STEADY_S, WAITING), (9, WELL), (9 + STEADY_S, WELL))
    assert [text for _, text in told(*seen)] == [sentence(WAITING), sentence(WELL)]


def test_another_cause_is_another_line() -> None:
    """The state's word may be the same."""
    other = replace(WAITING, not_ready=("the key is refused",))
    seen = ((0, WAITING), (STEADY_S, WAITING), (9, other), (9 + STEADY_S, other))
    assert [text for _, text in told(*seen)] == [sentence(WAITING), sentence(other)]


def test_running_from_the_start_is_not_told() -> None:
    """Nobody waits for that line."""
    assert told((0, WELL), (STEADY_S, WELL), (60, WELL)) == []


@pytest.mark.parametrize("state", State)
def test_every_state_has_its_sentence(state: State) -> None:
    """With its causes and what is under way; the bar has a word for each."""
    said = sentence(replace(WELL, state=state, not_ready=("no broker answers",)))
    assert said.endswith(" (no broker answers; 10 messages taken and not finished)")
    assert word(replace(WELL, state=state))


def test_a_budget_says_which_and_how_long() -> None:
    """Seconds until the next call, by what holds it up."""
    status = replace(
        WELL, state=State.WAITING_FOR_BUDGET, admission_waits={Cause.TOKENS: 12.3, Cause.PACE: 1}
    )
    assert sentence(status) == (
        "waiting for a limit of requests, tokens or money (the next call may start in 12 s "
        "(tokens); the next call may start in 1 s (pace); 10 messages taken and not finished)"
    )
