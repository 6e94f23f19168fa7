"""What calls are charged with and what they have used, told to admission with the rate headers.

Rules of this file: no I/O; admission keeps the limits and decides by them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import openai

from service.core.admission.admission import Meter
from service.core.admission.budgets import Estimate
from service.core.errors import NoRoom
from service.llm.allowance import read_allowance
from service.llm.answers import Completion
from service.llm.cascade import Step
from service.llm.conversation import Conversation
from service.llm.estimate import Estimator
from service.llm.failures import Failure, Transient

ESTIMATES_MAX = 10_000
"""What was estimated for messages whose call has not begun; more than ever wait for one. One that
is forgotten is estimated anew."""


class Charges:
    """The estimates of calls to come, and reports to `meter`, which is the pipeline's admission."""

    def __init__(self, meter: Meter, output_tokens_max: int) -> None:
        self._meter = meter
        self._estimator = Estimator(output_tokens_max)
        self._said: dict[int, Estimate] = {}  # by the text's hash, until its call begins
        self._sized: tuple[str | None, int] = (None, 0)

    def remember(self, text: str, estimate: Estimate) -> None:
        """What was said of the next call for this text, until `remembered` takes it."""
        self._said[hash(text)] = estimate
        if len(self._said) > ESTIMATES_MAX:
            del self._said[next(iter(self._said))]

    def remembered(self, text: str) -> Estimate | None:
        """What the pipeline has charged for the text's call, once."""
        return self._said.pop(hash(text), None)

    def estimate(self, step: Step, talk: Conversation) -> Estimate:
        """By the size of the very body that is sent: what quotes, line ends and other scripts take
        there is what was learned from the bodies before."""
        return self._estimator.estimate(step.model, self.size_bytes(step, talk))

    def size_bytes(self, step: Step, talk: Conversation) -> int:
        """The length of the next request's body (`RequestTemplate.body`), without making it."""
        text, size_bytes = self._sized
        if text is not talk.text:  # admission asks again and again for the one that waits
            size_bytes = len(step.request.opening(talk.text))
            self._sized = talk.text, size_bytes
        return step.asked(talk).size_bytes + size_bytes + len(talk.tail)

    def room_for(self, step: Step, talk: Conversation) -> Estimate:
        """Every call counts, re-asks too: one for which there is no room waits without a slot.
        Raises `NoRoom` for it."""
        estimate = self.estimate(step, talk)
        if not self._meter.again(time.monotonic(), estimate):
            raise NoRoom(progress=talk, provenance=talk.spent)
        return estimate

    def told(
        self,
        step: Step,
        headers: Mapping[str, str],
        asked_at_s: float,
        refused: Estimate | None = None,
    ) -> None:
        """An answer's headers; `refused` is the call that was refused for its rate."""
        allowance = read_allowance(headers, asked_at_s)
        if allowance is not None:
            allowance = replace(allowance, route=step.model, refused=refused)
            self._meter.told(time.monotonic(), allowance)

    def told_failure(
        self, step: Step, error: openai.APIStatusError, body: bytes, asked_at_s: float
    ) -> None:
        """The headers of a refusal, and with 429 what the refused call would have used."""
        refused = None
        if error.status_code == 429:
            refused = self._estimator.estimate(step.model, len(body))
        self.told(step, error.response.headers, asked_at_s, refused)

    def used(self, step: Step, answer: Completion | Failure, size: int, charged: Estimate) -> None:
        """What is known of a call's tokens; one without an answer keeps what was charged."""
        match answer:
            case Completion(tokens=tokens) if tokens.input:
                self._meter.used(time.monotonic(), charged, tokens.input + tokens.output)
                self._estimator.learn(step.model, size, tokens.input, tokens.output)
            case Transient(result="rate_limited" | "overloaded"):
                self._meter.used(time.monotonic(), charged, 0)

    def answered(self, step: Step) -> None:
        """A further call of a message was answered."""
        self._meter.answered(time.monotonic(), step.model)
