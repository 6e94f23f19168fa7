"""Where the JSON stands in an answer: what is passed over, and what is never chosen."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from service.llm.answer_text import TWO_CALLS, TWO_OBJECTS, Mode, beginning_of, read_message
from service.llm.answers import TOKENS_MAX, BrokenAnswer, read_completion, read_usage
from service.llm.streaming import Opening

ANN = '{"name":"Ann","age":30}'
BO = '{"name":"Bo","age":5}'


def call(arguments: object, number: int = 1) -> dict[str, Any]:
    function = {"name": "Person", "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


@pytest.mark.parametrize(
    ("content", "repairs"),
    [
        (ANN, ()),
        (f"  {ANN}\n", ()),
        (f"\ufeff{ANN}", ("bom",)),
        (f"\n\ufeff {ANN}", ("bom",)),
        (f"```json\n{ANN}\n```", ("fence",)),
        (f"```\n{ANN}```", ("fence",)),
        (f"Here you are:\n\n```JSON\n{ANN}\n```\nAnything else?", ("fence",)),
        (f"Sure! {ANN}", ("prose",)),
        (f"{ANN}\nI hope that this helps.", ("prose",)),
        (f"In {{braces}} and {{ more }}: {ANN}", ("prose",)),
        (f"<think>Ann, 30.</think>{ANN}", ("thoughts",)),
        (f"<think>\n</think>\n\n```json\n{ANN}\n```", ("thoughts", "fence")),
        (f"<think>Perhaps {BO}? No.</think>\n{ANN}", ("thoughts",)),
        (f"<thinking>a</thinking> <reasoning>b</reasoning> {ANN}", ("thoughts",)),
        (f"The text says 30, so {BO} is wrong.\n</think>\n\n{ANN}", ("thoughts",)),
        (
            f"<|channel|>analysis<|message|>{BO}<|end|><|channel|>final<|message|>{ANN}",
            ("thoughts",),
        ),
        (
            f"<|start|>assistant<|channel|>analysis<|message|>{BO}<|end|><|start|>assistant"
            f"<|channel|>final <|constrain|>JSON<|message|>{ANN}",
            ("thoughts",),
        ),
        (f"\ufeff<think>x</think>Answer: {ANN}", ("bom", "thoughts", "prose")),
    ],
)
@pytest.mark.parametrize("mode", ["json_schema", "json"])
def test_what_stands_around_the_object_is_passed_over(
    content: str, repairs: tuple[str, ...], mode: Mode
) -> None:
    """The one object is taken, and each leniency is told."""
    found = read_message({"content": content}, mode, many=False)
    assert (found.texts, found.repairs, found.problem) == ((ANN,), repairs, None)
    assert content[found.start :].startswith(ANN)


@pytest.mark.parametrize(
    "text",
    [
        '{"name":"</think>{}","age":30}',
        '{"name":"```json {\\"name\\":\\"Eve\\"}```","age":30}',
        '{"name":"a \\" } { \\\\","age":30}',
        '{"name":{"first":"Ann","last":{"of":"}"}}}',
        "{}",
    ],
)
@pytest.mark.parametrize("around", ["{}", "so: {}.", "```json\n{}\n```", "<think>x</think>{}"])
def test_what_stands_within_a_string_is_data(text: str, around: str) -> None:
    """Whatever a message gets the model to write into a field, it is no end and no beginning."""
    found = read_message({"content": around.replace("{}", text, 1)}, "json", many=False)
    assert found.texts == (text,)


@pytest.mark.parametrize(
    "content",
    [
        f"{ANN} or {BO}, I am not sure",
        f"```json\n{ANN}\n```\nor\n```json\n{BO}\n```",
        f"First {ANN} then {ANN}.",
    ],
)
def test_two_objects_are_none(content: str) -> None:
    """Which one is meant is not ours to say, even where they are the same."""
    found = read_message({"content": content}, "json_schema", many=False)
    assert (found.texts, found.problem) == ((), TWO_OBJECTS)


@pytest.mark.parametrize(
    "content",
    [
        f'{{"broken": {ANN}, }} is it',
        f'so: {{"broken": {ANN}',
        f"<think>perhaps {ANN}",
        f"<|channel|>analysis<|message|>perhaps {ANN}",
        f"so: [{ANN}]",
    ],
)
def test_a_part_of_something_broken_is_never_taken(content: str) -> None:
    """An object within a broken one, in a list, or in thoughts without end is no answer."""
    found = read_message({"content": content}, "json_schema", many=False)
    assert ANN not in found.texts


PARTS = [{"type": "reasoning", "summary": []}, {"type": "text", "text": ANN}]


@pytest.mark.parametrize(
    ("mode", "message", "repairs"),
    [
        ("json_schema", {"content": PARTS}, ("parts",)),
        ("json", {"content": [{"type": "text", "text": ANN[:9]}, ANN[9:]]}, ("parts",)),
        ("json", {"content": [{"type": "thinking", "thinking": BO}, *PARTS]}, ("parts",)),
        ("json", {"content": json.loads(ANN)}, ("object",)),
        ("json", {"content": "", "tool_calls": [call(ANN)]}, ("tool_call",)),
        ("json_schema", {"content": None, "tool_calls": [call(ANN)]}, ("tool_call",)),
        ("json", {"content": ANN, "tool_calls": [call(BO)]}, ()),
        ("json", {"content": None, "function_call": {"arguments": ANN}}, ("tool_call",)),
        ("tools", {"content": None, "tool_calls": [call(ANN)]}, ()),
        ("tools", {"content": f"I shall call {BO}", "tool_calls": [call(ANN)]}, ()),
        ("tools", {"tool_calls": [call(json.loads(ANN))]}, ("object",)),
        ("tools", {"content": None, "function_call": {"arguments": ANN}}, ("tool_call",)),
        ("tools", {"content": ANN}, ("content",)),
        ("tools", {"content": f"```json\n{ANN}\n```", "tool_calls": []}, ("content", "fence")),
        ("tools", {"content": PARTS}, ("content", "parts")),
        ("tools", {"tool_calls": [call(f"```json\n{ANN}\n```")]}, ("fence",)),
    ],
)
def test_content_and_calls_stand_for_each_other(
    mode: Mode, message: dict[str, Any], repairs: tuple[str, ...]
) -> None:
    """As servers mix them up; what was asked for comes first."""
    found = read_message(message, mode, many=False)
    assert (found.texts, found.repairs, found.problem) == ((ANN,), repairs, None)


@pytest.mark.parametrize("mode", ["tools", "json"])
def test_several_calls(mode: Mode) -> None:
    """One record was asked for: none of them. Many: all of them, in their order."""
    message = {"content": None, "tool_calls": [call(ANN), call(BO, 2)]}
    one = read_message(message, mode, many=False)
    assert (one.texts, one.problem) == ((), TWO_CALLS)
    many = read_message(message, mode, many=True)
    assert (many.texts, many.problem) == ((ANN, BO), None)
    assert "calls" in many.repairs


def test_the_tool_that_is_not_called() -> None:
    """Prose is no call, and the model is told so."""
    found = read_message({"content": "Ann is 30"}, "tools", many=False)
    assert (found.texts, found.shown) == ((), "Ann is 30")
    assert found.problem is not None
    assert "No tool calls" in found.problem


@pytest.mark.parametrize(
    "text",
    [
        '{"' * 200_000,
        '{"a":' * 200_000,
        "{" * 400_000,
        '<think>{"' * 100_000,
        "</think>" * 100_000,
        '"\\' * 300_000 + '{"a":"' + "\\" * 300_001,
        "```" * 200_000,
        "<|channel|>" * 50_000,
        "<|channel|>final " * 30_000,
    ],
)
def test_a_hostile_text_is_read_in_one_pass(text: str) -> None:
    """Half a megabyte of anything takes no longer than a validation would."""
    began_s = time.process_time()
    read_message({"content": text}, "json_schema", many=False)
    assert time.process_time() - began_s < 2.0


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("before", ["", "```json\n", '<think>so {"a": 1}</think>\n', "\ufeff"])
def test_a_growing_text_begins_where_the_whole_one_does(before: str, size: int) -> None:
    """Piece by piece the same object is found, and nothing of it is missing."""
    text = before + ANN
    opening = Opening()
    heard = "".join(opening.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert opening.start == beginning_of(text) == len(before)
    assert heard == ANN


def test_long_thoughts_are_heard_in_little_time() -> None:
    """It does not look at all of them again with every piece."""
    opening, began_s = Opening(), time.process_time()
    for piece in ["<think>", *["abcd"] * 50_000, "</think>", ANN]:
        opening.feed(piece)
    assert time.process_time() - began_s < 2.0


def body(choice: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"choices": [choice], **more}).encode()


@pytest.mark.parametrize(
    ("told", "finish"),
    [
        ("stop", "stop"),
        (None, "stop"),
        ("eos", "stop"),
        ("tool_calls", "stop"),
        ("something new", "stop"),
        ("length", "truncated"),
        ("MAX_TOKENS", "truncated"),
        ("model_length", "truncated"),
        ("content_filter", "filtered"),
        ("content_filter: PROHIBITED_CONTENT", "filtered"),
        ("SAFETY", "filtered"),
        ("FinishReason.SPII", "filtered"),
        ("sensitive", "filtered"),
        ("guardrail_intervened", "filtered"),
        ("refusal", "refused"),
        ("error", "failed"),
        ("abort", "failed"),
        ("load", "failed"),
        ("network_error", "failed"),
        ("insufficient_system_resource", "failed"),
        ("MALFORMED_FUNCTION_CALL", "malformed"),
        ("function_call_filter: MALFORMED_FUNCTION_CALL", "malformed"),
    ],
)
def test_finish_reasons_in_every_providers_words(told: str | None, finish: str) -> None:
    """What ends an answer is judged as it is meant."""
    choice = {"message": {"content": ANN}, "finish_reason": told}
    assert read_completion(body(choice), "json_schema", many=False).finish == finish


USED = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}


@pytest.mark.parametrize(
    "said",
    [
        {"usage": USED},
        {"usage": USED, "choices": []},
        {"usage": USED, "choices": None},
        {"choices": [], "promptFeedback": {"blockReason": "SAFETY"}},
    ],
)
def test_a_blocked_prompt_has_no_choices(said: dict[str, Any]) -> None:
    """It was read, and nothing was written: filtered, and paid for."""
    answer = read_completion(json.dumps(said).encode(), "json_schema", many=False)
    assert answer.finish == "filtered"
    assert answer.tokens.input == said.get("usage", {}).get("prompt_tokens", 0)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"choices": []}, None),
        ([], None),
        ({"error": {"code": 502}}, {"code": 502}),
        ({"choices": [{"error": {"code": 502}, "finish_reason": "error"}]}, {"code": 502}),
        ({"choices": None, "base_resp": {"status_code": 1002}}, {"status_code": 1002}),
    ],
)
def test_a_failure_within_a_200_is_told(said: object, error: object) -> None:
    """With the provider's own error, wherever it stands."""
    with pytest.raises(BrokenAnswer) as found:
        read_completion(json.dumps(said).encode(), "json_schema", many=False)
    assert found.value.error == error


@pytest.mark.parametrize("count", [10**308, int("9" * 309), -1, "7", None, TOKENS_MAX + 1])
def test_a_count_that_no_model_can_have_is_none(count: object) -> None:
    """Sums and prices stay numbers, whatever an endpoint says that it used."""
    usage = {"prompt_tokens": count, "completion_tokens": 7, "total_tokens": count}
    assert read_usage(usage)[:2] == (0, 7)
    choice = {"message": {"content": ANN}, "finish_reason": "stop"}
    raw = body(choice, usage=usage)
    assert read_completion(raw, "json_schema", many=False).tokens[:2] == (0, 7)


def test_what_is_said_again_in_a_re_ask() -> None:
    """Text as one string, without thoughts, and calls only where they can be referred to."""
    message = {"content": PARTS, "reasoning_content": "hm", "function_call": {"arguments": BO}}
    answer = read_completion(body({"message": message}), "json", many=False)
    assert answer.message == {"role": "assistant", "content": ANN}
    only = {"content": None, "tool_calls": [{"function": {"arguments": ANN}}]}
    answer = read_completion(body({"message": only}), "tools", many=False)
    assert answer.message == {"role": "assistant", "content": ANN}
