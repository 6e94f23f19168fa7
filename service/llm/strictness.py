"""Whether a JSON schema may be sent with `strict: true`.

The rules are OpenAI's for structured outputs (a subset of JSON Schema). What is not known to be
allowed counts as not allowed: without `strict` a request is answered with a little less care,
with `strict` and a keyword out of bounds every request is refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
