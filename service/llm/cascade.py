"""What an answer means for its message: an outcome, one more call, a stronger model, a failure.

The steps are the models of `extraction.model`, in their order. A message goes to the next one
when the present one has refused, was cut off at its limit or could not be validated, or when a
validator or a confidence field asks for it. What passes by itself stays on its step.

Rules of this file: no I/O; `Conversation` holds all state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TypeAlias, assert_never

from instructor.v2.core.errors import ResponseParsingError
from pydantic import BaseModel, ValidationError

from service import NextModel
from service.core.errors import CallFailure, ServiceFailure, TransientFailure, Unclear
from service.core.events import CallResult
from service.core.messages import Extracted, Provenance, Reason, Rejected
from service.llm.answers import Completion
from service.llm.connection import Connection
from service.llm.conversation import Conversation
from service.llm.failures import (
    Failure,
    Malformed,
    Refused,
    Transient,
    Unserviceable,
    Unsupported,
)
from service.llm.prices import Bill, Cost, bill
from service.llm.records import RecordType, new_answer_id
from service.llm.request import Form, RequestTemplate
from service.settings import ExtractionSettings

ANSWER_MAX_CHARS = 16_384
"""What a dead letter shows of the model's last answer."""
DETAIL_MAX_CHARS = 4_096
"""What a dead letter shows of the reason."""
SAID_MAX_CHARS = 500
"""What a dead letter shows of each model that was asked before the last one."""
BYTES_PER_TOKEN = 4
"""An estimate that needs no tokenizer: English has about 4, other scripts about 3."""
OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""Names of the answer's limit: newer models and older servers each know one of them."""
LONGER_FACTOR = 2
"""How much more an answer may take that was cut off at its limit."""
CUTS_MAX = 8
"""Halvings of a text that is over the context: what is left is 1/256 of it."""
MAYBE_CHARGED = frozenset({"timeout", "connection", "broken_answer"})
"""Failures after which the same call is made again although the first may have been charged."""


@dataclass(eq=False, slots=True)
class Step:
    """One model, where it lives, and how it is asked and charged.

    What the endpoint does not take for this model is learned from its refusals, and changes how it
    is asked from then on, but not what.
    """

    model: str
    connection: Connection
    forms: tuple[Form, ...]
    ask_in: Callable[[Form], RequestTemplate]
    longer_max: int
    """Tokens of an answer that is asked for once more because it was cut off."""
    cost: Cost | None
    request: RequestTemplate = field(init=False)
    longer: RequestTemplate = field(init=False)
    not_taken: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    """What was said once of this model."""

    def __post_init__(self) -> None:
        self._ask(self.forms[0])

    def _ask(self, form: Form) -> None:
        request = self.ask_in(form)
        for parameter in self.not_taken:
            request = request.without(parameter, OTHER_NAME.get(parameter))
        self.request, self.longer = request, request.longer(self.longer_max)

    def does_not_take(self, parameter: str) -> bool:
        """Whether it can be asked without: by the limit's other name, or not told at all."""
        other = OTHER_NAME.get(parameter)
        if parameter in self.not_taken or other in self.not_taken:
            return False
        self.not_taken.add(parameter)
        self._ask(self.request.form)
        return True

    def does_not_take_form(self, form: Form) -> bool:
        """Whether there is another one: the first again where the last is refused too, so that
        what is mended at the endpoint is found."""
        at = self.forms.index(form) + 1
        self._ask(self.forms[at % len(self.forms)])
        return at < len(self.forms)

    def sends(self, parameter: str) -> bool:
        return self.request.sends(parameter)

    def asked(self, talk: Conversation) -> RequestTemplate:
        return self.longer if talk.longer else self.request

    def bill(self, answer: Completion | Failure) -> Bill:
        """What a call cost: only answers are charged, as far as endpoints tell."""
        if not isinstance(answer, Completion):
            return Bill()
        return bill(answer.tokens, self.cost, answer.tier, answer.told_usd)


Next: TypeAlias = Extracted | Rejected | Conversation | CallFailure
"""An outcome, a further call, or a failure."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one call came to, and what follows."""

    result: CallResult
    then: Next


class Cascade:
    """The steps, and what leads from one call to the next."""

    def __init__(
        self, steps: Sequence[Step], record_type: RecordType, extraction: ExtractionSettings
    ) -> None:
        self.steps = tuple(steps)
        self._record_type = record_type
        self._extraction = extraction
        self._text_max_bytes = (extraction.text_tokens_max or 0) * BYTES_PER_TOKEN
        self.unspent = Provenance(
            model=steps[0].model,
            prompt_version=steps[0].request.version,
            schema_version=record_type.schema_version,
        )

    def begin(self, text: str) -> Conversation | Rejected:
        """Before the first call. Raises `UnicodeEncodeError` for half a character."""
        talk = Conversation(self.unspent, whole=text, text=text)
        size_bytes = len(text.encode())
        if self._extraction.too_long == "reject" and 0 < self._text_max_bytes < size_bytes:
            return Rejected(
                Reason.TOO_LONG,
                f"the text has about {-(-size_bytes // BYTES_PER_TOKEN)} tokens, "
                f"extraction.text_tokens_max is {self._extraction.text_tokens_max}",
                self.unspent,
            )
        return self._fitting(talk)

    @property
    def first(self) -> Step:
        return self.steps[0]

    def step(self, talk: Conversation) -> Step:
        return self.steps[talk.step]

    def moved(self, talk: Conversation, model: str) -> Conversation:
        """Before its first call, to the step of this model."""
        at = next((n for n, step in enumerate(self.steps) if step.model == model), 0)
        return replace(talk, step=at, spent=replace(talk.spent, model=self.steps[at].model))

    def judge(self, answer: Completion | Failure, talk: Conversation) -> Verdict:
        """What follows from an answer; `talk` has it paid already."""
        match answer:
            case Transient(result, after_s):
                return self._transient(result, after_s, talk)
            case Unserviceable(reason, remedy, unclear):
                kind = Unclear if unclear else ServiceFailure
                lasting = kind(reason, remedy=remedy, progress=talk, provenance=talk.spent)
                return Verdict("service", lasting)
            case Unsupported(_, otherwise):
                return self.judge(otherwise, talk)
            case Malformed(detail, said):
                return self._malformed(detail, said, talk)
            case Refused(Reason.TOO_LONG, _, detail):
                return self._too_long(detail, talk)
            case Refused(why, result, detail):
                return _rejected(result, why, detail, talk)
            case Completion():
                return self._judge_completion(answer, talk)

    # --- what fails -----------------------------------------------------------------------------

    def _transient(self, result: CallResult, after_s: float | None, talk: Conversation) -> Verdict:
        progress = replace(talk, purpose="repeat") if result in MAYBE_CHARGED else talk
        failure = TransientFailure(
            result, retry_after_s=after_s, progress=progress, provenance=talk.spent
        )
        return Verdict(result, failure)

    def _judge_completion(self, answer: Completion, talk: Conversation) -> Verdict:
        if answer.refusal is not None:
            return self._gave_up("refused", Reason.REFUSED, answer.refusal, talk, answer)
        match answer.finish:
            case "filtered":
                detail = "the provider's content filter cut the answer"
                return _rejected("filtered", Reason.FILTERED, detail, talk, answer)
            case "refused":
                detail = "the model declines to answer"
                return self._gave_up("refused", Reason.REFUSED, detail, talk, answer)
            case "truncated":
                return self._truncated(answer, talk)
            case "failed":
                return self._transient("broken_answer", None, talk)
            case "malformed" | "stop":
                return self._validated(answer, talk)
            case _:
                assert_never(answer.finish)

    def _truncated(self, answer: Completion, talk: Conversation) -> Verdict:
        if self._extraction.truncated == "retry" and not talk.longer:
            return Verdict("truncated", replace(talk, longer=True, purpose="longer"))
        limit = self._extraction.output_tokens_max * (LONGER_FACTOR if talk.longer else 1)
        detail = f"the answer is longer than {limit} tokens"
        if answer.thought:
            detail += (
                f", the model's thinking included ({answer.tokens.reasoning or 'some'} tokens of "
                "reasoning): lower extraction.parameters.reasoning_effort or raise "
                "extraction.output_tokens_max"
            )
        return self._gave_up("truncated", Reason.TRUNCATED, detail, talk, answer)

    def _too_long(self, detail: str, talk: Conversation) -> Verdict:
        """Half of what was sent, where a part may stand for the whole."""
        side, kept_bytes = self._extraction.too_long, len(talk.text.encode()) // 2
        if side == "reject" or talk.cuts >= CUTS_MAX or kept_bytes < BYTES_PER_TOKEN:
            return _rejected("too_long", Reason.TOO_LONG, detail, talk)
        cut = talk.shortened(side, kept_bytes)
        return Verdict("too_long", replace(cut, cuts=talk.cuts + 1, purpose="shorter"))

    def _gave_up(
        self,
        result: CallResult,
        reason: Reason,
        detail: str,
        talk: Conversation,
        answer: Completion | str,
    ) -> Verdict:
        """The next model's turn; after the last one the message is rejected."""
        if not self._has_next(talk):
            return _rejected(result, reason, detail, talk, answer)
        said = _said(talk.spent.model, reason, detail[:SAID_MAX_CHARS])
        spent = replace(talk.spent, model=self.steps[talk.step + 1].model, text_cut=None)
        after = Conversation(
            spent,
            whole=talk.whole,
            text=talk.whole,
            purpose="next_model",
            step=talk.step + 1,
            said=(*talk.said, said),
        )
        return Verdict(result, self._fitting(after))

    def _malformed(self, detail: str, said: str, talk: Conversation) -> Verdict:
        """The provider did not hand the answer on: asked again as one that does not validate."""
        error = ResponseParsingError("The answer was no valid JSON for the schema", mode="JSON")
        if talk.reasks >= self._extraction.reasks_max:
            return self._gave_up("invalid", Reason.INVALID, detail, talk, said)
        tail = talk.tail
        if said.strip():
            message = {"role": "assistant", "content": said}
            tail += self.step(talk).request.reask(message, error)
        return Verdict("invalid", replace(talk, tail=tail, reasks=talk.reasks + 1, purpose="reask"))

    def _has_next(self, talk: Conversation) -> bool:
        return talk.step + 1 < len(self.steps)

    def _fitting(self, talk: Conversation) -> Conversation:
        """Cut to the setting's bound, where it is longer and there is one."""
        side, kept_max = self._extraction.too_long, self._text_max_bytes
        if side == "reject" or not 0 < kept_max < len(talk.whole.encode()):
            return talk
        return talk.shortened(side, kept_max)

    # --- what answers ---------------------------------------------------------------------------

    def _validated(self, answer: Completion, talk: Conversation) -> Verdict:
        try:
            if answer.streamed is not None:
                return Verdict("validated", answer.streamed.ended(answer.answer, talk.spent))
            values = self._parsed(answer)
            if self._has_next(talk) and (doubt := self._doubt(values)):
                return self._gave_up("unsure", Reason.INVALID, doubt, talk, answer)
            records = tuple(
                record for value in values for record in self._record_type.records(value)
            )
        except (ValidationError, ResponseParsingError) as error:
            return self._invalid(answer, talk, error)
        except NextModel as wish:
            return self._gave_up("unsure", Reason.INVALID, _described(wish), talk, answer)
        # The user's validators and serializers: what else they raise concerns this message alone.
        except Exception as error:
            return _rejected("user_code", Reason.USER_CODE, _described(error), talk, answer)
        return Verdict("validated", Extracted(records, talk.spent, new_answer_id()))

    def _parsed(self, answer: Completion) -> list[BaseModel]:
        """One value, or with cardinality many one a call. Raises what validation raises."""
        if answer.answer.problem is not None:
            raise ResponseParsingError(answer.answer.problem, mode="TOOLS")
        return [self._record_type.answer_of(text) for text in answer.answer.texts]

    def _doubt(self, values: Sequence[BaseModel]) -> str | None:
        """What the confidence field has against this answer."""
        name, least = self._extraction.confidence.field, self._extraction.confidence.least
        if name is None:
            return None
        for one in (one for value in values for one in self._record_type.values(value)):
            sure = getattr(one, name)
            # None, a word and not-a-number are no confidence either.
            if not (isinstance(sure, int | float | Decimal) and sure >= least):
                return f"{name} is below {least:g}"
        return None

    def _invalid(
        self, answer: Completion, talk: Conversation, error: ValidationError | ResponseParsingError
    ) -> Verdict:
        if talk.reasks >= self._extraction.reasks_max:
            return self._gave_up("invalid", Reason.INVALID, str(error), talk, answer)
        tail = talk.tail + self.step(talk).request.reask(answer.message, error)
        again = replace(talk, tail=tail, reasks=talk.reasks + 1, purpose="reask")
        return Verdict("invalid", again)


def _rejected(
    result: CallResult,
    reason: Reason,
    detail: str,
    talk: Conversation,
    answer: Completion | str | None = None,
) -> Verdict:
    text = answer.answer.shown if isinstance(answer, Completion) else answer
    if talk.said:
        detail = "\n".join((*talk.said, _said(talk.spent.model, reason, detail)))
    return Verdict(
        result,
        Rejected(
            reason,
            detail[:DETAIL_MAX_CHARS],
            provenance=talk.spent,
            answer=text[:ANSWER_MAX_CHARS] if text else None,
        ),
    )


def _said(model: str, reason: Reason, detail: str) -> str:
    return f"{model}: {reason}: {detail}"


def _described(error: Exception) -> str:
    """Type and text of an exception of the user's, whose text may fail as well."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
