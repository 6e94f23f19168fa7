"""Tokens that a request takes beside its text: `python -m tests.tokens` (needs bpe-openai).

For the default record and instructions, in every mode, against what plain instructor sends for
them; counted as OpenAI's newer models do (o200k_base). What a chat format puts around each message
is not counted, as nobody publishes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from instructor.v2.core.providers import Provider
from instructor.v2.core.registry import mode_registry
from instructor.v2.core.response_model import prepare_response_model

from service.llm.prompt import delimited
from service.llm.records import load_record_type
from service.llm.request import _MODES, Form, Question
from service.settings import Settings

TEXT = "Ada Lovelace is 36 years old."
ELSEWHERE = "http://localhost:8000/v1"
"""Of a server of one's own: there the prompt itself shows the schema."""
BESIDE_MAX = 45
"""Tokens of rules and tags beside text, schema and the user's own instructions."""


def count(text: str) -> int:
    import bpe_openai

    return len(bpe_openai.get_encoding("o200k_base").encode_ordinary(text))


def sent(mode: Any, base_url: str = ELSEWHERE) -> dict[str, Any]:
    """Our request for the text."""
    extraction = Settings(extraction={"model": "m"}).extraction
    question = Question(extraction, load_record_type(extraction.record))
    template = question.template("m", base_url, Form(mode, strict=mode == "json_schema"))
    body: dict[str, Any] = json.loads(template.body(template.opening(TEXT), b""))
    return body


def plain(mode: Any) -> dict[str, Any]:
    """instructor's, as its documentation shows it: instructions and text as two messages."""
    extraction = Settings(extraction={"model": "m"}).extraction
    answer = load_record_type(extraction.record).answer
    handlers = mode_registry.get_handlers(Provider.OPENAI, _MODES[mode])
    _, prepared = handlers.request_handler(
        response_model=prepare_response_model(answer),
        kwargs={
            "messages": [
                {"role": "system", "content": extraction.instructions},
                {"role": "user", "content": TEXT},
            ]
        },
    )
    made: dict[str, Any] = prepared
    return made


def beside() -> int:
    """Rules and tags in json_schema mode, beside text, schema and instructions."""
    extraction = Settings(extraction={"model": "m"}).extraction
    system, user = sent("json_schema")["messages"]
    words, _, schema = system["content"].partition("{")
    assert schema, "the schema is shown"
    rules = count(words) - count(extraction.instructions)
    assert user["content"] == delimited(TEXT)
    return rules + count(user["content"]) - count(TEXT)


def _messages(body: Mapping[str, Any]) -> int:
    return sum(count(message["content"]) for message in body["messages"])


def _schema(body: Mapping[str, Any]) -> int:
    parts = {
        name: body[name] for name in ("response_format", "tools", "tool_choice") if name in body
    }
    return count(json.dumps(parts, separators=(",", ":"))) if parts else 0


def main() -> int:
    print(
        f"text: {count(TEXT)} tokens; rules and tags beside it: {beside()} (at most {BESIDE_MAX})"
    )
    print("| mode | messages | schema beside them | instructor: messages | schema |")
    print("|---|---:|---:|---:|---:|")
    for mode in _MODES:
        ours, theirs = sent(mode), plain(mode)
        figures = (_messages(ours), _schema(ours), _messages(theirs), _schema(theirs))
        print(f"| {mode} | " + " | ".join(map(str, figures)) + " |")
    return int(beside() > BESIDE_MAX)


if __name__ == "__main__":
    sys.exit(main())
