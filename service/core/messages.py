"""The values that travel from input to output.

Rules of this file: frozen values only, no behaviour beyond reading them; bytes stay bytes, so
that a dead letter can be the message again, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self, TypeAlias

Headers: TypeAlias = tuple[tuple[str, bytes | None], ...]


class Partition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class Coordinates(NamedTuple):
    """Where a message stands in the log; unique as long as its topic is not made again."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


@dataclass(frozen=True, slots=True)
class Message:
    """One input Kafka record, as it stands in the log.

    `epoch` numbers the assignment under which it was fetched: an outcome whose epoch is not the
    partition's present one is neither published nor committed.
    """

    partition: Partition
    offset: int
    epoch: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    trace: Headers = ()
    """The headers of the trace that the outputs belong to. Empty: the outputs carry the trace
    headers of the message itself."""
    topic_id: str = ""
    """The id of its topic; a topic that is deleted and made again has another. Empty: not known."""

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.partition.topic, self.partition.partition, self.offset)

    @property
    def size_bytes(self) -> int:
        """Bytes that the window counts: key and value."""
        return len(self.key or b"") + len(self.value or b"")


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll returned.

    `positions` holds, for each held partition whose position is known, the offset of the next
    message to be fetched *after these messages*: it steps over transaction markers and aborted
    messages, which are never delivered. It travels with the messages so that nobody can read a
    position that is ahead of what was delivered. `ends` holds the end of each partition where
    it is known (last stable offset), for the lag.
    """

    messages: tuple[Message, ...] = ()
    positions: Mapping[Partition, int] = field(default_factory=dict)
    ends: Mapping[Partition, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A validated pydantic value that the model filled, as JSON (UTF-8).

    `key` is set where the output's key is a field of the record (`output.key_field`); None means
    the message's key.
    """

    json: bytes
    key: bytes | None = None


class TextCut(NamedTuple):
    """How much of a text, as UTF-8, the model was shown."""

    kept_bytes: int
    text_bytes: int

    def __str__(self) -> str:
        return f"{self.kept_bytes}/{self.text_bytes}"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an answer came from and what it cost, over all calls made for one message.

    `model` is the one that answered, or the last one asked.

    `tokens_cached` is the part of the input tokens that the provider read from its own cache,
    `tokens_reasoning` the part of the output tokens that was reasoning. `cost_usd` is the cost of
    the calls whose price is known, `calls_unpriced` the number of the others. `cached`: the answer
    comes from our result cache. `text_cut` is set where the model was not shown the whole text.
    """

    model: str
    prompt_version: str
    schema_version: str
    calls: int = 0
    tokens_input: int = 0
    tokens_output: int = 0
    tokens_cached: int = 0
    tokens_reasoning: int = 0
    cost_usd: float = 0.0
    cached: bool = False
    calls_unpriced: int = 0
    text_cut: TextCut | None = None
    cost_by_model: tuple[tuple[str, float], ...] = ()
    """What each model that was asked has cost, in the order of the cascade."""

    def and_one_call(
        self,
        tokens_input: int,
        tokens_output: int,
        tokens_cached: int,
        tokens_reasoning: int,
        cost_usd: float | None,
    ) -> Self:
        """This provenance with one more call in it. All fields are written out because `replace`
        would take as long as the rest of a call's accounting."""
        return type(self)(
            self.model,
            self.prompt_version,
            self.schema_version,
            self.calls + 1,
            self.tokens_input + tokens_input,
            self.tokens_output + tokens_output,
            self.tokens_cached + tokens_cached,
            self.tokens_reasoning + tokens_reasoning,
            self.cost_usd + (cost_usd or 0.0),
            self.cached,
            self.calls_unpriced + (cost_usd is None),
            self.text_cut,
            self._cost_by_model(cost_usd or 0.0),
        )

    def _cost_by_model(self, cost_usd: float) -> tuple[tuple[str, float], ...]:
        before = self.cost_by_model
        if before and before[-1][0] == self.model:
            return (*before[:-1], (self.model, before[-1][1] + cost_usd))
        return (*before, (self.model, cost_usd))


class Reason(StrEnum):
    """Why a message was rejected; also a metric's label, so the set is closed."""

    INVALID = "invalid"  # the answer did not validate, re-asks included
    REFUSED = "refused"  # the model declined
    FILTERED = "filtered"  # the provider's content filter cut the answer
    TRUNCATED = "truncated"  # the answer hit the output token limit
    TOO_LONG = "too_long"  # text above input.text_max_bytes, or above the model's context
    UNDECODABLE = "undecodable"  # the value is not UTF-8, not JSON or has no such field
    BAD_REQUEST = "bad_request"  # the provider refused this very request (400, 422)
    USER_CODE = "user_code"  # an exception in the user's own code
    EXHAUSTED = "exhausted"  # kept failing while others succeeded
    PROCESS_DIED = "process_died"  # it ran alone when the process died, after others had died too
    OUTPUT_TOO_LARGE = "output_too_large"  # the output topic does not take a value of this size


@dataclass(frozen=True, slots=True)
class Extracted:
    """The records of one message; no records is a valid answer too.

    `earlier` counts the records of the same answer that were published as `Part`s while the model
    was writing it. `records` holds only those behind them.
    """

    records: tuple[Record, ...]
    provenance: Provenance
    answer_id: str
    earlier: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message failed for good; it becomes a dead letter that says why.

    `detail` and `answer` may hold text of the message or of the model. They go into the dead
    letter and never into a log, a metric or an exception.
    """

    reason: Reason
    detail: str
    provenance: Provenance | None = None
    attempts: int = 0
    first_failed_at_ms: int | None = None
    answer: str | None = None
    records_out: int = 0
    """How many records of its unfinished answers are in the output topic; readers drop them."""


@dataclass(frozen=True, slots=True)
class Passed:
    """The message is a tombstone and is handed on to the output."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """The message is finished on purpose without a publish."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """The message is finished here and goes to the retry topic, to be tried again later. `carries`
    are the headers that are put behind its own (core/history.py)."""

    carries: Headers


Outcome: TypeAlias = Extracted | Rejected | Passed | Skipped | Postponed


@dataclass(frozen=True, slots=True)
class Part:
    """One record of an answer that the model is still writing; never the answer's last record.

    The provenance names the model and the versions already; tokens and cost are not known yet.
    """

    record: Record
    index: int
    answer_id: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Aborted:
    """An answer that will never be completed, although `records` of its records are published."""

    answer_id: str
    records: int
    provenance: Provenance


Publishable: TypeAlias = Outcome | Part | Aborted
