"""The extractor: one text in, validated records or a reason out, one call at a time.

instructor says how each mode asks for a schema and how a re-ask is worded; the loop, the clock
and the counting are ours, so that every call can be told, timed and taken up again.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

from service.core.admission.admission import Admission, Limits, Meter
from service.core.admission.budgets import NO_TOKENS, Estimate
from service.core.errors import CallFailure
from service.core.events import Called, CallResult, Observe, Repaired
from service.core.messages import Extracted, Part, Reason, Rejected
from service.llm.answers import Completion
from service.llm.cascade import Next
from service.llm.charges import Charges
from service.llm.conversation import Conversation
from service.llm.endpoint import main_endpoint
from service.llm.exchange import Exchange
from service.llm.failures import Failure
from service.llm.models import Models
from service.llm.prices import Bill
from service.llm.records import load_record_type
from service.llm.remarks import warn_of_no_price
from service.llm.request import Question
from service.llm.strictness import Lost
from service.ports import Publish
from service.settings import Settings

DECIDES_ANSWERS = frozenset(
    {
        *("instructions", "examples", "cardinality", "output_tokens_max", "temperature"),
        *("truncated", "too_long", "text_tokens_max", "confidence", "streaming"),
    }
)
"""Settings of extraction that are part of the cache's key. A new one joins them only where another
value would make another answer: else every cache is cold after an upgrade. What is learned of an
endpoint (the form of the question, a limit's name) is not: workers that learn differently would
keep answers from each other."""
PROBE_TEXT = "Is anybody there?"
"""All that a probe says beside the instructions; nobody reads its answer."""


class OpenAIExtractor:
    """`pipeline.Extractor` for any OpenAI-compatible endpoint.

    Building it reads the record type and the environment and raises `WrongSettings` or
    `CannotRun`; `start` needs a running loop.
    """

    def __init__(self, settings: Settings, observe: Observe, meter: Meter | None = None) -> None:
        """Calls are told to `meter`, which is the pipeline's admission."""
        extraction = settings.extraction
        self._extraction = extraction
        self._observe = observe
        self._spend_limited = settings.limits.spend_usd_per_hour is not None
        meter = meter or Admission(Limits(settings.limits.concurrency), _no_jitter)
        self._charges = Charges(meter, extraction.output_tokens_max)
        main = main_endpoint(extraction)
        self.record_type = load_record_type(
            extraction.record,
            extraction.cardinality,
            settings.output.key_field,
            extraction.confidence.field,
            extraction.strict,
        )
        self._question = Question(extraction, self.record_type)
        self._exchange = Exchange(self.record_type, extraction, self._charges)
        self._models = Models(settings, main, self.record_type, self._question)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are asked, in their order; none while none is known."""
        return self._models.names

    @property
    def identity(self) -> str:
        """All that decides an answer beside the text: where it is the same, so is the answer's
        worth. Settings of waits and of attempts play no part in it. Known once the model is."""
        return json.dumps(
            [
                self._models.named,
                self._question.version,
                self.record_type.schema_version,
                self.record_type.code_version,
                self.record_type.key_field,
                self._extraction.model_dump(mode="json", include=set(DECIDES_ANSWERS)),
            ]
        )

    @property
    def why_not_strict(self) -> str | None:
        """What a strict schema would lose, where one was to be sent; to follow "as"."""
        lost, wanted = self.record_type.strict, self._extraction.mode in ("auto", "json_schema")
        asked = wanted and self._extraction.strict == "auto"
        return lost.reason if asked and isinstance(lost, Lost) else None

    async def start(self) -> None:
        """Open the clients; no traffic yet."""
        await self._models.open()

    async def stop(self) -> None:
        """Close the connections; calls in flight are to be cancelled first."""
        await self._models.close()

    async def check(self) -> str | None:
        """Whether the endpoints can be reached, at no cost: None, or a warning in a sentence.

        Where the settings name no model, it is the only one that the endpoint lists. Raises
        `CannotRun` where calls would fail too, and `WrongSettings` where no model can be chosen. An
        endpoint that lists no models is fine where they are named, and so is a key that may call
        but not list.
        """
        return await self._models.check()

    async def stream(
        self, text: str, progress: object | None, publish: Publish
    ) -> Extracted | Rejected:
        """As `call`, but records go out through `publish` while the model writes the next ones.

        The outcome holds those that have not. Each answer has an id of its own: after a re-ask
        the records of the one before belong to no set that is ever complete.
        """
        return await self.call(text, progress, publish)

    async def call(
        self, text: str, progress: object | None, publish: Publish | None = None
    ) -> Extracted | Rejected:
        """One call and its re-asks, from where `progress` left off.

        Raises `TransientFailure` or `ServiceFailure` with the progress to hand back; their
        texts hold nothing of the message. Cancellation cuts the call in flight, and no more.
        """
        then = progress if isinstance(progress, Conversation) else self._begin(text)
        # The first call was charged by the pipeline, which gave the slot.
        charged = self._charges.remembered(text)
        first = True
        while True:
            match then:
                case Conversation():
                    if charged is None:
                        step = self._models.cascade.step(then)
                        charge = self._charges.estimate if first else self._charges.room_for
                        charged = charge(step, then)
                    then = await self._turn(then, publish, charged, further=not first)
                    charged, first = None, False
                case CallFailure():
                    raise then
                case _:
                    return then

    def _begin(self, text: str) -> Next:
        try:
            return self._models.cascade.begin(text)
        except UnicodeEncodeError:
            detail = "the text holds half a character"
            return Rejected(Reason.UNDECODABLE, detail, self._models.cascade.unspent)

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens of the next call for it, as far as calls before have taught. What was said
        here is what that call is charged with, so that it is corrected by what it has used."""
        talk = progress if isinstance(progress, Conversation) else self._begin(text)
        if isinstance(talk, Conversation):
            step = self._models.cascade.step(talk)
            estimate = self._charges.estimate(step, talk)
        else:
            # It is rejected without a call.
            estimate = Estimate(route=self._models.cascade.first.model)
        self._charges.remember(text, estimate)
        return estimate

    def route(self, progress: object | None) -> str:
        """Of the next call: its model's name."""
        cascade = self._models.cascade
        step = cascade.step(progress) if isinstance(progress, Conversation) else cascade.first
        return step.model

    async def probe(self, route: str) -> None:
        """The request of any message to this model with a fixed tiny text, streamed where those
        are. Raises as `call` does; whatever it is answered, the provider is there and takes such
        requests."""
        talk = self._begin(PROBE_TEXT)
        assert isinstance(talk, Conversation), "it is neither long nor broken"
        talk = self._models.cascade.moved(talk, route)
        publish = _to_nobody if self._extraction.streaming else None
        then = await self._turn(replace(talk, purpose="probe"), publish, NO_TOKENS)
        if isinstance(then, CallFailure):
            raise then

    async def _turn(
        self,
        talk: Conversation,
        publish: Publish | None,
        charged: Estimate,
        *,
        further: bool = False,
    ) -> Next:
        """One call from sending to verdict, told to whoever observes; of a `further` one of a
        message the meter hears too."""
        step = self._models.cascade.step(talk)
        began = time.monotonic()
        result: CallResult = "cancelled"
        bill = Bill()
        try:
            size_bytes = self._charges.size_bytes(step, talk)
            answer = await self._exchange.ask(step, talk, publish)
            talk = self._exchange.noted(step, talk, answer, began)
            self._charges.used(step, answer, size_bytes, charged)
            self._repaired(answer)
            bill = step.bill(answer)
            if self._spend_limited and isinstance(answer, Completion) and bill.cost_usd is None:
                warn_of_no_price(step)
            verdict = self._models.cascade.judge(answer, talk.paid(bill))
            result = verdict.result
            if isinstance(verdict.then, CallFailure):
                verdict.then.route = step.model
            elif further and isinstance(answer, Completion):
                self._charges.answered(step)
            return verdict.then
        finally:
            self._observe(
                Called(
                    model=step.model,
                    result=result,
                    duration_s=time.monotonic() - began,
                    tokens_input=bill.tokens.input,
                    tokens_output=bill.tokens.output,
                    reask=talk.reasks > 0,
                    tokens_cached=bill.tokens.cached,
                    tokens_reasoning=bill.tokens.reasoning,
                    cost_usd=bill.cost_usd,
                    purpose=talk.purpose,
                )
            )

    def _repaired(self, answer: Completion | Failure) -> None:
        if isinstance(answer, Completion):
            for how in answer.answer.repairs:
                self._observe(Repaired(how))


async def _to_nobody(_: Part) -> None:
    """What a probe is answered is read and forgotten."""


def _no_jitter(low: float, _: float) -> float:
    return low
