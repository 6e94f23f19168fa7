"""Schemas in OpenAI's strict mode (`strict: true`), and what is made of the answers.

Hardly any pydantic model is strict as it stands: defaults make fields optional, objects are open,
lengths are no keyword of the subset. So a strict schema is derived from the type's: objects closed,
all fields required, a field with a default may be null instead, and what the subset has no keyword
for is said in the description. The answer is validated by the type itself, after the nulls that
stand for a default were taken away, so that nothing is believed that the type would refuse.

Where that would lose something the derivation says what, and the schema is sent as it is, without
`strict`.

Rules of this file: pure; what is not known to be allowed counts as not allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Node: TypeAlias = Mapping[str, Any]

_ALLOWED = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "description",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "multipleOf",
        "pattern",
        "properties",
        "required",
        "title",
        "type",
    }
)
"""Keywords that a strict schema may hold; minLength and maxLength are documented as not so."""
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
)
_NOT_IN_PATTERNS = re.compile(r"\(\?(?!:)|\\[1-9]|\\k<")
"""Look-around, named groups, flags and references back: grammars know none of them, and a request
that has one is answered with a 5xx."""
_PROPERTIES_MAX = 5000
_DEPTH_MAX = 10
_ENUM_VALUES_MAX = 1000


def allows_strict(schema: Mapping[str, Any]) -> bool:
    """True if every rule of OpenAI's strict mode holds for this schema."""
    if schema.get("type") != "object" or "anyOf" in schema:
        return False  # the root must be a plain object
    nodes = list(_nodes(schema, 1))
    return (
        all(_node_allows(node) for node, _ in nodes)
        and max(depth for _, depth in nodes) <= _DEPTH_MAX
        and sum(len(node.get("properties", ())) for node, _ in nodes) <= _PROPERTIES_MAX
        and sum(len(node.get("enum", ())) for node, _ in nodes) <= _ENUM_VALUES_MAX
    )


def _nodes(schema: Mapping[str, Any], depth: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every schema within this one, with its depth in objects; `$ref` is not followed."""
    yield schema, depth
    for child in schema.get("properties", {}).values():
        yield from _nodes(child, depth + 1)
    for child in schema.get("$defs", {}).values():
        yield from _nodes(child, depth)
    for child in schema.get("anyOf", ()):
        yield from _nodes(child, depth)
    if isinstance(schema.get("items"), Mapping):
        yield from _nodes(schema["items"], depth)


def _node_allows(node: Mapping[str, Any]) -> bool:
    if not _ALLOWED.issuperset(node):
        return False
    if "$ref" in node and len(node) > 1:
        return False  # a reference may carry nothing beside it
    if node.get("format", "date") not in _FORMATS:
        return False
    if _NOT_IN_PATTERNS.search(str(node.get("pattern", ""))):
        return False
    return not _is_object(node) or _is_closed(node)


def _is_object(node: Mapping[str, Any]) -> bool:
    return "properties" in node or node.get("type") == "object"


def _is_closed(node: Mapping[str, Any]) -> bool:
    properties = set(node.get("properties", ()))
    return node.get("additionalProperties") is False and properties == set(node.get("required", ()))


# --- derivation ---------------------------------------------------------------------------------

_SAID = frozenset(
    {
        *("minLength", "maxLength", "uniqueItems", "examples", "contentEncoding"),
        *("contentMediaType", "minProperties", "maxProperties", "deprecated"),
    }
)
"""Keywords without a place in the subset, which the description can say as well."""
_DROPPED = frozenset({"discriminator", "readOnly", "writeOnly", "$comment", "default"})
"""Keywords that change nothing of what is an answer."""
_DECIMAL = "^(?!^[-+.]*$)"
"""How pydantic's own pattern of a Decimal begins; the type itself refuses what it refuses."""


@dataclass(frozen=True, slots=True)
class Lost:
    """No strict schema, and why, to follow "as"."""

    reason: str

    def without_nulls(self, text: str) -> str:
        return text

    element_without_nulls = without_nulls


@dataclass(frozen=True, slots=True)
class Derived:
    """A strict schema, and the way back from an answer to one of the original's."""

    schema: dict[str, Any]
    _shape: _Shape

    def without_nulls(self, text: str) -> str:
        """The answer without the nulls that stand for a default; else byte for byte the same."""
        return _without_nulls(text, self._shape)

    def element_without_nulls(self, text: str) -> str:
        """Of one element of the answer's only list."""
        records = self._shape.fields.get("records")
        return (
            text
            if records is None or records.items is None
            else _without_nulls(text, records.items)
        )


@dataclass(eq=False, slots=True)
class _Shape:
    """Where nulls stand for a default: `nulls` of the object's fields, and further in."""

    nulls: set[str] = field(default_factory=set)
    fields: dict[str, _Shape] = field(default_factory=dict)
    items: _Shape | None = None
    either: tuple[_Shape, ...] = ()


class _Loses(Exception):
    """With the reason as its text."""


def derive(schema: Mapping[str, Any]) -> Derived | Lost:
    """A strict schema of which each answer is one of `schema`, or the reason why there is none."""
    try:
        if "$ref" in schema:
            raise _Loses("its root refers to itself")
        if schema.get("type") != "object":
            raise _Loses("its root is no object")
        derivation = _Derivation(schema.get("$defs", {}))
        made, shape = derivation.node(schema, "")
        if derivation.defs:
            made["$defs"] = derivation.defs
    except _Loses as loss:
        return Lost(str(loss))
    if not allows_strict(made):
        return Lost("it is too deep or too large")
    return Derived(made, shape)


class _Derivation:
    """One walk through a schema."""

    def __init__(self, defs: Mapping[str, Node]) -> None:
        self._originals = defs
        self.defs: dict[str, dict[str, Any]] = {}
        self._shapes = {name: _Shape() for name in defs}
        for name, original in defs.items():
            self.defs[name], shape = self.node(original, name)
            known = self._shapes[name]
            known.nulls, known.fields = shape.nulls, shape.fields
            known.items, known.either = shape.items, shape.either

    def node(self, original: Node, place: str) -> tuple[dict[str, Any], _Shape]:
        made = self._kept(original, place)
        if "$ref" in original:
            return self._reference(original, made)
        choices = original.get("anyOf", original.get("oneOf"))
        if choices is not None:
            return self._choice(choices, made, place)
        if _is_object(original):
            return self._object(original, made, place)
        if original.get("type") == "array":
            return self._array(original, made, place)
        if not {"type", "enum", "const"} & original.keys():
            raise _Loses(f"{place or 'it'} may be anything")
        return made, _Shape()

    def _kept(self, original: Node, place: str) -> dict[str, Any]:
        """Keywords of this node alone, what has no place in the subset said in its description."""
        made, said = {}, []
        for name, value in original.items():
            if name == "format" and value not in _FORMATS:
                said.append(f"format: {value}")
            elif name == "pattern" and _NOT_IN_PATTERNS.search(value):
                if not value.startswith(_DECIMAL):
                    raise _Loses(f"the pattern of {place} is none that grammars know")
            elif name in _SAID:
                said.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
            elif name in _ALLOWED:
                if name not in _STRUCTURE:
                    made[name] = value
            elif name in ("oneOf", *_DROPPED):
                pass
            elif name == "prefixItems":
                raise _Loses(f"{place} is a tuple")
            elif isinstance(value, str | int | float | bool):
                said.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
            else:
                raise _Loses(f"{place or 'it'} has the keyword {name}")
        _say(made, said)
        return made

    def _reference(self, original: Node, made: dict[str, Any]) -> tuple[dict[str, Any], _Shape]:
        name = original["$ref"].removeprefix("#/$defs/")
        if name not in self._shapes:
            raise _Loses(f"it refers to {original['$ref']}")
        reference = {"$ref": original["$ref"]}
        # A reference may carry nothing beside it.
        return ({"anyOf": [reference], **made} if made else reference), self._shapes[name]

    def _choice(
        self, choices: Sequence[Node], made: dict[str, Any], place: str
    ) -> tuple[dict[str, Any], _Shape]:
        ways = [self.node(choice, place) for choice in choices]
        made["anyOf"] = [way for way, _ in ways]
        either = tuple(shape for _, shape in ways)
        names = [self._optional_and_others(choice) for choice in choices]
        for at, (optional, _) in enumerate(names):
            for other, (_, others) in enumerate(names):
                if at != other and (both := optional & others):
                    raise _Loses(f"null would mean two things in {place}.{min(both)}")
        return made, _Shape(either=either)

    def _optional_and_others(self, choice: Node) -> tuple[set[str], set[str]]:
        """Fields of a choice in which null would stand for a default, and the rest of them."""
        node = self._resolved(choice)
        fields = node.get("properties", {})
        optional = {
            name
            for name, one in fields.items()
            if name not in node.get("required", ()) and not self._takes_null(one)
        }
        return optional, set(fields) - optional

    def _object(
        self, original: Node, made: dict[str, Any], place: str
    ) -> tuple[dict[str, Any], _Shape]:
        more = original.get("additionalProperties", False)
        if "properties" not in original or isinstance(more, Mapping):
            raise _Loses(f"{place or 'it'} is a mapping of names that are not known")
        if more:
            raise _Loses(f"{place or 'it'} is open to further fields")
        shape = _Shape()
        made["properties"] = {}
        for name, one in original["properties"].items():
            where = f"{place}.{name}" if place else name
            made["properties"][name], shape.fields[name] = self.node(one, where)
            if name in original.get("required", ()):
                continue
            if self._takes_null(one):
                if one.get("default", name) is not None:
                    raise _Loses(f"null is not the default of {where}")
                continue
            shape.nulls.add(name)
            made["properties"][name] = _or_null(made["properties"][name], one)
        made["required"] = list(made["properties"])
        made["additionalProperties"] = False
        return made, shape

    def _array(
        self, original: Node, made: dict[str, Any], place: str
    ) -> tuple[dict[str, Any], _Shape]:
        items = original.get("items")
        if not isinstance(items, Mapping):
            raise _Loses(f"{place} is a list of anything")
        made["items"], shape = self.node(items, f"{place}[]")
        return made, _Shape(items=shape)

    def _takes_null(self, node: Node) -> bool:
        node = self._resolved(node)
        kind = node.get("type")
        return (
            kind == "null"
            or (isinstance(kind, list) and "null" in kind)
            or None in node.get("enum", ())
            or ("const" in node and node["const"] is None)
            or any(map(self._takes_null, node.get("anyOf", node.get("oneOf", ()))))
        )

    def _resolved(self, node: Node) -> Node:
        name = node.get("$ref", "").removeprefix("#/$defs/")
        return self._originals.get(name, {}) if name else node


_STRUCTURE = frozenset({"$defs", "$ref", "anyOf", "items", "properties", "required"})
_STRUCTURE |= {"additionalProperties"}
"""Keywords that are made anew."""


def _say(node: dict[str, Any], said: Sequence[str]) -> None:
    if said:
        before = node.pop("description", "")
        node["description"] = f"{before} ({'; '.join(said)})".strip()


def _or_null(made: dict[str, Any], original: Node) -> dict[str, Any]:
    """Null stands for the default, whose value is told where the schema has it."""
    outside: dict[str, Any] = {
        name: made.pop(name) for name in ("title", "description") if name in made
    }
    ways = made["anyOf"] if made.keys() == {"anyOf"} else [made]
    default = original.get("default")
    meant = "the default" if default is None else json.dumps(default, ensure_ascii=False)
    _say(outside, [f"null: {meant}"])
    return {"anyOf": [*ways, {"type": "null"}], **outside}


# --- the way back -------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(strict=False)


def _without_nulls(text: str, shape: _Shape) -> str:
    if "null" not in text:
        return text
    try:
        return _copied(text, _SPACE.match(text).end(), (shape,))[0]  # type: ignore[union-attr]
    # No JSON, or none that Python reads: validation says what is wrong with it.
    except (ValueError, IndexError, RecursionError):
        return text


def _copied(text: str, at: int, shapes: Sequence[_Shape]) -> tuple[str, int]:
    """The value that begins there, without nulls for defaults, and its end. Texts and numbers are
    copied as they stand, digit by digit."""
    shapes = list(_flat(shapes))
    if text[at] == "{" and any(shape.fields for shape in shapes):
        return _object_copied(text, at, shapes)
    items = [shape.items for shape in shapes if shape.items is not None]
    if text[at] == "[" and items:
        return _array_copied(text, at, items)
    end = _DECODER.raw_decode(text, at)[1]
    return text[at:end], end


def _flat(shapes: Sequence[_Shape]) -> Iterator[_Shape]:
    for shape in shapes:
        yield shape
        yield from _flat(shape.either)


def _object_copied(text: str, at: int, shapes: Sequence[_Shape]) -> tuple[str, int]:
    kept = []
    at = _after(text, at + 1)
    while text[at] != "}":
        start = at
        if text[at] != '"':
            raise ValueError
        name, at = _DECODER.raw_decode(text, at)
        at = _after(text, at)
        if text[at] != ":":
            raise ValueError
        at = _after(text, at + 1)
        label = text[start:at]
        within = [shape for shape in shapes if name in shape.fields]
        value, at = _copied(text, at, [shape.fields[name] for shape in within])
        if value != "null" or not any(name in shape.nulls for shape in within):
            kept.append(label + value)
        at = _next(text, at, "}")
    return "{" + ",".join(kept) + "}", at + 1


def _array_copied(text: str, at: int, items: Sequence[_Shape]) -> tuple[str, int]:
    kept = []
    at = _after(text, at + 1)
    while text[at] != "]":
        value, at = _copied(text, at, items)
        kept.append(value)
        at = _next(text, at, "]")
    return "[" + ",".join(kept) + "]", at + 1


def _next(text: str, at: int, closing: str) -> int:
    """Where the next element begins, or the end stands."""
    at = _after(text, at)
    if text[at] == closing:
        return at
    if text[at] != ",":
        raise ValueError
    at = _after(text, at + 1)
    if text[at] == closing:
        raise ValueError  # nothing stands behind the comma
    return at


def _after(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "it matches nothing too"
    return found.end()
