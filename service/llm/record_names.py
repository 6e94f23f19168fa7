"""A record's JSON as it is published: its names, and what it cannot hold.

A field is published under its own name, and under `serialization_alias` where that is given. An
`alias` or a `validation_alias` is what the model is asked for, and no name of the record's.
pydantic knows "all aliases" or "none": so where a serialization alias is given, the serializer is
built from a schema that keeps no other. A type with `serialize_by_alias` has said what it wants.

Rules of this file: pydantic's core schema is public, its walk is ours; nothing is built where no
alias asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

from instructor.v2.core.errors import ResponseParsingError
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaSerializer, core_schema

Dump: TypeAlias = Callable[[BaseModel], bytes]
Node: TypeAlias = dict[str, Any]

_FIELDS = frozenset({"model-field", "dataclass-field", "typed-dict-field"})
_NO_SCHEMAS = frozenset({"metadata", "default", "config"})


def dump_of(model: type[BaseModel]) -> Dump:
    """How a value becomes a record's JSON. Raises what the user's serializers raise, and
    `ResponseParsingError` for a number that JSON does not have."""
    renamed = _renamed(model)
    if renamed is None:
        return _by_field_names
    serializer = SchemaSerializer(renamed, _use_prebuilt=False)

    def dump(value: BaseModel) -> bytes:
        # A serializer's warning would quote the value on stderr.
        text = serializer.to_json(value, by_alias=True, warnings="none")
        return _finite(value, text)

    return dump


def _by_field_names(value: BaseModel) -> bytes:
    return _finite(value, value.model_dump_json(warnings="none").encode())


def _finite(value: BaseModel, text: bytes) -> bytes:
    """pydantic writes NaN and infinity as null, which the type itself would refuse."""
    if b"null" in text and any(_not_finite(value.model_dump(warnings="none"))):
        raise ResponseParsingError("NaN and Infinity are no numbers in JSON", mode="JSON")
    return text


def _not_finite(value: object) -> Iterator[bool]:
    match value:
        case float() if not math.isfinite(value):
            yield True
        case Mapping():
            for inner in value.values():
                yield from _not_finite(inner)
        case list() | tuple() | set() | frozenset():
            for inner in value:
                yield from _not_finite(inner)


def published_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of what is published: the model's, with the names of the record."""
    schema = model.model_json_schema()
    if model.model_config.get("serialize_by_alias"):
        return schema
    if not any("validation_alias" in node for node, _ in _fields(_core(model))):
        return schema
    named = _with_names(_core(model), published=True)
    return GenerateJsonSchema(by_alias=True).generate(named, mode="validation")


def hidden_field(model: type[BaseModel]) -> str | None:
    """The first field that would be published as asterisks, as pydantic's secrets are."""
    return next((name for name in _hidden(_core(model), model.__name__)), None)


def _hidden(part: object, name: str) -> Iterator[str]:
    """Fields whose serializer hides them; where the user's own stands around it, it shows them."""
    if isinstance(part, list | tuple):
        for inner in part:
            yield from _hidden(inner, name)
        return
    if not isinstance(part, dict):
        return
    function = part.get("serialization", {}).get("function")
    if function is not None:
        if getattr(function, "__name__", "").startswith("_serialize_secret"):
            yield name
        return
    for key, inner in part.items():
        if key == "fields" and isinstance(inner, dict):
            for field, schema in inner.items():
                yield from _hidden(schema, field)
        elif key not in _NO_SCHEMAS:
            yield from _hidden(inner, name)


def _renamed(model: type[BaseModel]) -> core_schema.CoreSchema | None:
    core = _core(model)
    if model.model_config.get("serialize_by_alias"):
        return None
    if not any(_own_name(node, alias) for node, alias in _fields(core)):
        return None
    return cast(core_schema.CoreSchema, _with_names(core, published=False))


def _core(model: type[BaseModel]) -> Node:
    model.model_rebuild()  # a forward reference may have been open
    return cast(Node, model.__pydantic_core_schema__)


def _own_name(node: Node, alias: str | None) -> str | None:
    """The serialization alias that was given for itself, and not by an `alias` for both ways."""
    name = node.get("serialization_alias")
    return name if isinstance(name, str) and name != alias else None


def _fields(part: object) -> Iterator[tuple[Node, str | None]]:
    """Every field's schema, with its `alias`."""
    if isinstance(part, list | tuple):
        for inner in part:
            yield from _fields(inner)
    elif isinstance(part, dict):
        for field in _of(part):
            yield field, _alias(field)
        for name, inner in part.items():
            if name not in _NO_SCHEMAS:
                yield from _fields(inner)


def _of(node: Node) -> Iterator[Node]:
    """The fields that stand in this very node: of a model by name, of a dataclass in a list."""
    fields = node.get("fields")
    if isinstance(fields, dict):
        fields = list(fields.values())
    if isinstance(fields, list):
        yield from (one for one in fields if one.get("type") in _FIELDS)


def _alias(field: Node) -> str | None:
    """What `alias` gave; only a plain text can be a name both ways."""
    alias = field.get("validation_alias")
    return alias if isinstance(alias, str) else None


def _with_names(part: Any, *, published: bool) -> Any:
    """A copy that knows serialization aliases alone; `published`: under the names for reading too,
    which a schema in validation mode shows."""
    if isinstance(part, list | tuple):
        return type(part)(_with_names(inner, published=published) for inner in part)
    if not isinstance(part, dict):
        return part
    copy = {
        name: inner if name in _NO_SCHEMAS else _with_names(inner, published=published)
        for name, inner in part.items()
    }
    if part.get("type") in _FIELDS:
        name = _own_name(part, _alias(part))
        copy.pop("serialization_alias", None)
        if published:
            copy.pop("validation_alias", None)
        if name is not None:
            copy["serialization_alias"] = name
            if published:
                copy["validation_alias"] = name
    return copy
