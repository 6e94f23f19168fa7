"""The extractor: one text in, validated records or a reason out, one call at a time.

instructor says how each mode asks for a schema and how a re-ask is worded; the loop, the clock
and the counting are ours, so that every call can be told, timed and taken up again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import httpx2
import openai
from pydantic_core import from_json

from service.core.admission.admission import Admission, Limits, Meter
from service.core.admission.budgets import NO_TOKENS, Estimate
from service.core.errors import CallFailure, NoRoom, WrongSettings
from service.core.events import Called, CallResult, Observe, Repaired
from service.core.messages import Extracted, Reason, Rejected
from service.llm.allowance import read_allowance
from service.llm.answer_text import Mode
from service.llm.answers import BrokenAnswer, Completion, read_completion, with_headers
from service.llm.bounded import ERROR_MAX_BYTES, TooLarge, Undecodable
from service.llm.cascade import LONGER_FACTOR, OTHER_NAME, Cascade, Next, Step
from service.llm.connection import Connection
from service.llm.conversation import Conversation
from service.llm.endpoint import (
    Endpoint,
    endpoint_of,
    listed_models,
    main_endpoint,
    missing_models,
    only_model,
)
from service.llm.estimate import Estimator
from service.llm.evidence import Evidence
from service.llm.failures import (
    FORM,
    Failure,
    Refused,
    Transient,
    Unserviceable,
    Unsupported,
    from_status,
    from_words,
)
from service.llm.lean import Answered
from service.llm.prices import Bill, cost_of
from service.llm.records import load_record_type
from service.llm.request import Form, Question, RequestTemplate
from service.llm.streaming import BrokenStream, Streaming
from service.llm.strictness import Lost
from service.ports import Publish
from service.settings import Settings

CONTEXT_MIN, CONTEXT_STEP = 2048, 1024
"""Contexts that servers cut to are multiples of 1024 tokens, and never smaller."""
CUT_BYTES_PER_TOKEN = 4.4
"""More bytes than English has a token: a request so large that counts as a round number of tokens
was cut. By chance one large request in a thousand counts so, and it is said once."""
ADAPTATIONS_MAX = 8
"""Parameters and forms that one call finds out about; more than there are to be learned."""
NO_PRICE = (
    "limits.spend_usd_per_hour: no price is known for the model {model!r} at {url}, so that "
    "nothing would ever be counted: set prices: {{{model}: {{input: …, output: …}}}} (US dollars "
    "for a million tokens), or prices: {{{model}: gateway}} where answers tell their cost "
    "(x-litellm-response-cost, usage.cost), or leave the limit out."
)
ESTIMATES_MAX = 10_000
"""What was estimated for messages whose call has not begun; more than ever wait for one. One that
is forgotten is estimated anew."""
BOM = b"\xef\xbb\xbf"
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

Answer: TypeAlias = Answered | httpx2.Response

log = logging.getLogger(__name__)


class OpenAIExtractor:
    """`pipeline.Extractor` for any OpenAI-compatible endpoint.

    Building it reads the record type and the environment and raises `WrongSettings` or
    `CannotRun`; `start` needs a running loop.
    """

    def __init__(self, settings: Settings, observe: Observe, meter: Meter | None = None) -> None:
        """Calls are told to `meter`, which is the pipeline's admission."""
        extraction = settings.extraction
        self._meter = meter or Admission(Limits(settings.limits.concurrency), _no_jitter)
        self._estimator = Estimator(extraction.output_tokens_max)
        self._said: dict[int, Estimate] = {}  # by the text's hash, until its call begins
        self._sized: tuple[str | None, int] = (None, 0)
        self._extraction = extraction
        self._observe = observe
        self._settings = settings
        self._main = main_endpoint(extraction)
        self.record_type = load_record_type(
            extraction.record,
            extraction.cardinality,
            settings.output.key_field,
            extraction.confidence.field,
            extraction.strict,
        )
        self._question = Question(extraction, self.record_type)
        self._evidence = Evidence()
        self._streaming = Streaming(
            self.record_type, extraction.call_timeout_s, extraction.answer_max_bytes
        )
        self._connections = {
            name: self._connection(endpoint_of(name, given))
            for name, given in extraction.endpoints.items()
        }
        self._connection_main = self._connection(self._main)
        self._choose(extraction.model)

    def _connection(self, endpoint: Endpoint) -> Connection:
        connections_max = self._settings.limits.concurrency + 1  # and one for the check
        return Connection(endpoint, connections_max, self._extraction.answer_max_bytes)

    def _choose(self, models: Sequence[str]) -> None:
        """Ask these models; none are known yet where the settings name none."""
        self.models = tuple(models)
        steps = [self._step(model) for model in models or ("",)]
        self._cascade = Cascade(steps, self.record_type, self._extraction)

    def _step(self, model: str) -> Step:
        connection = self._connections.get(model, self._connection_main)
        base_url = connection.endpoint.base_url
        cost = cost_of(model, self._settings.prices, base_url)
        if model and cost is None and self._settings.limits.spend_usd_per_hour is not None:
            raise WrongSettings(NO_PRICE.format(model=model, url=base_url))
        return Step(
            model,
            connection,
            forms=self._question.forms,
            ask_in=partial(self._question.template, model, base_url),
            longer_max=LONGER_FACTOR * self._extraction.output_tokens_max,
            cost=cost,
        )

    @property
    def identity(self) -> str:
        """All that decides an answer beside the text: where it is the same, so is the answer's
        worth. Settings of waits and of attempts play no part in it. Known once the model is."""
        return json.dumps(
            [
                [[step.model, step.connection.endpoint.base_url] for step in self._cascade.steps],
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
        for connection in self._all_connections:
            await connection.open()

    async def stop(self) -> None:
        """Close the connections; calls in flight are to be cancelled first."""
        for connection in self._all_connections:
            await connection.close()

    @property
    def _all_connections(self) -> tuple[Connection, ...]:
        return (self._connection_main, *self._connections.values())

    async def check(self) -> str | None:
        """Whether the endpoints can be reached, at no cost: None, or a warning in a sentence.

        Where the settings name no model, it is the only one that the endpoint lists. Raises
        `CannotRun` where calls would fail too, and `WrongSettings` where no model can be chosen. An
        endpoint that lists no models is fine where they are named, and so is a key that may call
        but not list.
        """
        warnings = [
            await self._look_at(connection)
            for connection in dict.fromkeys(step.connection for step in self._cascade.steps)
        ]
        return " ".join(filter(None, warnings)) or None

    async def _look_at(self, connection: Connection) -> str | None:
        response = await connection.models()
        names = None if isinstance(response, str) else listed_models(response)
        if not self.models:
            self._choose((only_model(connection.endpoint, names),))
        if isinstance(response, str):
            return response
        asked = [step.model for step in self._cascade.steps if step.connection is connection]
        return missing_models(connection.endpoint, asked, names)

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
        charged = self._said.pop(hash(text), None)
        first = True
        while True:
            match then:
                case Conversation():
                    if charged is None:
                        charged = self._estimate(then) if first else self._room_for(then)
                    then = await self._turn(then, publish, charged, further=not first)
                    charged, first = None, False
                case CallFailure():
                    raise then
                case _:
                    return then

    def _begin(self, text: str) -> Next:
        try:
            return self._cascade.begin(text)
        except UnicodeEncodeError:
            detail = "the text holds half a character"
            return Rejected(Reason.UNDECODABLE, detail, self._cascade.unspent)

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens of the next call for it, as far as calls before have taught. What was said
        here is what that call is charged with, so that it is corrected by what it has used."""
        talk = progress if isinstance(progress, Conversation) else self._begin(text)
        if isinstance(talk, Conversation):
            estimate = self._estimate(talk)
        else:
            estimate = Estimate(route=self._cascade.first.model)  # it is rejected without a call
        self._said[hash(text)] = estimate
        if len(self._said) > ESTIMATES_MAX:
            del self._said[next(iter(self._said))]
        return estimate

    def _estimate(self, talk: Conversation) -> Estimate:
        """By the size of the very body that is sent: what quotes, line ends and other scripts take
        there is what was learned from the bodies before."""
        step = self._cascade.step(talk)
        return self._estimator.estimate(step.model, self._size_bytes(step, talk))

    def _size_bytes(self, step: Step, talk: Conversation) -> int:
        text, size_bytes = self._sized
        if text is not talk.text:  # admission asks again and again for the one that waits
            size_bytes = len(step.request.opening(talk.text))
            self._sized = talk.text, size_bytes
        return step.asked(talk).size_bytes + size_bytes + len(talk.tail)

    def _room_for(self, talk: Conversation) -> Estimate:
        """Every call counts, re-asks too: one for which there is no room waits without a slot."""
        estimate = self._estimate(talk)
        if not self._meter.again(time.monotonic(), estimate):
            raise NoRoom(progress=talk, provenance=talk.spent)
        return estimate

    def route(self, progress: object | None) -> str:
        """Of the next call: its model's name."""
        talk = progress if isinstance(progress, Conversation) else None
        return (self._cascade.first if talk is None else self._cascade.step(talk)).model

    async def probe(self, route: str) -> None:
        """The request of any message to this model with a fixed tiny text. Raises as `call` does;
        whatever it is answered, the provider is there and takes such requests."""
        talk = self._begin(PROBE_TEXT)
        assert isinstance(talk, Conversation), "it is neither long nor broken"
        talk = self._cascade.moved(talk, route)
        then = await self._turn(replace(talk, purpose="probe"), None, NO_TOKENS)
        if isinstance(then, CallFailure):
            raise then

    def _told(
        self,
        step: Step,
        headers: Mapping[str, str],
        asked_at_s: float,
        refused: Estimate | None = None,
    ) -> None:
        allowance = read_allowance(headers, asked_at_s)
        if allowance is not None:
            allowance = replace(allowance, route=step.model, refused=refused)
            self._meter.told(time.monotonic(), allowance)

    def _told_failure(
        self, step: Step, error: openai.APIStatusError, body: bytes, asked_at_s: float
    ) -> None:
        refused = None
        if error.status_code == 429:
            refused = self._estimator.estimate(step.model, len(body))
        self._told(step, error.response.headers, asked_at_s, refused)

    def _used(self, step: Step, answer: Completion | Failure, size: int, charged: Estimate) -> None:
        """What is known of a call's tokens; one without an answer keeps what was charged."""
        match answer:
            case Completion(tokens=tokens) if tokens.input:
                self._meter.used(time.monotonic(), charged, tokens.input + tokens.output)
                self._estimator.learn(step.model, size, tokens.input, tokens.output)
            case Transient(result="rate_limited" | "overloaded"):
                self._meter.used(time.monotonic(), charged, 0)

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
        step = self._cascade.step(talk)
        began = time.monotonic()
        result: CallResult = "cancelled"
        bill = Bill()
        try:
            body = step.body(talk)
            for _ in range(ADAPTATIONS_MAX):
                asked = step.asked(talk)
                answer = await self._asked(step, asked, talk, publish)
                if not isinstance(answer, Unsupported):
                    break
                if not self._adapted(step, asked, answer.parameter):
                    break
            talk = self._noted(step, talk, answer, began)
            self._used(step, answer, len(body), charged)
            self._repaired(answer)
            bill = step.bill(answer)
            self._warn_of_no_price(step, answer, bill)
            verdict = self._cascade.judge(answer, talk.paid(bill))
            result = verdict.result
            if isinstance(verdict.then, CallFailure):
                verdict.then.route = step.model
            elif further and isinstance(answer, Completion):
                self._meter.answered(time.monotonic(), step.model)
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

    async def _asked(
        self, step: Step, asked: RequestTemplate, talk: Conversation, publish: Publish | None
    ) -> Completion | Failure:
        body = asked.body(asked.opening(talk.text), talk.tail)
        if publish is None:
            return await self._send(step, talk, body, asked.form.mode)
        return await self._send_streaming(step, body, talk, asked.form.mode, publish)

    def _adapted(self, step: Step, asked: RequestTemplate, parameter: str) -> bool:
        """Whether the same call is to be made again without what was refused: another call may
        have found it out in the meantime."""
        if parameter == FORM:
            return self._another_form(step, asked.form)
        if not step.sends(parameter):
            return parameter in step.not_taken
        if not step.does_not_take(parameter):
            return False
        other = OTHER_NAME.get(parameter)
        log.warning(
            "%s does not take %s for %s: %s from now on",
            step.connection.endpoint.base_url,
            parameter,
            step.model,
            "it is left out" if other is None else f"{other} is sent",
        )
        return True

    def _another_form(self, step: Step, refused: Form) -> bool:
        if step.request.form != refused:
            return True
        there_is = step.does_not_take_form(refused)
        if there_is:
            now = step.request.form
            log.warning(
                "%s does not take the schema %s for %s: it is asked for %s from now on",
                step.connection.endpoint.base_url,
                _described(refused),
                step.model,
                _described(now),
            )
        return there_is

    def _noted(
        self, step: Step, talk: Conversation, answer: Completion | Failure, began_s: float
    ) -> Conversation:
        """Evidence for or against others, or this message."""
        match answer:
            case Completion():
                self._evidence.answered(step.model, began_s)
                self._warn_of_a_cut(step, talk, answer)
                return replace(talk, refused_s=None)
            case Unserviceable(unclear=True) if talk.refused_s is None:
                return replace(talk, refused_s=time.monotonic())
            case _:
                return talk

    def _warn_of_a_cut(self, step: Step, talk: Conversation, answer: Completion) -> None:
        """Ollama drops the beginning of what exceeds its context, and says nothing of it."""
        tokens = answer.tokens.input
        if tokens < CONTEXT_MIN or tokens % CONTEXT_STEP:
            return
        if step.request.size_bytes + _bytes(talk.text) > CUT_BYTES_PER_TOKEN * tokens:
            self._say_once(
                step,
                "cut",
                "%s seems to have cut a text to its context of %d tokens without a word: give the "
                "server a larger context (Ollama: num_ctx), or set extraction.text_tokens_max",
                step.model,
                tokens,
            )

    def _warn_of_no_price(self, step: Step, answer: Completion | Failure, bill: Bill) -> None:
        """A limit of dollars that nobody counts would stop nothing."""
        limited = self._settings.limits.spend_usd_per_hour is not None
        if limited and isinstance(answer, Completion) and bill.cost_usd is None:
            self._say_once(
                step,
                "price",
                "an answer of %s does not say what it has cost: limits.spend_usd_per_hour does not "
                "count it; set a price for the model under prices",
                step.model,
            )

    def _repaired(self, answer: Completion | Failure) -> None:
        if isinstance(answer, Completion):
            for how in answer.answer.repairs:
                self._observe(Repaired(how))

    async def _send(
        self, step: Step, talk: Conversation, body: bytes, mode: Mode
    ) -> Completion | Failure:
        """One request. Foreign exceptions end here: their texts can repeat the request.

        What they mean is returned, not raised, so that none of them is chained to ours.
        """
        asked_at_s = time.monotonic()
        try:
            async with asyncio.timeout(self._extraction.call_timeout_s):
                response = await step.connection.post(body, anew=talk.refused_s is not None)
        except TimeoutError:
            return Transient("timeout")
        except openai.APIStatusError as error:
            self._told_failure(step, error, body, asked_at_s)
            return self._classified(step, talk, error.status_code, error.response)
        except openai.APIConnectionError:
            # The SDK's own timeout too: only connecting has one.
            return Transient("connection")
        except (TooLarge, Undecodable):
            return self._too_large(step)
        self._told(step, response.headers, asked_at_s)
        try:
            completion = read_completion(
                step.connection.endpoint.scrubbed(response.content),
                mode,
                many=self.record_type.many,
            )
        except BrokenAnswer as broken:
            return self._broken(step, talk, broken.error, response)
        return with_headers(completion, response.headers)

    async def _send_streaming(
        self, step: Step, body: bytes, talk: Conversation, mode: Mode, publish: Publish
    ) -> Completion | Failure:
        """As `_send`, and what `publish` raises is none of the model's doing: it passes through."""
        asked_at_s = time.monotonic()
        try:
            return await step.connection.with_key(
                lambda lean: self._streaming.ask(lean, body, mode, publish, talk.spent)
            )
        except TimeoutError:
            return Transient("timeout")
        except openai.APIStatusError as error:
            self._told_failure(step, error, body, asked_at_s)
            return self._classified(step, talk, error.status_code, error.response)
        except (openai.APIConnectionError, httpx2.HTTPError):
            return Transient("connection")
        except (TooLarge, Undecodable):
            return self._too_large(step)
        except BrokenStream as broken:
            return self._broken(step, talk, broken.error, broken.response)

    def _too_large(self, step: Step) -> Failure:
        self._say_once(
            step,
            "answer_max_bytes",
            "an answer of %s was larger than extraction.answer_max_bytes (%d), or packed in a way "
            "that nobody asked for: it was not read",
            step.model,
            self._extraction.answer_max_bytes,
        )
        return Transient("broken_answer")

    def _broken(self, step: Step, talk: Conversation, error: object, response: Answer) -> Failure:
        """A 200 without a completion: some gateways wrap an error and its status into it."""
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, str) and code.isdecimal():
            code = int(code[:3])
        meant = {
            "model": step.model,
            "base_url": step.connection.endpoint.base_url,
            "text": talk.text,
        }
        if isinstance(code, int) and 400 <= code <= 599:
            return from_status(code, response.headers, error, **meant)
        return from_words(response.headers, error, **meant) or Transient("broken_answer")

    def _classified(
        self, step: Step, talk: Conversation, status: int, response: httpx2.Response
    ) -> Failure:
        content = step.connection.endpoint.scrubbed(response.content[:ERROR_MAX_BYTES])
        try:
            body = from_json(content.removeprefix(BOM), allow_inf_nan=False)
        except ValueError:
            body = content.decode(errors="replace")
        failure = from_status(
            status,
            response.headers,
            body,
            model=step.model,
            base_url=step.connection.endpoint.base_url,
            text=talk.text,
        )
        if isinstance(failure, Unserviceable) and failure.unclear:
            return self._whose(step, talk, failure)
        return failure

    def _whose(self, step: Step, talk: Conversation, failure: Unserviceable) -> Failure:
        """A refusal that says nothing is the message's own where others are answered."""
        if self._evidence.is_its_own(step.model, talk.refused_s):
            return Refused(Reason.BAD_REQUEST, "bad_request", failure.detail)
        return failure

    def _say_once(self, step: Step, what: str, sentence: str, *values: object) -> None:
        if what not in step.warned:
            step.warned.add(what)
            log.warning(sentence, *values)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _described(form: Form) -> str:
    return f"as {form.mode}" + (", strict" if form.strict else "")


def _no_jitter(low: float, _: float) -> float:
    return low
