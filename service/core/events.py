"""Events: what happened, reported once, for metrics, traces and the summary of a run.

Rules of this file: an event is named in the past tense and frozen, holds no text of a message or
an answer, and takes its labels from closed sets. The part that does something reports it through
the `Observe` that it was built with. Events that occur for every message are named tuples: one
costs a third of what a frozen dataclass costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, assert_never

from service.core.messages import (
    Extracted,
    Outcome,
    Passed,
    Postponed,
    Reason,
    Rejected,
    Skipped,
)

CallResult: TypeAlias = Literal[
    "validated",
    "unsure",
    "invalid",
    "refused",
    "filtered",
    "truncated",
    "too_long",
    "bad_request",
    "user_code",
    "rate_limited",
    "overloaded",
    "timeout",
    "connection",
    "server_error",
    "broken_answer",
    "service",
    "cancelled",
]

Purpose: TypeAlias = Literal["first", "reask", "repeat", "longer", "shorter", "next_model", "probe"]
"""Why a call is made: `first` is a message's first call. `reask` follows an answer that did not
validate, `repeat` an answer that may have been charged but never arrived, `longer` one that was
truncated at its token limit, `shorter` a text that exceeded the context. `next_model` asks a
stronger model. `probe` belongs to no message: it looks whether the provider is back."""

Repair: TypeAlias = Literal[
    "bom", "thoughts", "fence", "prose", "parts", "content", "tool_call", "calls", "object"
]
"""What was unusual in an answer and was read all the same: `bom` a byte order mark, `thoughts`
reasoning before the JSON, `fence` a code fence, `prose` text around the JSON, `parts` content as a
list of parts, `content` JSON in the content although a tool call was asked for, `tool_call` the
reverse, `calls` several tool calls, `object` an object in the place of JSON text."""

OutcomeWord: TypeAlias = Literal["extracted", "rejected", "passed", "skipped", "postponed"]
"""The word for an outcome in metrics and traces; they use no other words for it."""

Client: TypeAlias = Literal["consumer", "producer"]
CacheLookup: TypeAlias = Literal["hit", "miss", "shared", "error", "damaged"]
CacheWrite: TypeAlias = Literal["stored", "too_large", "error"]


@dataclass(frozen=True, slots=True)
class Taken:
    """A poll brought messages into the window."""

    messages: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Fetched messages were not taken: they were fetched under an older epoch, or the tracker
    knows them already (in flight or finished)."""

    messages: int


@dataclass(frozen=True, slots=True)
class Spared:
    """Fetched messages were not called: the completed map says that an earlier holder finished
    them."""

    messages: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """A message got a slot after `waited_s` seconds in the queue."""

    waited_s: float


class Called(NamedTuple):
    """One call ended (re-asks are calls too).

    `tokens_input` includes the cached tokens, `tokens_output` those of reasoning. `cost_usd` is
    None where the cost is not known, 0 where the endpoint reports nothing that is charged.
    """

    model: str
    result: CallResult
    duration_s: float
    tokens_input: int = 0
    tokens_output: int = 0
    reask: bool = False
    tokens_cached: int = 0
    tokens_reasoning: int = 0
    cost_usd: float | None = 0.0
    purpose: Purpose = "first"


@dataclass(frozen=True, slots=True)
class Repaired:
    """An answer had another form than we asked for, and was read all the same."""

    how: Repair


@dataclass(frozen=True, slots=True)
class Retried:
    """A message waits for another attempt; `reason` is that of the call's failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class PublishRetried:
    """A send was not acknowledged and is tried again."""


class Finished(NamedTuple):
    """An outcome was acknowledged by Kafka (or needed no publish).

    All times are in seconds. `publish_s` is the time from the hand-over to the acknowledgement,
    `end_to_end_s` that from the message's own timestamp to the acknowledgement, `lane_wait_s` that
    from the outcome to the hand-over.
    """

    outcome: OutcomeWord
    reason: Reason | None
    records: int
    publish_s: float
    end_to_end_s: float
    lane_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A drain's deadline passed with these calls in flight: they may be paid for again."""

    calls: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit ended; `refused` means a rebalance was faster, which is no fault."""

    result: Literal["ok", "refused", "failed"]
    duration_s: float


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """Partitions were assigned; `kept` of them were held before and keep their running calls."""

    assigned: int
    kept: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class ForeignMetadata:
    """The metadata stored with an offset is damaged or not ours; only the offset was used."""


@dataclass(frozen=True, slots=True)
class OffsetsMissing:
    """The log no longer holds messages that were never read (retention passed them)."""

    messages: int


@dataclass(frozen=True, slots=True)
class ClientReplaced:
    """A Kafka client was replaced by a new one; the log says why."""

    client: Client


@dataclass(frozen=True, slots=True)
class StopForced:
    """A Kafka client did not close in time and was cut off."""

    client: Client


@dataclass(frozen=True, slots=True)
class CacheLooked:
    """The cache was asked for a text's answer; `shared`: a call for the same text is running, and
    the message waits for that call."""

    result: CacheLookup


@dataclass(frozen=True, slots=True)
class CacheWritten:
    """The result cache was asked to store an answer."""

    result: CacheWrite


@dataclass(frozen=True, slots=True)
class CacheSized:
    """The cache in this process holds this much now."""

    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """Kafka has acknowledged `records` records of a streamed answer.

    `first_after_s` is set where they are the first of the call: seconds from the call's beginning.
    """

    records: int
    first_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hedged:
    """A second call was made for a message whose first call took long. `won` says which of the two
    answered first; `none`: neither did."""

    won: Literal["first", "second", "none"]


Event: TypeAlias = (
    Taken
    | Dropped
    | Spared
    | Admitted
    | Called
    | Repaired
    | Retried
    | PublishRetried
    | Finished
    | Abandoned
    | Committed
    | Rebalanced
    | ForeignMetadata
    | OffsetsMissing
    | ClientReplaced
    | StopForced
    | CacheLooked
    | CacheWritten
    | CacheSized
    | Streamed
    | Hedged
)
Observe: TypeAlias = Callable[[Event], None]


def outcome_word(outcome: Outcome) -> OutcomeWord:
    """The outcome as it is counted and traced."""
    match outcome:
        case Extracted():
            return "extracted"
        case Rejected():
            return "rejected"
        case Passed():
            return "passed"
        case Skipped():
            return "skipped"
        case Postponed():
            return "postponed"
        case _:
            assert_never(outcome)
