"""Which schemas may be sent with `strict: true`."""

from __future__ import annotations

from datetime import date
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from service.llm.strictness import allows_strict


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
