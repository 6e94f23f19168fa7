"""How many tokens a call will use, before it is sent: learned, offline, without a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.core.admission.budgets import Estimate

BYTES_PER_TOKEN = 3.0
"""Before anything was learned: English has about four, other languages and JSON fewer; too few
tokens would overdraw the budget, too many only start a little slower."""

OUTPUT_TOKENS = 256.0
"""Of an answer, before anything was learned; never more than its limit."""

FORGET = 0.98
"""What is learned counts half after 34 calls."""


@dataclass(slots=True)
class _Learned:
    """Of one model; sums that fade."""

    request_bytes: float = 0.0
    tokens_input: float = 0.0
    calls: float = 0.0
    tokens_output: float = 0.0


@dataclass(slots=True)
class Estimator:
    """Requests' bytes by the ratio that `usage` has shown, and answers by their running mean."""

    output_tokens_max: int
    _learned: dict[str, _Learned] = field(default_factory=dict)

    def estimate(self, model: str, request_bytes: int) -> Estimate:
        """For a request of this size to this model."""
        learned = self._learned.get(model, _Learned())
        ratio = BYTES_PER_TOKEN
        if learned.tokens_input:
            ratio = learned.request_bytes / learned.tokens_input
        output = OUTPUT_TOKENS
        if learned.calls:
            output = learned.tokens_output / learned.calls
        tokens_input = max(1, round(request_bytes / ratio))
        return Estimate(
            tokens_input + round(min(output, self.output_tokens_max)),
            tokens_input + self.output_tokens_max,
            route=model,
        )

    def learn(self, model: str, request_bytes: int, tokens_input: int, tokens_output: int) -> None:
        """What such a request has used; an answer that does not say so teaches nothing."""
        if not tokens_input:
            return
        learned = self._learned.setdefault(model, _Learned())
        learned.request_bytes = FORGET * learned.request_bytes + request_bytes
        learned.tokens_input = FORGET * learned.tokens_input + tokens_input
        learned.calls = FORGET * learned.calls + 1
        learned.tokens_output = FORGET * learned.tokens_output + tokens_output
