"""What happened, told once and heard by metrics and by the demo's view.

Rules of this file: past tense, frozen, no text of a message or an answer in them, labels from
closed sets. Whoever does a thing tells it through the `Observe` it was built with. What every
message tells is a named tuple, which costs a third of a frozen dataclass.
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
"""What a call is made for: the message itself, an answer that did not validate, one that may have
been charged and never came, one cut off at its limit, a text over the context, a stronger model; a
probe is for nobody: whether the provider is there again."""

Repair: TypeAlias = Literal[
    "bom", "thoughts", "fence", "prose", "parts", "content", "tool_call", "calls", "object"
]
"""What was passed over in an answer: a byte order mark, thoughts before it, a code fence, prose
around it, content as a list of parts, content where a call of the tool was asked for, a call where
content was, several calls, an object where JSON as text belongs."""

OutcomeWord: TypeAlias = Literal["extracted", "rejected", "passed", "skipped", "postponed"]
"""An outcome as it is counted; the metrics and traces have no other words for it."""

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
    """A fetched message was not taken: an older epoch, or known already (in flight, finished)."""

    messages: int


@dataclass(frozen=True, slots=True)
class Spared:
    """Fetched messages that an earlier holder had finished, as the completed map said."""

    messages: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """A message got a slot after `waited_s` seconds in the queue."""

    waited_s: float


class Called(NamedTuple):
    """One call ended (re-asks are calls too).

    Cached tokens are part of the input's, those of reasoning of the output's. `cost_usd` is None
    where nobody knows it, 0 where nothing was charged as far as the endpoint says.
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
    """An answer was not written as it was asked for, and read all the same."""

    how: Repair


@dataclass(frozen=True, slots=True)
class Retried:
    """A message waits for another attempt; `reason` as in the call's failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class PublishRetried:
    """A send was not acknowledged and is tried again."""


class Finished(NamedTuple):
    """An outcome was acknowledged by Kafka (or needed no publish).

    `publish_s` counts from the hand-over to the acknowledgement, `end_to_end_s` from the
    message's own timestamp, `lane_wait_s` from having the outcome to the hand-over.
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
    """Partitions were assigned; `kept` of them with their running calls."""

    assigned: int
    kept: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class ForeignMetadata:
    """Metadata stored with an offset that is damaged, or not ours: the offset alone counted."""


@dataclass(frozen=True, slots=True)
class OffsetsMissing:
    """The log no longer holds messages that were never read (retention passed them)."""

    messages: int


@dataclass(frozen=True, slots=True)
class ClientReplaced:
    """A client of Kafka's was given up for a new one; the log says why."""

    client: Client


@dataclass(frozen=True, slots=True)
class StopForced:
    """A client of Kafka's did not close in order and was cut off."""

    client: Client


@dataclass(frozen=True, slots=True)
class CacheLooked:
    """A message looked for an answer to its text; shared: it waits for another's call."""

    result: CacheLookup


@dataclass(frozen=True, slots=True)
class CacheWritten:
    """An answer was given to the result cache."""

    result: CacheWrite


@dataclass(frozen=True, slots=True)
class CacheSized:
    """What the cache in this process holds now."""

    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """Kafka has acknowledged `records` of an answer that had not ended, or its last ones.

    `first_after_s`: seconds from the call's beginning, where these are the first of the call.
    """

    records: int
    first_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hedged:
    """A second call was made for a message whose first one took long; `won`: whose answer came
    first, or that neither answered."""

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
