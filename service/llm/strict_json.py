"""Strict validation of JSON that stays one behind validators of the user's.

pydantic's strict mode takes a text for a date, and a list for a set, from JSON only. Behind a
`before` or `wrap` validator the value has become a Python object, and the same text is refused: a
record with `@field_validator("day", mode="before")` would never validate. So where a type has such
validators, its core schema is rewritten once: every type that JSON spells with another one takes
both, a value of its own (a validator may have made it) and its spelling in JSON, judged as JSON is.
Everything else stays as strict as it was: "30" is no age.

A member of an enum in `Literal` is the other thing that pydantic offers to the model in the schema
and then does not take from its answer.

Rules of this file: pydantic's core schema is public, its walk is ours; what it does not know it
leaves alone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, TypeAlias, cast

from pydantic import BaseModel, TypeAdapter
from pydantic_core import CoreConfig, SchemaValidator, core_schema, to_json

Validate: TypeAlias = Callable[[str], Any]
Node: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Any], Any]

_SCALARS = frozenset(
    {"date", "datetime", "time", "timedelta", "decimal", "bytes", "fraction", "uuid", "complex"}
)
"""Types that JSON writes as a text or a number."""
_KEYS = _SCALARS | {"int", "float", "bool"}
"""Types that JSON writes as a text where they are keys."""
_OF_LISTS: Mapping[str, type] = {"tuple": tuple, "deque": deque}
_OF_OBJECTS: Mapping[str, type] = {"ordered-dict": OrderedDict, "counter": Counter}
_SETS: Mapping[str, type] = {"set": set, "frozenset": frozenset}
_LEFT_ALONE = frozenset({"metadata", "serialization", "default", "config", "computed_fields"})
"""Parts of a schema that are no schemas, or that play no part in validation."""


@lru_cache(maxsize=64)
def strict_json(model: type[BaseModel]) -> Validate:
    """How a JSON text becomes a value of this type, strictly; what it returns raises what
    `model_validate_json` raises."""
    schema = cast(Node, TypeAdapter(model).core_schema)
    if not any(map(_needs_it, _nodes(schema))):
        return lambda text: model.model_validate_json(text, strict=True)
    rewritten = cast(core_schema.CoreSchema, _rewritten(schema, None, key=False))
    # Else it would take each model's own validator, which was built from what we have rewritten.
    validator = SchemaValidator(rewritten, _use_prebuilt=False)
    return lambda text: validator.validate_json(text, strict=True)


def _nodes(part: object) -> Iterator[Node]:
    """Every schema within this one."""
    if isinstance(part, list | tuple):
        for inner in part:
            yield from _nodes(inner)
    elif isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part
        for name, inner in part.items():
            if name not in _LEFT_ALONE:
                yield from _nodes(inner)


def _needs_it(node: Node) -> bool:
    return node["type"] in ("function-before", "function-wrap") or bool(_members(node))


def _rewritten(part: Any, config: CoreConfig | None, *, key: bool) -> Any:
    """A copy in which every type takes its spelling in JSON as well; `config` is that of the model
    it stands in, `key` says that it is an object's key."""
    if isinstance(part, list):
        return [_rewritten(inner, config, key=key) for inner in part]
    if isinstance(part, tuple):  # a choice and its label
        return tuple(_rewritten(inner, config, key=key) for inner in part)
    if not isinstance(part, dict):
        return part
    config = part.get("config", config)
    copy = {
        name: inner
        if name in _LEFT_ALONE
        else _rewritten(inner, config, key=key or name == "keys_schema")
        for name, inner in part.items()
    }
    return _with_json(copy, config, key=key) if isinstance(part.get("type"), str) else copy


def _with_json(node: Node, config: CoreConfig | None, *, key: bool) -> Node:
    kind = node["type"]
    if key and kind in _KEYS:
        return _wrapped(node, _from_key(node, config))
    if kind in _SCALARS:
        return _wrapped(node, _from_scalar(node, config))
    if kind in _OF_LISTS:
        return _wrapped(node, _from_container(list, _OF_LISTS[kind]))
    if kind in _OF_OBJECTS:
        return _wrapped(node, _from_container(dict, _OF_OBJECTS[kind]))
    if kind in _SETS:
        listed = {"type": "list", "items_schema": node.get("items_schema", {"type": "any"})}
        if "ref" in node:
            listed["ref"] = node["ref"]
        return _wrapped(listed, _from_set(node, _SETS[kind]))
    if members := _members(node):
        return _wrapped(node, _from_member(node, members))
    return node


def _wrapped(node: Node, function: Callable[[Any, Handler], Any]) -> Node:
    inner = {name: value for name, value in node.items() if name != "ref"}
    outer = {"type": "function-wrap", "schema": inner}
    if "ref" in node:
        outer["ref"] = node["ref"]
    return {**outer, "function": {"type": "no-info", "function": function}}


def _json(value: object) -> bytes:
    return to_json(value, inf_nan_mode="constants")


def _from_scalar(node: Node, config: CoreConfig | None) -> Callable[[Any, Handler], Any]:
    alone = _validator(node, config)

    def validate(value: Any, handler: Handler) -> Any:
        if type(value) in (str, int, float, bool):
            return alone.validate_json(_json(value), strict=True)
        return handler(value)

    return validate


def _from_key(node: Node, config: CoreConfig | None) -> Callable[[Any, Handler], Any]:
    """JSON's keys are texts; pydantic reads them as what they stand for."""
    keyed = _validator({"type": "dict", "keys_schema": node}, config)

    def validate(value: Any, handler: Handler) -> Any:
        if type(value) is str:
            [read] = keyed.validate_json(_json({value: None}), strict=True)
            return read
        return handler(value)

    return validate


def _from_container(spelled: type, kind: type) -> Callable[[Any, Handler], Any]:
    def validate(value: Any, handler: Handler) -> Any:
        return handler(kind(value) if type(value) is spelled else value)

    return validate


def _from_set(node: Node, kind: type) -> Callable[[Any, Handler], Any]:
    """Its elements first, as a list's: as JSON spells them they may not be hashable."""
    bounds = _validator({name: node[name] for name in node if name not in ("items_schema", "ref")})

    def validate(value: Any, handler: Handler) -> Any:
        if type(value) in (list, kind):
            value = kind(handler(list(value)))
        return bounds.validate_python(value, strict=True)

    return validate


def _members(node: Node) -> dict[tuple[type, Any], Enum]:
    """The members of enums in a literal, by their spelling; what it holds as it is comes first."""
    if node["type"] != "literal":
        return {}
    plain = {(type(one), one) for one in node["expected"] if not isinstance(one, Enum)}
    members = {
        (type(one.value), one.value): one
        for one in node["expected"]
        if isinstance(one, Enum) and isinstance(one.value, str | int | float)
    }
    return {spelled: one for spelled, one in members.items() if spelled not in plain}


def _from_member(
    node: Node, members: Mapping[tuple[type, Any], Enum]
) -> Callable[[Any, Handler], Any]:
    def validate(value: Any, handler: Handler) -> Any:
        if type(value) in (str, int, float):
            value = members.get((type(value), value), value)
        return handler(value)

    return validate


def _validator(node: Node, config: CoreConfig | None = None) -> SchemaValidator:
    schema = {name: value for name, value in node.items() if name != "ref"}
    return SchemaValidator(cast(core_schema.CoreSchema, schema), config, _use_prebuilt=False)
