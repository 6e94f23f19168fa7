"""The request's JSON: what is the same for every message once, each text spliced in.

instructor's own handlers say how a schema is asked for and how a re-ask is worded, so that our
requests are instructor's; what they return is serialised once for the whole process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from instructor.v2.core.mode import Mode
from instructor.v2.core.providers import Provider
from instructor.v2.core.registry import mode_registry
from instructor.v2.core.response_model import prepare_response_model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from service.llm.prompt import Prompt, delimited
from service.llm.records import version_of
from service.llm.strictness import allows_strict
from service.settings import ExtractionSettings

_MODES = {"tools": Mode.TOOLS, "json_schema": Mode.JSON_SCHEMA, "json": Mode.JSON}
NAME_MAX_CHARS = 64
"""Of a schema's or a tool's name, as OpenAI allows it."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_ANY_TEXT = "any"
"""Stands for the message's text while the request is prepared."""


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """Bytes around the text, and how to go on when an answer did not validate.

    `version` is a hash of all that is the same for every message, the model's name apart.
    """

    head: bytes
    foot: bytes
    version: str
    _rest: Mapping[str, Any]
    _limit_name: str
    _reask: Callable[..., dict[str, Any]]

    @staticmethod
    def build(
        prompt: Prompt, answer: type[BaseModel], extraction: ExtractionSettings, base_url: str
    ) -> RequestTemplate:
        handlers = mode_registry.get_handlers(Provider.OPENAI, _MODES[extraction.mode])
        _, prepared = handlers.request_handler(
            response_model=prepare_response_model(answer),
            kwargs=_arguments(prompt, extraction, extraction.model[0], base_url),
        )
        *stable, last = prepared.pop("messages")
        prepared = _named(prepared)
        assert last == {"role": "user", "content": delimited(_ANY_TEXT)}
        rest = _with_strict(prepared)
        sent = rest | _streamed(extraction)
        unnamed = {key: value for key, value in rest.items() if key != "model"}
        return RequestTemplate(
            head=b'{"messages":' + _json(stable)[:-1] + b',{"role":"user","content":',
            foot=b"]," + _json(sent)[1:],
            version=version_of([stable, last, unnamed]),
            _rest=sent,
            _limit_name=_limit_name(base_url),
            _reask=handlers.reask_handler,
        )

    def to(self, model: str, output_tokens_max: int) -> RequestTemplate:
        """The same for another model, or with another limit of the answer; of the same version,
        as it asks the same."""
        rest = {**self._rest, "model": model, self._limit_name: output_tokens_max}
        return replace(self, foot=b"]," + _json(rest)[1:], _rest=rest)

    def sends(self, parameter: str) -> bool:
        return parameter in self._rest

    def without(self, parameter: str, other: str | None) -> RequestTemplate:
        """The same, with the parameter under its other name or, without one, left out; of the same
        version, as it asks the same."""
        if parameter not in self._rest:
            return self
        rest = {key: value for key, value in self._rest.items() if key != parameter}
        name = self._limit_name
        if other is not None:
            rest[other] = self._rest[parameter]
            name = other if parameter == name else name
        return replace(self, foot=b"]," + _json(rest)[1:], _rest=rest, _limit_name=name)

    @property
    def size_bytes(self) -> int:
        """All of it but the text and what was said behind it."""
        return len(self.head) + len(self.foot)

    def opening(self, text: str) -> bytes:
        """The text as its message's content. Raises `UnicodeEncodeError` for half a character."""
        return _json(delimited(text))

    def body(self, opening: bytes, tail: bytes) -> bytes:
        """The whole request: `tail` is what was said behind the text."""
        return self.head + opening + b"}" + tail + self.foot

    def reask(self, answer: Mapping[str, Any], error: Exception) -> bytes:
        """What goes behind the text: the answer's message, and what was wrong with it."""
        response = ChatCompletion.construct(choices=[{"index": 0, "message": answer}])
        said = self._reask(kwargs={"messages": []}, response=response, exception=error)
        return b"," + _json(said["messages"])[1:-1]


def _arguments(
    prompt: Prompt, extraction: ExtractionSettings, model: str, base_url: str
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "messages": prompt.ask(_ANY_TEXT),
        "model": model,
        _limit_name(base_url): extraction.output_tokens_max,
    }
    if extraction.temperature is not None:
        arguments["temperature"] = extraction.temperature
    return arguments


def _streamed(extraction: ExtractionSettings) -> dict[str, Any]:
    """Asked for as a stream, the prompt is the same. Its cost is said only on demand."""
    if not extraction.streaming:
        return {}
    return {"stream": True, "stream_options": {"include_usage": True}}


def shows_schema(mode: str, base_url: str) -> bool:
    """Whether the prompt itself has to show the schema to the model.

    OpenAI shows it the response format, and in the other modes instructor or the tools do. Most
    other endpoints (llama.cpp, vLLM) only keep the answer within the schema: the model would
    never read a field's description.
    """
    return mode == "json_schema" and not _is_openai(base_url)


def _limit_name(base_url: str) -> str:
    """OpenAI's newer models refuse max_tokens; many other endpoints know nothing else."""
    return "max_completion_tokens" if _is_openai(base_url) else "max_tokens"


def _is_openai(base_url: str) -> bool:
    return (urlsplit(base_url).hostname or "").endswith((".openai.com", ".openai.azure.com"))


def _with_strict(request: dict[str, Any]) -> dict[str, Any]:
    """instructor never asks chat completions to be strict: do where the schema allows it."""
    form = request.get("response_format", {}).get("json_schema")
    if form is None or not allows_strict(form["schema"]):
        return request
    strict = {"type": "json_schema", "json_schema": {**form, "strict": True}}
    return {**request, "response_format": strict}


def _named(request: dict[str, Any]) -> dict[str, Any]:
    """With a name for schema and tool that OpenAI takes: a generic's holds brackets."""
    form: dict[str, Any] = request.get("response_format", {})
    tools: list[dict[str, Any]] = request.get("tools", [])
    named = dict(request)
    if "json_schema" in form:
        schema = form["json_schema"]
        named["response_format"] = {**form, "json_schema": {**schema, "name": _name(schema)}}
    if tools:
        functions = [{**tool["function"], "name": _name(tool["function"])} for tool in tools]
        named["tools"] = [
            {**tool, "function": function} for tool, function in zip(tools, functions, strict=True)
        ]
    match request.get("tool_choice"):
        case {"type": kind, "function": dict(function)}:
            function = {**function, "name": _name(function)}
            named["tool_choice"] = {"type": kind, "function": function}
    return named


def _name(named: Mapping[str, Any]) -> str:
    return _NOT_IN_NAMES.sub("_", named["name"]).strip("_")[:NAME_MAX_CHARS] or "record"


def _json(value: object) -> bytes:
    """JSON as the SDK writes it: UTF-8 without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
