"""Outcomes that the pipeline itself decides on, and the cost of several attempts together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from service.core.admission.admission import Admission
from service.core.errors import CallFailure, NoRoom, ServiceFailure
from service.core.messages import (
    Extracted,
    Passed,
    Postponed,
    Provenance,
    Reason,
    Rejected,
)
from service.core.tracker import UNCLEAN_ENDS_MAX
from service.core.window import Entry


@dataclass(frozen=True, slots=True)
class CutOff:
    """The message's `message_timeout_s` was over; its calls were cancelled without an answer."""


Result: TypeAlias = Extracted | Rejected | CallFailure
"""The result of one attempt: an outcome or a failure."""


def died_before(entry: Entry) -> Rejected | None:
    """The rejection of a message that ran alone when the process died; None for all others."""
    if entry.message.offset != entry.holding.given.alone:
        return None
    return Rejected(
        Reason.PROCESS_DIED,
        f"the process died {UNCLEAN_ENDS_MAX} times with this message unfinished, and once more "
        "while it was the only one that ran",
    )


def overstayed(entry: Entry, message_timeout_s: float | None) -> Rejected:
    """The rejection of a message that had no answer within `message_timeout_s`."""
    assert message_timeout_s is not None, "nothing overstays without a limit"
    return Rejected(
        Reason.EXHAUSTED,
        "not answered within extraction.message_timeout_s "
        f"({message_timeout_s:g} s), while others succeeded",
        provenance=entry.spent,
    )


def given_up(entry: Entry, failure: CallFailure) -> Rejected:
    """The rejection of a message that keeps failing while others succeed."""
    return Rejected(
        Reason.EXHAUSTED,
        f"failed {entry.attempts} times while others succeeded, the last time: {failure.reason}",
        provenance=failure.provenance,
    )


def too_large(entry: Entry, outcome: Extracted | Passed | Postponed) -> Rejected:
    """The rejection of a message whose outcome is too large for its topic."""
    if isinstance(outcome, Postponed):
        detail = "the retry topic takes no message of this size"
        return Rejected(Reason.EXHAUSTED, detail, provenance=entry.spent)
    if isinstance(outcome, Passed):
        return Rejected(Reason.OUTPUT_TOO_LARGE, "the output topic takes no tombstone of this size")
    largest = max((len(record.json) for record in outcome.records), default=0)
    return Rejected(
        Reason.OUTPUT_TOO_LARGE,
        f"the output topic takes no record of this size (the largest has {largest} bytes)",
        provenance=outcome.provenance,
    )


def better(one: Result, other: Result) -> Result:
    """The result that counts of two calls for one message: an answer before `NoRoom`, `NoRoom`
    before a failure.

    Where neither is an answer, the result has the progress of the call with more calls paid for.
    """
    if not isinstance(one, CallFailure):
        return one
    if not isinstance(other, CallFailure):
        return other
    further = one if _calls(one.provenance) > _calls(other.provenance) else other
    if isinstance(one, NoRoom) or isinstance(other, NoRoom):
        return NoRoom(progress=further.progress, provenance=further.provenance)
    return further


def is_answer(result: Result | CutOff) -> bool:
    return isinstance(result, Extracted | Rejected)


def _calls(spent: Provenance | None) -> int:
    return 0 if spent is None else spent.calls


def calls_made(entry: Entry, result: Result) -> int:
    """How many calls this attempt made; 1 where the extractor does not tell."""
    return max(1, _calls(result.provenance) - _calls(entry.spent))


def cost_usd(entry: Entry, result: Result) -> float:
    """The cost of this attempt alone, in US dollars."""
    before_usd = 0.0 if entry.spent is None else entry.spent.cost_usd
    return 0.0 if result.provenance is None else result.provenance.cost_usd - before_usd


def attempts(entry: Entry, spent: Provenance | None) -> int:
    """How many calls were made for a message, for its dead letter and its history.

    They count whether they were answered or not: re-asks, second calls beside the first and calls
    that were cut off too. Where the extractor does not tell its calls, failed attempts are counted
    instead.
    """
    return max(_calls(spent), entry.attempts) + entry.calls_beside


def with_calls_beside(entry: Entry, spent: Provenance) -> Provenance:
    """`spent` with the calls that no answer counts, and their cost (`Entry.calls_beside`)."""
    if not entry.calls_beside:
        return spent
    return replace(
        spent,
        calls=spent.calls + entry.calls_beside,
        cost_usd=spent.cost_usd + entry.beside_usd,
    )


def from_the_cache(outcome: Extracted | Rejected) -> bool:
    """Whether the answer is from the cache, so that it does not show that the provider is
    reachable."""
    return outcome.provenance is not None and outcome.provenance.cached


def sentence(failure: CallFailure, route: str) -> str:
    """The sentence in /readyz while the route's circuit is open."""
    model = f"the model {route}" if route else "the model"
    if isinstance(failure, ServiceFailure):
        return f"calls to {model} fail ({failure.reason}): {failure.remedy}"
    return f"calls to {model} fail ({failure.reason}); they are tried again"


def tell_the_circuit(
    admission: Admission, now_s: float, route: str, failure: CallFailure, *, service: bool
) -> None:
    """Report a failed call or probe to the route's circuit. `service`: no other call can succeed
    either."""
    admission.routes.failed(
        now_s,
        sentence(failure, route),
        service=service,
        retry_after_s=failure.retry_after_s,
        route=route,
    )


def earliest(one_s: float | None, other_s: float | None) -> float | None:
    """The earlier of two moments, each of which may be None."""
    if one_s is None or other_s is None:
        return one_s if other_s is None else other_s
    return min(one_s, other_s)
