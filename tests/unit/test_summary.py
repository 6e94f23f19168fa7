"""What a run came to: its last line, and whether every message was rejected."""

import pytest

from service.core.events import Finished, OutcomeWord
from service.core.messages import Reason
from service.telemetry.summary import Summary


def summary(*outcomes: OutcomeWord | Reason) -> Summary:
    """Of messages that ended so; a reason means rejected for it."""
    made = Summary()
    for each in outcomes:
        reason = each if isinstance(each, Reason) else None
        word: OutcomeWord = "rejected" if isinstance(each, Reason) else each
        made.observe(Finished(word, reason, 1 if word == "extracted" else 0, 0.0, 0.0))
    return made


def test_rejects_are_named_by_reason() -> None:
    """How many for which reason, and the command that lists them."""
    said = str(summary("extracted", Reason.INVALID, Reason.REFUSED, Reason.INVALID))
    assert said.startswith("4 messages finished (1 extracted, 3 rejected), 1 record, 0 calls, ")
    assert said.endswith("; rejected: 2 invalid, 1 refused (`sluice dead-letters list` shows them)")


def test_without_rejects_nothing_is_said_of_them() -> None:
    """The line ends with the money."""
    assert str(summary("extracted", "skipped")).endswith("0.0000 USD")


@pytest.mark.parametrize(
    ("outcomes", "all_rejected"),
    [
        ((), False),
        (("skipped",), False),
        ((Reason.INVALID,), True),
        ((Reason.INVALID, "skipped"), True),
        ((Reason.INVALID, "extracted"), False),
        ((Reason.INVALID, "passed"), False),
        ((Reason.INVALID, "postponed"), False),
    ],
)
def test_whether_all_were_rejected(
    outcomes: tuple[OutcomeWord | Reason, ...], all_rejected: bool
) -> None:
    """Of those that something was expected of; no message at all is no failure."""
    assert summary(*outcomes).all_rejected is all_rejected
