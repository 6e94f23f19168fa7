"""Strict JSON stays strict JSON behind validators of the user's."""

from __future__ import annotations

import collections
import ipaddress
import pathlib
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

import pytest
from pydantic import (
    AnyUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    PastDate,
    ValidationError,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from service.llm.strict_json import strict_json

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Size(IntEnum):
    SMALL = 1


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True)
    day: date
    tags: frozenset[str] = frozenset()


class Page(BaseModel, Generic[T]):
    items: list[T]


class Node(BaseModel):
    day: date
    next: Node | None = None


class Typed(TypedDict):
    day: date


class Named(NamedTuple):
    day: date
    count: int


class Cat(BaseModel):
    kind: Literal["cat"]
    born: date


class Dog(BaseModel):
    kind: Literal["dog"]
    weight: Decimal


UUID_TEXT = "12345678-1234-5678-1234-567812345678"

TYPES: list[tuple[Any, str]] = [
    (date, '"2026-01-31"'),
    (date, '"2026-31-01"'),
    (date, "5"),
    (datetime, '"2026-01-31T10:00:00Z"'),
    (datetime, "1700000000"),
    (time, '"10:00"'),
    (timedelta, '"P1DT2H"'),
    (timedelta, "90"),
    (Decimal, '"1.50"'),
    (Decimal, "1.5"),
    (Decimal, "7"),
    (Decimal, "true"),
    (Decimal, '"many"'),
    (Annotated[Decimal, Field(max_digits=3)], '"1.2345"'),
    (Fraction, '"1/3"'),
    (bytes, '"ab"'),
    (UUID, f'"{UUID_TEXT}"'),
    (UUID, '"no"'),
    (complex, '"1+2j"'),
    (set[int], "[1,2,2]"),
    (set[int], '["1"]'),
    (set[int], "7"),
    (Annotated[set[int], Field(min_length=2)], "[1]"),
    (Annotated[set[int], Field(max_length=1)], "[1,2]"),
    (set[date], '["2026-01-31"]'),
    (set[Inner], '[{"day":"2026-01-31","tags":["a"]}]'),
    (frozenset[tuple[int, int]], "[[1,2]]"),
    (tuple[int, date], '[1,"2026-01-31"]'),
    (tuple[int, str], "[1]"),
    (tuple[date, ...], '["2026-01-31","2026-02-01"]'),
    (collections.deque[int], "[1,2]"),
    (collections.OrderedDict[str, date], '{"a":"2026-01-31"}'),
    (collections.Counter[str], '{"a":2}'),
    (dict[int, date], '{"1":"2026-01-31"}'),
    (dict[date, int], '{"2026-01-31":1}'),
    (dict[float, int], '{"1.5":1}'),
    (dict[bool, int], '{"true":1}'),
    (dict[int, int], '{"one":1}'),
    (dict[Colour, int], '{"red":1}'),
    (list[date | None], '["2026-01-31",null]'),
    (date | None, "null"),
    (int | date, '"2026-01-31"'),
    (date | str, '"2026-01-31"'),
    (str | date, '"2026-01-31"'),
    (str | date, '"hello"'),
    (int | Decimal, "7"),
    (float | Decimal, "1.5"),
    (list[int] | set[int], "[1]"),
    (Inner, '{"day":"2026-01-31","tags":["a","b"]}'),
    (Inner, '{"day":20}'),
    (Page[Inner], '{"items":[{"day":"2026-01-31"}]}'),
    (Node, '{"day":"2026-01-31","next":{"day":"2026-02-01","next":null}}'),
    (Typed, '{"day":"2026-01-31"}'),
    (Named, '["2026-01-31",1]'),
    (Annotated[Cat | Dog, Field(discriminator="kind")], '{"kind":"dog","weight":"1.5"}'),
    (Annotated[Cat | Dog, Field(discriminator="kind")], '{"kind":"cat","born":"2026-01-31"}'),
    (Json[set[date]], '"[\\"2026-01-31\\"]"'),
    (PastDate, '"2020-01-31"'),
    (PastDate, '"2999-01-31"'),
    (ipaddress.IPv4Address, '"1.2.3.4"'),
    (pathlib.Path, '"/a"'),
    (AnyUrl, '"http://a/"'),
    (Colour, '"red"'),
    (Colour, '"blue"'),
    (Literal[Size.SMALL], "1"),
    (int, '"30"'),
    (int, "1.0"),
    (bool, '"yes"'),
    (bool, "1"),
    (str, "3"),
    (float, '"1.5"'),
    (float, "1"),
]


def untouched(kind: Any) -> type[BaseModel]:
    return create_model("Record", x=(kind, ...))


def before(kind: Any) -> type[BaseModel]:
    return create_model("Record", x=(Annotated[kind, BeforeValidator(lambda value: value)], ...))


def wrap(kind: Any) -> type[BaseModel]:
    same = WrapValidator(lambda value, handler: handler(value))
    return create_model("Record", x=(Annotated[kind, same], ...))


def field(kind: Any) -> type[BaseModel]:
    def same(cls: type, value: object) -> object:
        return value

    validators: dict[str, Any] = {"same": field_validator("x", mode="before")(classmethod(same))}
    return create_model("Record", x=(kind, ...), __validators__=validators)


class Whole(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: object) -> object:
        return value


class Around(BaseModel):
    @model_validator(mode="wrap")
    @classmethod
    def _same(cls, value: Any, handler: Any) -> Any:
        return handler(value)


def whole(kind: Any) -> type[BaseModel]:
    return create_model("Record", __base__=Whole, x=(kind, ...))


def around(kind: Any) -> type[BaseModel]:
    return create_model("Record", __base__=Around, x=(kind, ...))


def nested(kind: Any) -> type[BaseModel]:
    inner = untouched(kind)
    return create_model("Outer", x=(Annotated[inner, BeforeValidator(lambda v: {"x": v})], ...))


def outcome(model: type[BaseModel], text: str) -> object:
    """The value, or what is wrong with it."""
    try:
        value: Any = strict_json(model)(text)
    except ValidationError as error:
        return [one["type"] for one in error.errors()]
    value = value.x
    return value.x if type(value).__name__ == "Record" else value


@pytest.mark.parametrize("behind", [before, wrap, field, whole, around, nested])
@pytest.mark.parametrize(("kind", "text"), TYPES, ids=lambda value: str(value)[:50])
def test_a_validator_that_changes_nothing_changes_nothing(
    kind: Any, text: str, behind: Callable[[Any], type[BaseModel]]
) -> None:
    """The same values, the same errors, as without it."""
    text = f'{{"x":{text}}}'
    expected = outcome(untouched(kind), text)
    found = outcome(behind(kind), text)
    assert (repr(found), type(found)) == (repr(expected), type(expected))


def test_without_such_validators_pydantic_does_it_alone() -> None:
    """Nothing is rewritten that works as it is."""
    record = untouched(date)
    assert strict_json(record)('{"x":"2026-01-31"}') == record(x=date(2026, 1, 31))


class Made(BaseModel):
    """Its validators make Python values of what the model writes."""

    day: date
    price: Decimal
    tags: set[str]

    @field_validator("day", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return date(2026, 1, 31) if value == "today" else value

    @field_validator("price", mode="before")
    @classmethod
    def _price(cls, value: object) -> object:
        return Decimal(value.removesuffix(" USD")) if isinstance(value, str) else value

    @field_validator("tags", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return set(value.split()) if isinstance(value, str) else value


@pytest.mark.parametrize(
    "text",
    [
        '{"day":"today","price":"7 USD","tags":"a b"}',
        '{"day":"2026-01-31","price":"7","tags":["b","a"]}',
        '{"day":"2026-01-31","price":7,"tags":["b","a","a"]}',
    ],
)
def test_what_a_validator_makes_is_taken_too(text: str) -> None:
    """A value of the type itself, or its spelling in JSON."""
    value = strict_json(Made)(text)
    assert (value.day, value.price, value.tags) == (date(2026, 1, 31), 7, {"a", "b"})


@pytest.mark.parametrize("text", ['{"day":7}', '{"day":"tomorrow","price":[],"tags":7}'])
def test_what_it_leaves_wrong_is_wrong(text: str) -> None:
    """A validator is no way around strictness."""
    with pytest.raises(ValidationError):
        strict_json(Made)(text)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Literal[Colour.RED], '"red"', Colour.RED),
        (Literal[Colour.RED, "green"], '"green"', "green"),
        (Literal[Colour.RED, "red"], '"red"', "red"),
        (list[Literal[Colour.RED, Colour.GREEN]], '["green"]', [Colour.GREEN]),
        (Literal[Colour.RED], '"green"', ["literal_error"]),
        (Literal[Colour.RED], "1", ["literal_error"]),
        (Literal[Size.SMALL], '"1"', ["literal_error"]),
    ],
)
@pytest.mark.parametrize("behind", [untouched, before, whole])
def test_a_member_of_an_enum_in_a_literal(
    kind: Any, text: str, expected: object, behind: Callable[[Any], type[BaseModel]]
) -> None:
    """The schema offers its value to the model, so the value is taken from its answer."""
    assert outcome(behind(kind), f'{{"x":{text}}}') == expected


def test_the_place_of_an_error_is_told() -> None:
    """The re-ask names the field, however deep."""
    deep = create_model("Deep", __base__=Whole, pages=(list[Inner], ...))
    with pytest.raises(ValidationError) as found:
        strict_json(deep)('{"pages":[{"day":"2026-01-31"},{"day":"no","tags":[1]}]}')
    assert [one["loc"] for one in found.value.errors()] == [
        ("pages", 1, "day"),
        ("pages", 1, "tags", 0),
    ]
