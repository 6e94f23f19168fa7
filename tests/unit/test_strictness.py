"""Which schemas may be sent with `strict: true`."""

from __future__ import annotations

import json
from datetime import date
from typing import Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

from service.llm.strict_json import strict_json
from service.llm.strictness import Derived, Lost, allows_strict, derive
from tests.support.typical import LOSING, TYPICAL


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tag(Closed):
    label: str
    below: Tag | None


class Good(Closed):
    """Everything that is allowed."""

    name: str = Field(pattern="^.+$", description="Whose")
    age: int = Field(ge=0, le=150)
    born: date
    kind: Literal["a", "b"]
    nick: str | None
    tags: list[Tag] = Field(min_length=1)


class Recursive(Closed):
    """Its root is a reference to itself."""

    next: Recursive | None


class Open(BaseModel):
    name: str


class WithDefault(Closed):
    name: str = "nobody"


class WithLength(Closed):
    name: str = Field(min_length=1)


class WithMapping(Closed):
    names: dict[str, str]


class WithTuple(Closed):
    pair: tuple[int, str]


class WithOpenChild(Closed):
    child: Open


class WithDescribedReference(Closed):
    child: Tag = Field(description="beside a reference")


class WithAny(Closed):
    thing: Literal["a"] | bytes


class WithPattern(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")
    name: str = Field(pattern="^(?!x).+$")


class Sized(BaseModel):
    size: int = 1


class Nullable(BaseModel):
    size: int | None


class TwoMeanings(BaseModel):
    one: Sized | Nullable


class Described(BaseModel):
    name: str = Field(description="Whose", max_length=9)
    nick: str = "none"


def test_a_closed_schema_is_strict() -> None:
    """Closed objects, all fields required, allowed keywords only."""
    assert allows_strict(Good.model_json_schema())


@pytest.mark.parametrize(
    "model",
    [
        Recursive,
        Open,
        WithDefault,
        WithLength,
        WithMapping,
        WithTuple,
        WithOpenChild,
        WithDescribedReference,
        WithAny,
    ],
)
def test_anything_else_is_not(model: type[BaseModel]) -> None:
    """Each rule by itself is enough: with strict, the provider would refuse every request."""
    assert not allows_strict(model.model_json_schema())


def test_the_root_is_a_plain_object() -> None:
    """A union or a list at the root is not allowed."""
    schema = Good.model_json_schema()
    assert not allows_strict({"anyOf": [schema]})
    assert not allows_strict({"type": "array", "items": schema})


def test_depth_is_bounded() -> None:
    """Ten levels of objects, and no more."""

    def nested(levels: int) -> dict[str, object]:
        schema: dict[str, object] = {"type": "string"}
        for _ in range(levels):
            schema = {
                "type": "object",
                "properties": {"a": schema},
                "required": ["a"],
                "additionalProperties": False,
            }
        return schema

    assert allows_strict(nested(9))
    assert not allows_strict(nested(10))


# --- derived schemas -----------------------------------------------------------------------------


def test_most_usual_types_can_be_strict() -> None:
    """Of twenty-five, none is as it stands; nineteen are by derivation."""
    schemas = [model.model_json_schema() for model in (*TYPICAL, *LOSING)]
    assert len(schemas) == 25
    assert sum(map(allows_strict, schemas)) == 0
    derived = [derive(schema) for schema in schemas]
    assert sum(isinstance(one, Derived) for one in derived) == 19
    assert all(allows_strict(one.schema) for one in derived if isinstance(one, Derived))


@pytest.mark.parametrize(
    ("model", "answer"), [(model, answer) for model, all_ in TYPICAL.items() for answer in all_]
)
def test_an_answer_comes_back_as_the_original_types(model: type[BaseModel], answer: str) -> None:
    """What the strict schema asks for is, without the nulls for defaults, what the type takes."""
    derived = derive(model.model_json_schema())
    assert isinstance(derived, Derived)
    Draft202012Validator(derived.schema).validate(json.loads(answer))
    read = strict_json(model)(derived.without_nulls(answer))
    left_out = json.dumps(_without(json.loads(answer)))
    assert read.model_dump(exclude_unset=False) == model.model_validate_json(left_out).model_dump()


def _without(value: object) -> object:
    """Every null left out: in these types each means its default."""
    if isinstance(value, dict):
        return {name: _without(one) for name, one in value.items() if one is not None}
    return [_without(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("model", "reason"), LOSING.items())
def test_what_would_be_lost_is_said(model: type[BaseModel], reason: str) -> None:
    """Nothing is derived; answers stay as they are."""
    lost = derive(model.model_json_schema())
    assert isinstance(lost, Lost)
    assert reason in lost.reason
    assert lost.without_nulls('{"price": null}') == '{"price": null}'


@pytest.mark.parametrize("model", [WithPattern, TwoMeanings])
def test_what_has_no_strict_meaning_is_lost(model: type[BaseModel]) -> None:
    """A pattern with look-around; a null that would be a default here and a value there."""
    assert isinstance(derive(model.model_json_schema()), Lost)


def test_keywords_outside_of_the_subset_are_said_in_words() -> None:
    """The model reads them still, and the default as well."""
    derived = derive(Described.model_json_schema())
    assert isinstance(derived, Derived)
    name, nick = derived.schema["properties"].values()
    assert name["description"] == "Whose (maxLength: 9)"
    assert nick["description"] == '(null: "none")'


@pytest.mark.parametrize(
    "text",
    [
        '{"name": null',
        "null",
        "[null]",
        '{"name": nul, "nick": null}',
        '{"name": "a" "nick": null}',
        '{"name": "a", "nick": null,}',
        '{"name": null, "nick": "null"}',
        "{" * 5000 + "null",
        '{"nick": ' + "9" * 5000 + ', "name": null}',
    ],
)
def test_anything_else_stays_byte_for_byte(text: str) -> None:
    """What is no JSON is validation's to judge, and a null that is missing is missing."""
    derived = derive(Described.model_json_schema())
    assert derived.without_nulls(text).replace(" ", "") == text.replace(" ", "")


def test_numbers_keep_their_digits() -> None:
    """Nothing is parsed into a float on the way."""
    derived = derive(Described.model_json_schema())
    text = '{"nick": null, "name": 0.30000000000000000001, "more": [1e400, -0.0, "\\u00e9"]}'
    kept = '{"name": 0.30000000000000000001,"more": [1e400, -0.0, "\\u00e9"]}'
    assert derived.without_nulls(text) == kept
