"""The extractor: one text in, validated records or a reason out, one call at a time.

instructor says how each mode asks for a schema and how a re-ask is worded; the loop, the clock
and the counting are ours, so that every call can be told, timed and taken up again.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TypeAlias

import httpx2
import openai

from service.core.errors import CallFailure, NotReachable
from service.core.events import Called, CallResult, Observe
from service.core.messages import Extracted, Reason, Rejected
from service.llm.answers import BrokenAnswer, Completion, read_completion
from service.llm.cascade import LONGER_FACTOR, Cascade, Next, Step
from service.llm.conversation import Conversation
from service.llm.endpoint import endpoint, missing_models, shown, unlisted
from service.llm.failures import Failure, Transient, from_status
from service.llm.lean import Answered, LeanPost
from service.llm.prices import Bill, cost_of
from service.llm.prompt import build_prompt
from service.llm.records import load_record_type
from service.llm.request import RequestTemplate, shows_schema
from service.llm.streaming import BrokenStream, Streaming
from service.settings import Settings
from service.streams import Publish

CONNECT_TIMEOUT_S = 15.0
"""A new connection, TLS included; a burst of hundreds at the start takes more than the SDK's 5."""
CHECK_TIMEOUT_S = 15.0
"""The reachability check, from sending to the last byte."""
KEEPALIVE_S = 4.0
"""Idle connections are let go after this: below the 5 s after which uvicorn (vLLM and many
others) closes them, which would cost a call each time both happen at once."""

Answer: TypeAlias = Answered | httpx2.Response


class OpenAIExtractor:
    """`pipeline.Extractor` for any OpenAI-compatible endpoint.

    Building it reads the record type and the environment and raises `WrongSettings` or
    `CannotRun`; `start` needs a running loop.
    """

    def __init__(self, settings: Settings, observe: Observe) -> None:
        extraction = settings.extraction
        self._extraction = extraction
        self._observe = observe
        self._connections_max = settings.limits.concurrency + 1  # and one for the check
        self._base_url, self._api_key = endpoint()
        self._place = shown(self._base_url)
        self.record_type = load_record_type(
            extraction.record,
            extraction.cardinality,
            settings.output.key_field,
            extraction.confidence.field,
        )
        answer = self.record_type.answer
        prompt = build_prompt(
            extraction.instructions,
            extraction.examples,
            answer,
            many=self.record_type.many,
            show_schema=shows_schema(extraction.mode, self._base_url),
        )
        self._request = RequestTemplate.build(prompt, answer, extraction, self._base_url)
        steps = [self._step(model, settings) for model in extraction.model]
        self._cascade = Cascade(steps, self.record_type, extraction)
        self._streaming = Streaming(self.record_type, extraction.mode, extraction.call_timeout_s)

    def _step(self, model: str, settings: Settings) -> Step:
        limit = settings.extraction.output_tokens_max
        return Step(
            model,
            request=self._request.to(model, limit),
            longer=self._request.to(model, LONGER_FACTOR * limit),
            cost=cost_of(model, settings.prices, self._base_url),
        )

    @property
    def identity(self) -> str:
        """All that decides an answer beside the text: where it is the same, so is the answer's
        worth. Settings of waits and of attempts play no part in it."""
        waits = {"record", "reasks_max", "call_timeout_s", "attempts_max"}
        return json.dumps(
            [
                self._place,
                self._request.version,
                self.record_type.schema_version,
                self.record_type.code_version,
                self.record_type.key_field,
                self._extraction.model_dump(mode="json", exclude=waits),
            ]
        )

    async def start(self) -> None:
        """Open the client; no traffic yet."""
        # Each call has a deadline of its own around it (see `_send`), so reading has none here.
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        limits = httpx2.Limits(
            max_connections=self._connections_max,
            max_keepalive_connections=self._connections_max,
            keepalive_expiry=KEEPALIVE_S,
        )
        http = openai.DefaultAioHttpClient(timeout=timeout, limits=limits)
        self._client = openai.AsyncOpenAI(
            api_key=self._api_key,
            base_url=self._base_url,
            max_retries=0,  # the pipeline owns retries
            timeout=timeout,
            http_client=http,
        )
        self._lean = LeanPost(self._client, http, "/chat/completions")
        await self._lean.open()

    async def stop(self) -> None:
        """Close the connections; calls in flight are to be cancelled first."""
        await self._client.close()

    async def check(self) -> str | None:
        """Whether the endpoint can be reached, at no cost: None, or a warning in a sentence.

        Raises `CannotRun` where calls would fail too. An endpoint that lists no models is fine,
        and so is a key that may call but not list.
        """
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                response = await self._client.get("/models", cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            return unlisted(self._place, error.status_code)
        except (openai.APIConnectionError, TimeoutError):
            raise NotReachable(
                f"{self._place} does not answer: check OPENAI_BASE_URL, and that the model "
                "endpoint is running."
            ) from None
        return missing_models(self._place, self._extraction.model, response)

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
        while True:
            match then:
                case Conversation():
                    then = await self._turn(then, publish)
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

    async def _turn(self, talk: Conversation, publish: Publish | None) -> Next:
        """One call from sending to verdict, told to whoever observes."""
        step = self._cascade.step(talk)
        began = time.monotonic()
        result: CallResult = "cancelled"
        bill = Bill()
        try:
            if publish is None:
                answer = await self._send(step, talk)
            else:
                answer = await self._send_streaming(step, talk, publish)
            bill = step.bill(answer)
            verdict = self._cascade.judge(answer, talk.paid(bill))
            result = verdict.result
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

    async def _send(self, step: Step, talk: Conversation) -> Completion | Failure:
        """One request. Foreign exceptions end here: their texts can repeat the request.

        What they mean is returned, not raised, so that none of them is chained to ours.
        """
        try:
            async with asyncio.timeout(self._extraction.call_timeout_s):
                response = await self._lean.post(step.body(talk))
        except TimeoutError:
            return Transient("timeout")
        except openai.APIStatusError as error:
            return self._classified(step, error.status_code, error.response, error.body)
        except openai.APIConnectionError:
            # The SDK's own timeout too: only connecting has one.
            return Transient("connection")
        try:
            return read_completion(response.content, self._extraction.mode)
        except BrokenAnswer as broken:
            return self._broken(step, broken.error, response)

    async def _send_streaming(
        self, step: Step, talk: Conversation, publish: Publish
    ) -> Completion | Failure:
        """As `_send`, and what `publish` raises is none of the model's doing: it passes through."""
        try:
            return await self._streaming.ask(self._client, step.body(talk), publish, talk.spent)
        except TimeoutError:
            return Transient("timeout")
        except openai.APIStatusError as error:
            return self._classified(step, error.status_code, error.response, error.body)
        except (openai.APIConnectionError, httpx2.HTTPError):
            return Transient("connection")
        except BrokenStream as broken:
            return self._broken(step, broken.error, broken.response)

    def _broken(self, step: Step, error: object, response: Answer) -> Failure:
        """A 200 without a completion: some gateways wrap an error and its status into it."""
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code <= 599:
            return self._classified(step, code, response, error)
        return Transient("broken_answer")

    def _classified(self, step: Step, status: int, response: Answer, error: object) -> Failure:
        return from_status(status, response.headers, error, model=step.model, base_url=self._place)
