"""One request and its answer: sent, read, and each failure given its meaning.

Rules of this file: foreign exceptions end here, since their texts can repeat the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeAlias

import httpx2
import openai
from pydantic_core import from_json

from service.core.messages import Reason
from service.llm.adapting import adapted
from service.llm.answer_text import Mode
from service.llm.answers import BrokenAnswer, Completion, read_completion, with_headers
from service.llm.bounded import ERROR_MAX_BYTES, TooLarge, Undecodable
from service.llm.cascade import Step
from service.llm.charges import Charges
from service.llm.conversation import Conversation
from service.llm.evidence import Evidence
from service.llm.failures import (
    Failure,
    Refused,
    Transient,
    Unserviceable,
    Unsupported,
    from_status,
    from_words,
)
from service.llm.lean import Answered
from service.llm.records import RecordType
from service.llm.remarks import warn_of_a_cut, warn_of_size
from service.llm.request import RequestTemplate
from service.llm.streaming import BrokenStream, Streaming
from service.ports import Publish
from service.settings import ExtractionSettings

ADAPTATIONS_MAX = 8
"""Parameters and forms that one call finds out about; more than there are to be learned."""
BOM = b"\xef\xbb\xbf"

Answer: TypeAlias = Answered | httpx2.Response


class Exchange:
    """Sends requests and reads their answers. It owns the evidence that says whether an unclear
    refusal is the route's fault or the message's."""

    def __init__(
        self, record_type: RecordType, extraction: ExtractionSettings, charges: Charges
    ) -> None:
        """The rate headers of answers go to `charges`."""
        self._record_type, self._extraction, self._charges = record_type, extraction, charges
        self._evidence = Evidence()
        self._streaming = Streaming(
            record_type, extraction.call_timeout_s, extraction.answer_max_bytes
        )

    async def ask(
        self, step: Step, talk: Conversation, publish: Publish | None
    ) -> Completion | Failure:
        """The answer to the next request of `talk`, which is made again at once, in another form,
        where the endpoint does not take this one. Without `publish` the answer is read as a whole,
        and no stream is asked for."""
        for _ in range(ADAPTATIONS_MAX):
            asked = step.asked(talk) if publish is not None else step.asked(talk).whole()
            answer = await self._sent(step, asked, talk, publish)
            if not isinstance(answer, Unsupported):
                break
            if not adapted(step, asked, answer.parameter):
                break
        return answer

    def _sent(
        self, step: Step, asked: RequestTemplate, talk: Conversation, publish: Publish | None
    ) -> Coroutine[Any, Any, Completion | Failure]:
        body = asked.body(asked.opening(talk.text), talk.tail)
        if publish is None:
            return self._send(step, talk, body, asked.form.mode)
        return self._send_streaming(step, body, talk, asked.form.mode, publish)

    def noted(
        self, step: Step, talk: Conversation, answer: Completion | Failure, began_s: float
    ) -> Conversation:
        """Evidence for or against others, or this message."""
        match answer:
            case Completion():
                self._evidence.answered(step.model, began_s)
                warn_of_a_cut(step, talk, answer)
                return replace(talk, refused_s=None)
            case Unserviceable(unclear=True) if talk.refused_s is None:
                return replace(talk, refused_s=time.monotonic())
            case _:
                return talk

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
            self._charges.told_failure(step, error, body, asked_at_s)
            return self._classified(step, talk, error.status_code, error.response)
        except openai.APIConnectionError:
            # The SDK's own timeout too: only connecting has one.
            return Transient("connection")
        except (TooLarge, Undecodable):
            return self._too_large(step)
        self._charges.told(step, response.headers, asked_at_s)
        try:
            completion = read_completion(
                step.connection.endpoint.scrubbed(response.content),
                mode,
                many=self._record_type.many,
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
            self._charges.told_failure(step, error, body, asked_at_s)
            return self._classified(step, talk, error.status_code, error.response)
        except (openai.APIConnectionError, httpx2.HTTPError):
            return Transient("connection")
        except (TooLarge, Undecodable):
            return self._too_large(step)
        except BrokenStream as broken:
            return self._broken(step, talk, broken.error, broken.response)

    def _too_large(self, step: Step) -> Failure:
        warn_of_size(step, self._extraction.answer_max_bytes)
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
