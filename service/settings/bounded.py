"""Bounds for reading settings: the file's size, how deep it nests, how many values it has.

A template that went wrong can make a settings file that holds anything. The start then ends at once
with a sentence: it does not hang, and it does not fill the memory.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import yaml

from service.core.errors import WrongSettings

FILE_MAX_BYTES = 1024 * 1024
"""How many bytes a settings file may have; PyYAML takes about ten seconds for as many."""

LEVELS_MAX = 64
"""How deep values may nest; far below the depth at which parsers and validators fail."""

VALUES_MAX = 100_000
"""How many values a file may have. Values that an alias repeats count each time, because a few
lines of aliases of aliases can stand for billions."""

DIGITS_MAX = 100
"""How many characters a number may have. Python refuses to print one of more than 4,300 digits."""

Value = TypeVar("Value")


def text_of(path: Path) -> str:
    """The text of a settings file; raises `OSError` where it cannot be read.

    Raises `WrongSettings` for a pipe or a device, which can block or never end, and for a file that
    is larger than any settings are.
    """
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise WrongSettings(f"{path}: is a pipe, a socket or a device; copy it to a file first")
    with path.open("rb") as file:
        found = file.read(FILE_MAX_BYTES + 1)
    if len(found) > FILE_MAX_BYTES:
        raise WrongSettings(f"{path}: is larger than {FILE_MAX_BYTES} bytes; no settings are")
    return found.decode("utf-8-sig")


def too_much(root: Value, inner: Callable[[Value], Iterable[Value]]) -> str | None:
    """A sentence where a tree of values exceeds a bound; None where it does not.

    A value that contains itself counts as nested too deep.
    """
    level, values = [root], 1
    for _ in range(LEVELS_MAX):
        below: list[Value] = []
        for value in level:
            below.extend(inner(value))
            if values + len(below) > VALUES_MAX:
                return f"it comes to more than {VALUES_MAX} values"
        if not below:
            return None
        level, values = below, values + len(below)
    return f"it nests deeper than {LEVELS_MAX} levels"


def of_values(value: object) -> Iterable[object]:
    """The values directly below a JSON value."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    return ()


def _of_nodes(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader; every value that it cannot read is an error that names the line."""

    def get_single_node(self) -> yaml.Node | None:
        try:
            node = super().get_single_node()
        except RecursionError:
            raise _refused(f"it nests deeper than {LEVELS_MAX} levels", None) from None
        problem = None if node is None else too_much(node, _of_nodes)
        if problem is not None:
            raise _refused(problem, None)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if kind == "int" and len(node.value) > DIGITS_MAX:
            raise _refused(f"a number of {len(node.value)} characters", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError):
            # PyYAML raises these where a value does not fit its tag or its form.
            raise _refused(f"this is no {kind}", node.start_mark) from None


def _refused(problem: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
