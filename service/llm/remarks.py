"""What is said once of a model, however many of its calls show it."""

from __future__ import annotations

import logging

from service.llm.answers import Completion
from service.llm.cascade import Step
from service.llm.conversation import Conversation

CONTEXT_MIN, CONTEXT_STEP = 2048, 1024
"""Contexts that servers cut to are multiples of 1024 tokens, and never smaller."""
CUT_BYTES_PER_TOKEN = 4.4
"""More bytes than English has a token: a request so large that counts as a round number of tokens
was cut. By chance one large request in a thousand counts so, and it is said once."""

log = logging.getLogger(__name__)


def _say_once(step: Step, what: str, sentence: str, *values: object) -> None:
    """A warning of this model, unless `what` was said of it before."""
    if what not in step.warned:
        step.warned.add(what)
        log.warning(sentence, *values)


def warn_of_a_cut(step: Step, talk: Conversation, answer: Completion) -> None:
    """Ollama drops the beginning of what exceeds its context, and says nothing of it."""
    tokens = answer.tokens.input
    if tokens < CONTEXT_MIN or tokens % CONTEXT_STEP:
        return
    if step.request.size_bytes + _bytes(talk.text) > CUT_BYTES_PER_TOKEN * tokens:
        _say_once(
            step,
            "cut",
            "%s seems to have cut a text to its context of %d tokens without a word: give the "
            "server a larger context (Ollama: num_ctx), or set extraction.text_tokens_max",
            step.model,
            tokens,
        )


def warn_of_no_price(step: Step) -> None:
    """A limit of dollars that nobody counts would stop nothing."""
    _say_once(
        step,
        "price",
        "an answer of %s does not say what it has cost: limits.spend_usd_per_hour does not "
        "count it; set a price for the model under prices",
        step.model,
    )


def warn_of_size(step: Step, answer_max_bytes: int) -> None:
    """An answer that was not read to its end: the bound may be too low for this model."""
    _say_once(
        step,
        "answer_max_bytes",
        "an answer of %s was larger than extraction.answer_max_bytes (%d), or packed in a way "
        "that nobody asked for: it was not read",
        step.model,
        answer_max_bytes,
    )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
