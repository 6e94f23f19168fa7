"""The extractor: one text in, validated records or a reason out, one call at a time.

instructor says how each mode asks for a schema and how a re-ask is worded; the loop, the clock
and the counting are ours, so that every call can be told, timed and taken up again.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx2
import openai
from instructor.v2.core.errors import ResponseParsingError
from pydantic import BaseModel, ValidationError

from service.core.budgets import Estimate
from service.core.circuit import Circuit
from service.core.errors import (
    CallFailure,
    CannotRun,
    NoRoom,
    NotReachable,
    ServiceFailure,
    TransientFailure,
    WrongSettings,
)
from service.core.events import Called, CallResult, Observe
from service.core.limits import Admission, Limits, Meter
from service.core.messages import Extracted, Provenance, Reason, Rejected
from service.llm.allowance import read_allowance
from service.llm.answers import BrokenAnswer, Completion, read_completion
from service.llm.estimate import Estimator
from service.llm.failures import Failure, Refused, Transient, Unserviceable, from_status
from service.llm.prompt import build_prompt
from service.llm.records import load_record_type
from service.llm.request import RequestTemplate, shows_schema
from service.settings import Settings

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Where calls go when OPENAI_BASE_URL is not set."""
CONNECT_TIMEOUT_S = 15.0
"""A new connection, TLS included; a burst of hundreds at the start takes more than the SDK's 5."""
CHECK_TIMEOUT_S = 15.0
"""The reachability check, from sending to the last byte."""
KEEPALIVE_S = 4.0
"""Idle connections are let go after this: below the 5 s after which uvicorn (vLLM and many
others) closes them, which would cost a call each time both happen at once."""
ANSWER_MAX_CHARS = 16_384
"""What a dead letter shows of the model's last answer."""
DETAIL_MAX_CHARS = 4_096
"""What a dead letter shows of the reason."""
PROBE_TEXT = "Is anybody there?"
"""All that a probe says beside the instructions; nobody reads its answer."""
_NO_KEY = "none"
"""Sent to an endpoint of one's own when no key is set: many need none, the SDK insists."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one message has cost and been told so far; handed back at its next attempt.

    `tail` holds the answers that did not validate and what was said to them, as JSON that goes
    behind the text.
    """

    spent: Provenance
    tail: bytes = field(default=b"", repr=False)
    reasks: int = 0


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one call came to, and what follows: an outcome, a further call, or a failure."""

    result: CallResult
    then: Extracted | Rejected | Conversation | CallFailure


class OpenAIExtractor:
    """`pipeline.Extractor` for any OpenAI-compatible endpoint.

    Building it reads the record type and the environment and raises `WrongSettings` or
    `CannotRun`; `start` needs a running loop.
    """

    def __init__(self, settings: Settings, observe: Observe, meter: Meter | None = None) -> None:
        """Calls are told to `meter`, which is the pipeline's admission."""
        extraction = settings.extraction
        self._meter = meter or Admission(Limits(settings.limits.concurrency), Circuit(_no_jitter))
        self._estimator = Estimator(extraction.output_tokens_max)
        self._extraction = extraction
        self._observe = observe
        self._connections_max = settings.limits.concurrency + 1  # and one for the check
        self._base_url, self._api_key = _endpoint()
        self._place = _shown(self._base_url)
        self.record_type = load_record_type(
            extraction.record, extraction.cardinality, settings.output.key_field
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
        self._unspent = Provenance(
            model=extraction.model,
            prompt_version=self._request.version,
            schema_version=self.record_type.schema_version,
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
        self._client = openai.AsyncOpenAI(
            api_key=self._api_key,
            base_url=self._base_url,
            max_retries=0,  # the pipeline owns retries
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(timeout=timeout, limits=limits),
        )

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
            return _unlisted(self._place, error.status_code)
        except (openai.APIConnectionError, TimeoutError):
            raise NotReachable(
                f"{self._place} does not answer: check OPENAI_BASE_URL, and that the model "
                "endpoint is running."
            ) from None
        return self._model_warning(response)

    def _model_warning(self, response: httpx2.Response) -> str | None:
        try:
            names = [str(row["id"]) for row in response.json()["data"]]
        except (ValueError, TypeError, KeyError):
            return f"{self._place} does not list its models as OpenAI does."
        if self._extraction.model in names:
            return None
        some = ", ".join(names[:5]) or "none"
        return f"{self._place} does not list the model {self._extraction.model!r}; it has: {some}."

    async def call(self, text: str, progress: object | None) -> Extracted | Rejected:
        """One call and its re-asks, from where `progress` left off.

        Raises `TransientFailure` or `ServiceFailure` with the progress to hand back; their
        texts hold nothing of the message. Cancellation cuts the call in flight, and no more.
        """
        talk = progress if isinstance(progress, Conversation) else Conversation(self._unspent)
        try:
            opening = self._request.opening(text)
        except UnicodeEncodeError:
            return Rejected(Reason.UNDECODABLE, "the text holds half a character", talk.spent)
        while True:
            match await self._turn(opening, talk):
                case Conversation() as talk:
                    self._ask_for_room(text, talk)
                case CallFailure() as failure:
                    raise failure
                case outcome:
                    return outcome

    def estimate(self, text: str, progress: object | None) -> Estimate:
        """The tokens of the next call for it, as far as calls before have taught."""
        tail = progress.tail if isinstance(progress, Conversation) else b""
        text_bytes = len(text) if text.isascii() else len(text.encode(errors="replace"))
        size = len(self._request.head) + text_bytes + len(tail) + len(self._request.foot)
        return self._estimator.estimate(self._extraction.model, size)

    def _ask_for_room(self, text: str, talk: Conversation) -> None:
        """Every call counts, re-asks too: one for which there is no room waits without a slot."""
        if not self._meter.again(time.monotonic(), self.estimate(text, talk)):
            raise NoRoom(progress=talk, provenance=talk.spent)

    async def probe(self) -> None:
        """The request of any message with a fixed tiny text. Raises as `call` does; whatever it
        is answered, the provider is there and takes such requests."""
        unspent = Conversation(self._unspent)
        body = self._request.body(self._request.opening(PROBE_TEXT), b"")
        match self._judge(await self._send(body), unspent).then:
            case CallFailure() as failure:
                raise failure

    def _told(self, headers: Mapping[str, str], asked_at_s: float) -> None:
        allowance = read_allowance(headers, asked_at_s)
        if allowance is not None:
            self._meter.told(time.monotonic(), allowance)

    def _used(self, answer: Completion | Failure, size: int, estimate: Estimate) -> None:
        """What is known of a call's tokens; one without an answer keeps what was charged."""
        match answer:
            case Completion(tokens_input=read, tokens_output=written) if read:
                self._meter.used(time.monotonic(), estimate, read + written)
                self._estimator.learn(self._extraction.model, size, read, written)
            case Transient(result="rate_limited" | "overloaded"):
                self._meter.used(time.monotonic(), estimate, 0)

    async def _turn(
        self, opening: bytes, talk: Conversation
    ) -> Extracted | Rejected | Conversation | CallFailure:
        """One call from sending to verdict, told to whoever observes."""
        began = time.monotonic()
        result: CallResult = "cancelled"
        paid = talk
        try:
            body = self._request.body(opening, talk.tail)
            charged = self._estimator.estimate(self._extraction.model, len(body))
            answer = await self._send(body)
            self._used(answer, len(body), charged)
            paid = _paid(talk, answer)
            verdict = self._judge(answer, paid)
            result = verdict.result
            return verdict.then
        finally:
            self._observe(
                Called(
                    model=self._extraction.model,
                    result=result,
                    duration_s=time.monotonic() - began,
                    tokens_input=paid.spent.tokens_input - talk.spent.tokens_input,
                    tokens_output=paid.spent.tokens_output - talk.spent.tokens_output,
                    reask=talk.reasks > 0,
                )
            )

    async def _send(self, body: bytes) -> Completion | Failure:
        """One request. Foreign exceptions end here: their texts can repeat the request.

        What they mean is returned, not raised, so that none of them is chained to ours.
        """
        asked_at_s = time.monotonic()
        try:
            async with asyncio.timeout(self._extraction.call_timeout_s):
                # The SDK's defaults say that it is JSON; said twice, some servers don't read it.
                response = await self._client.post(
                    "/chat/completions", cast_to=httpx2.Response, content=body
                )
        except TimeoutError:
            return Transient("timeout")
        except openai.APIStatusError as error:
            self._told(error.response.headers, asked_at_s)
            return self._classified(error.status_code, error.response, error.body)
        except openai.APIConnectionError:
            # The SDK's own timeout too: only connecting has one.
            return Transient("connection")
        self._told(response.headers, asked_at_s)
        try:
            return read_completion(response.content, self._extraction.mode)
        except BrokenAnswer as broken:
            return self._broken(broken.error, response)

    def _broken(self, error: object, response: httpx2.Response) -> Failure:
        """A 200 without a completion: some gateways wrap an error and its status into it."""
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code <= 599:
            return self._classified(code, response, error)
        return Transient("broken_answer")

    def _classified(self, status: int, response: httpx2.Response, error: object) -> Failure:
        return from_status(
            status, response.headers, error, model=self._extraction.model, base_url=self._place
        )

    def _judge(self, answer: Completion | Failure, talk: Conversation) -> _Verdict:
        match answer:
            case Transient(result, after_s):
                failure = TransientFailure(
                    result, retry_after_s=after_s, progress=talk, provenance=talk.spent
                )
                return _Verdict(result, failure)
            case Unserviceable(reason, remedy):
                lasting = ServiceFailure(
                    reason, remedy=remedy, progress=talk, provenance=talk.spent
                )
                return _Verdict("service", lasting)
            case Refused(why, result, detail):
                return _rejected(result, why, detail, talk)
            case Completion():
                return self._judge_completion(answer, talk)

    def _judge_completion(self, answer: Completion, talk: Conversation) -> _Verdict:
        if answer.refusal is not None:
            return _rejected("refused", Reason.REFUSED, answer.refusal, talk, answer)
        match answer.finish_reason:
            case "content_filter":
                detail = "the provider's content filter cut the answer"
                return _rejected("filtered", Reason.FILTERED, detail, talk, answer)
            case "length":
                detail = f"the answer is longer than {self._extraction.output_tokens_max} tokens"
                return _rejected("truncated", Reason.TRUNCATED, detail, talk, answer)
            case _:
                return self._validated(answer, talk)

    def _validated(self, answer: Completion, talk: Conversation) -> _Verdict:
        try:
            records = self.record_type.records(self._parsed(answer))
        except (ValidationError, ResponseParsingError) as error:
            return self._invalid(answer, talk, error)
        # The user's validators and serializers: what else they raise concerns this message alone.
        except Exception as error:
            return _rejected("user_code", Reason.USER_CODE, _described(error), talk, answer)
        return _Verdict("validated", Extracted(records, talk.spent, uuid.uuid4().hex))

    def _parsed(self, answer: Completion) -> BaseModel:
        """Strict, as instructor is: "30" is no age. Raises what validation raises."""
        if answer.text is None:
            raise ResponseParsingError(
                "No tool calls or function call found in response", mode="TOOLS"
            )
        return self.record_type.answer.model_validate_json(answer.text, strict=True)

    def _invalid(
        self, answer: Completion, talk: Conversation, error: ValidationError | ResponseParsingError
    ) -> _Verdict:
        if talk.reasks >= self._extraction.reasks_max:
            return _rejected("invalid", Reason.INVALID, str(error), talk, answer)
        tail = talk.tail + self._request.reask(answer.message, error)
        return _Verdict("invalid", replace(talk, tail=tail, reasks=talk.reasks + 1))


def _no_jitter(low: float, _: float) -> float:
    return low


def _paid(talk: Conversation, answer: Completion | Failure) -> Conversation:
    """One call more, and its tokens where the answer says them."""
    spent = replace(talk.spent, calls=talk.spent.calls + 1)
    if isinstance(answer, Completion):
        spent = replace(
            spent,
            tokens_input=spent.tokens_input + answer.tokens_input,
            tokens_output=spent.tokens_output + answer.tokens_output,
        )
    return replace(talk, spent=spent)


def _rejected(
    result: CallResult,
    reason: Reason,
    detail: str,
    talk: Conversation,
    answer: Completion | None = None,
) -> _Verdict:
    text = answer.text if answer else None
    return _Verdict(
        result,
        Rejected(
            reason,
            detail[:DETAIL_MAX_CHARS],
            provenance=talk.spent,
            answer=text[:ANSWER_MAX_CHARS] if text else None,
        ),
    )


def _described(error: Exception) -> str:
    """Type and text of an exception of the user's, whose text may fail as well."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _unlisted(place: str, status: int) -> str:
    """What a refused list of models means: a warning, or `CannotRun`."""
    if status == 401:
        raise CannotRun(f"{place} refuses the credentials: set OPENAI_API_KEY to a key it knows.")
    if status >= 500:
        raise NotReachable(f"{place} answers {status}: the model endpoint is not well.")
    return f"{place} does not list its models ({status}); calls may work all the same."


def _endpoint() -> tuple[str, str]:
    """Base URL and key, from where the SDK takes them."""
    base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise WrongSettings(
            "OPENAI_BASE_URL: it must start with http:// or https:// and name a host, "
            "as in http://localhost:8000/v1."
        )
    if url.username is not None or url.password is not None:
        raise WrongSettings(
            "OPENAI_BASE_URL: it must hold no user and no password; keys go into OPENAI_API_KEY."
        )
    if not key.isascii() or not key.isprintable():
        raise WrongSettings("OPENAI_API_KEY: it holds characters that no key has; set it anew.")
    if not key and base_url == DEFAULT_BASE_URL:
        raise CannotRun(
            "OPENAI_API_KEY is not set: set it to a key for api.openai.com, or set "
            "OPENAI_BASE_URL to an endpoint of your own."
        )
    return base_url, key or _NO_KEY


def _shown(base_url: str) -> str:
    """The URL without its query, which may hold a key."""
    return urlsplit(base_url)._replace(query="", fragment="").geturl()
