"""The real extractor with a provider in memory: real classification and evidence, virtual time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2

from service.core.admission.admission import Admission
from service.llm.answers import Completion, read_completion
from service.llm.cascade import Step
from service.llm.conversation import Conversation
from service.llm.exchange import Exchange
from service.llm.extractor import PROBE_TEXT, OpenAIExtractor
from service.llm.failures import Failure
from service.settings import Settings

Told = tuple[int, Any]
"""A status and a body, which is JSON or text."""


def good(text: str, model: str) -> Told:
    """An answer that validates as the default record."""
    content = json.dumps({"name": "Ada", "age": 36})
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


def refused_by_the_model(model: str) -> Told:
    """What leads to the next model of a cascade."""
    _, body = good("", model)
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "no"}
    return 200, body


class InMemory(Exchange):
    """Its requests go to the provider of `judged` instead of an endpoint."""

    judged: Judged

    async def _send(self, step: Step, talk: Conversation, *_: Any) -> Completion | Failure:
        judged = self.judged
        judged.calls[talk.whole, step.model] += 1
        await asyncio.sleep(judged.latency_s)
        status, body = judged.provider(talk.whole, step.model)
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        if status == 200:
            return read_completion(content, "json_schema", many=False)
        return self._classified(step, talk, status, httpx2.Response(status, content=content))


class Judged(OpenAIExtractor):
    """An extractor whose requests are answered by `provider`, after `latency_s`."""

    def __init__(
        self, admission: Admission, model: str = "small", latency_s: float = 0.1, **settings: Any
    ) -> None:
        given = Settings(
            extraction={"model": model, "mode": "json_schema", **settings},
            prices={name: {"input": 1, "output": 1} for name in model.split(",")},
        )
        super().__init__(given, lambda _: None, admission)
        exchange = InMemory(self.record_type, given.extraction, self._charges)
        exchange.judged = self
        self._exchange = exchange
        self.latency_s = latency_s
        self.provider: Callable[[str, str], Told] = good
        self.calls: Counter[tuple[str, str]] = Counter()
        """By text and model; probes are under `PROBE_TEXT`."""

    def probes(self, model: str = "small") -> int:
        return self.calls[PROBE_TEXT, model]
