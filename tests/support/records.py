"""Record types for tests, each for one thing that a user's type can do."""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
)

from service import NextModel


class ClosedPerson(BaseModel):
    """Closed and without defaults: may be sent with `strict: true`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    age: int = Field(ge=0, le=150)


class Event(BaseModel):
    """Typed fields that a strict validation takes from JSON's strings."""

    title: str
    on: date
    seats: float


class Kind(Enum):
    TALK = "talk"


class Looked(BaseModel):
    """Behind a validator that returns what it is given, as most begin."""

    name: str
    on: date
    tags: set[str]
    kind: Literal[Kind.TALK]

    @field_validator("on", "tags", mode="before")
    @classmethod
    def _look(cls, value: object) -> object:
        return value


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """Its classes have brackets in their names."""

    items: list[T]


Pages = Page[Event]


class Renamed(BaseModel):
    """Asked for under one name, published under another."""

    plain: int
    both: int = Field(alias="bothAlias")
    read: int = Field(validation_alias="readAlias")
    written: int = Field(validation_alias="writtenAlias", serialization_alias="writtenName")
    only: int = Field(serialization_alias="onlyName")
    inner: Written


class Written(BaseModel):
    size: float = Field(alias="sizeAlias", serialization_alias="sizeName")


class Hidden(BaseModel):
    name: str
    token: list[SecretStr]


class Shown(BaseModel):
    token: SecretStr

    @field_serializer("token")
    def _show(self, value: SecretStr) -> str:
        return value.get_secret_value()


class Counted(BaseModel):
    name: str
    size: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def initial(self) -> str:
        return self.name[:1]


class Lookahead(BaseModel):
    model_config = ConfigDict(extra="forbid")
    code: str = Field(json_schema_extra={"pattern": "^(?=A)[A-Z]+$"})


class RaisesInValidator(BaseModel):
    name: str
    age: int

    @field_validator("name")
    @classmethod
    def _look_up(cls, value: str) -> str:
        raise KeyError(f"no entry for {value}")


class RaisesInSerializer(BaseModel):
    name: str
    age: int

    @field_serializer("name")
    def _write(self, value: str) -> str:
        raise RuntimeError(f"cannot write {value}")


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class RaisesMutely(BaseModel):
    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _fail(cls, value: int) -> int:
        raise _Mute


class SaysNo(BaseModel):
    """Refuses by ValueError, which is how a validator tells the model what is wrong."""

    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _young(cls, value: int) -> int:
        if value > 30:
            raise ValueError("must be at most 30")
        return value


class Odd(BaseModel):
    """Its validator returns another type, which pydantic warns of when it is written."""

    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _words(cls, value: int) -> Any:
        return f"{value} years"


class Node(BaseModel):
    """Refers to itself, so that its schema's root is a reference."""

    name: str
    next: Node | None


class AsksForTheNext(BaseModel):
    """Wants a stronger model for whoever is older than 30."""

    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _young(cls, value: int) -> int:
        if value > 30:
            raise NextModel("too old for this one")
        return value


class Sure(BaseModel):
    """Says how sure the model is of it."""

    name: str
    sure: float | None


class WithDefaults(BaseModel):
    """Optional fields whose default is not null."""

    name: str
    nick: str = "none"
    tags: list[str] = Field(default_factory=list)
