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

from instructor.v2.core.mode import Mode as InstructorMode
from instructor.v2.core.providers import Provider
from instructor.v2.core.registry import mode_registry
from instructor.v2.core.response_model import prepare_response_model
from openai.types.chat import ChatCompletion

from service.llm.answer_text import Mode
from service.llm.prompt import Prompt, build_prompt, delimited
from service.llm.records import RecordType, version_of
from service.llm.strictness import Derived
from service.settings import ExtractionSettings

_MODES: Mapping[Mode, InstructorMode] = {
    "tools": InstructorMode.TOOLS,
    "json_schema": InstructorMode.JSON_SCHEMA,
    "json": InstructorMode.JSON,
}
NAME_MAX_CHARS = 64
"""Of a schema's or a tool's name, as OpenAI allows it."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_ANY_TEXT = "any"
"""Stands for the message's text while the request is prepared."""
_DECIDES_NOTHING = frozenset({"service_tier", "cache_control"})
"""Parameters that say how fast or how cheap an answer is made, and not which."""
_STREAMED: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
"""Asks for the answer piece by piece, and for its cost, which a stream says only on demand."""
BREAKPOINT = "cache_control"
"""Up to where a provider is to keep what it has read (Anthropic's, also behind gateways): sent at
the end of what is the same for every message, which is where it belongs."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the schema is asked for."""

    mode: Mode
    strict: bool = False


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """Bytes around the text, and how to go on when an answer did not validate.

    `version` is the prompt's: a hash of all that is asked of every message, whichever model, form
    or name of a limit the endpoint has to be asked with.
    """

    head: bytes
    foot: bytes
    version: str
    form: Form
    _rest: Mapping[str, Any]
    _limit_name: str
    _reask: Callable[..., dict[str, Any]]

    def longer(self, output_tokens_max: int) -> RequestTemplate:
        """The same with another limit of the answer."""
        if self._limit_name not in self._rest:
            return self  # the endpoint takes none
        rest = {**self._rest, self._limit_name: output_tokens_max}
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

    def whole(self) -> RequestTemplate:
        """The same for an answer that is read as a whole: no stream is asked for."""
        if _STREAMED.keys().isdisjoint(self._rest):
            return self
        rest = {key: value for key, value in self._rest.items() if key not in _STREAMED}
        return replace(self, foot=b"]," + _json(rest)[1:], _rest=rest)

    @property
    def size_bytes(self) -> int:
        """All of it but the text and what was said behind it."""
        return len(self.head) + 1 + len(self.foot)

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


class Question:
    """What is asked of every message, whichever model at whichever endpoint is asked.

    Building it raises `WrongSettings` for an example that is none.
    """

    def __init__(self, extraction: ExtractionSettings, record_type: RecordType) -> None:
        self._extraction, self._record_type = extraction, record_type
        self.version = version_of(
            [
                self._prompt(show_schema=False).ask(_ANY_TEXT),
                record_type.answer.model_json_schema(),
                extraction.output_tokens_max,
                extraction.temperature,
                _deciding(extraction.parameters),
                {name: _deciding(one) for name, one in extraction.model_parameters.items()},
            ]
        )

    @property
    def forms(self) -> tuple[Form, ...]:
        """How the schema may be asked for, in the order in which that is tried."""
        extraction = self._extraction
        modes: tuple[Mode, ...] = ("json_schema", "tools", "json")
        if extraction.mode != "auto":
            modes = (extraction.mode,)
        forms = [Form(mode) for mode in modes]
        if "json_schema" in modes and isinstance(self._record_type.strict, Derived):
            forms.insert(0, Form("json_schema", strict=True))
        return tuple(forms)

    def parameters(self, model: str) -> dict[str, Any]:
        """What is sent to this model beside what is ours."""
        extraction = self._extraction
        own = {} if extraction.temperature is None else {"temperature": extraction.temperature}
        return own | extraction.parameters | extraction.model_parameters.get(model, {})

    def template(self, model: str, base_url: str, form: Form) -> RequestTemplate:
        """How it is put to a model, in this form."""
        extraction = self._extraction
        limit_name = _limit_name(base_url)
        parameters = self.parameters(model)
        cache = parameters.pop(BREAKPOINT, None)
        prompt = self._prompt(show_schema=shows_schema(form.mode, base_url))
        handlers = mode_registry.get_handlers(Provider.OPENAI, _MODES[form.mode])
        _, prepared = handlers.request_handler(
            response_model=prepare_response_model(self._record_type.answer),
            kwargs={
                "messages": prompt.ask(_ANY_TEXT),
                "model": model,
                limit_name: extraction.output_tokens_max,
            },
        )
        *stable, last = prepared.pop("messages")
        prepared = _named(prepared)
        assert last == {"role": "user", "content": delimited(_ANY_TEXT)}
        if cache is not None:
            stable[-1] = _with_breakpoint(stable[-1], cache)
        rest = parameters | self._schema(prepared, form) | _streamed(extraction)
        return RequestTemplate(
            head=b'{"messages":' + _json(stable)[:-1] + b',{"role":"user","content":',
            foot=b"]," + _json(rest)[1:],
            version=self.version,
            form=form,
            _rest=rest,
            _limit_name=limit_name,
            _reask=handlers.reask_handler,
        )

    def _prompt(self, *, show_schema: bool) -> Prompt:
        return build_prompt(
            self._extraction.instructions,
            self._extraction.examples,
            self._record_type.answer,
            many=self._record_type.many,
            show_schema=show_schema,
        )

    def _schema(self, prepared: dict[str, Any], form: Form) -> dict[str, Any]:
        """instructor never asks chat completions to be strict: do where a strict schema is to be
        had."""
        strict = self._record_type.strict
        if not form.strict or not isinstance(strict, Derived):
            return prepared
        asked = {**prepared["response_format"]["json_schema"]}
        asked |= {"schema": strict.schema, "strict": True}
        return {**prepared, "response_format": {"type": "json_schema", "json_schema": asked}}


def _deciding(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in _DECIDES_NOTHING}


def _with_breakpoint(message: Mapping[str, Any], cache: object) -> dict[str, Any]:
    part = {"type": "text", "text": message["content"], BREAKPOINT: cache}
    return {**message, "content": [part]}


def _streamed(extraction: ExtractionSettings) -> dict[str, Any]:
    """Asked for as a stream, the prompt is the same."""
    return dict(_STREAMED) if extraction.streaming else {}


def shows_schema(mode: str, base_url: str) -> bool:
    """Whether the prompt itself has to show the schema to the model.

    OpenAI shows it the response format, and in the other modes instructor or the tools do. Most
    other endpoints (llama.cpp, vLLM) only keep the answer within the schema: the model would
    never read a field's description.
    """
    return mode == "json_schema" and not _is_openai(base_url)


def _limit_name(base_url: str) -> str:
    """The first guess: OpenAI's newer models refuse max_tokens; many other endpoints know nothing
    else."""
    return "max_completion_tokens" if _is_openai(base_url) else "max_tokens"


def _is_openai(base_url: str) -> bool:
    return (urlsplit(base_url).hostname or "").endswith((".openai.com", ".openai.azure.com"))


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
