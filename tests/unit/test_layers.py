"""Who may import whom, and where tasks are born, read from the syntax tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "service").rglob("*.py"))

BELOW: dict[str, set[str]] = {
    "service": set(),
    "service.clock": set(),
    "service.core": set(),
    "service.ports": {"service.core"},
    "service.settings": {"service.core"},
    "service.pipeline": {"service.clock", "service.core", "service.ports"},
    "service.kafka": {"service.clock", "service.core", "service.ports", "service.settings"},
    "service.llm": {"service.clock", "service.core", "service.ports", "service.settings"},
    "service.telemetry": {"service.clock", "service.core", "service.ports", "service.settings"},
}
BELOW["service.app"] = set(BELOW) - {"service"}
BELOW["service.workers"] = {*BELOW["service.app"], "service.app"}
BELOW["service.demo"] = {*BELOW["service.app"], "service.app"}
BELOW["service.commands"] = set(BELOW) - {"service"}
BELOW["service.__main__"] = {"service.commands"}

PURE = {"service", "service.clock", "service.core", "service.ports", "service.pipeline"}
"""Parts that stand on the standard library alone."""

WORLDLY = {"socket", "ssl", "time", "os", "random", "subprocess", "threading", "datetime"}
"""What the core must not have: the world, its clock and its dice come in as arguments."""

VAGUE = {"util", "utils", "helper", "helpers", "manager", "managers", "common", "misc"}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the service that a module belongs to: a package or a file beside them."""
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            # `from service import pipeline` imports a module too; a class is none.
            if node.module == "service":
                yield from (f"service.{one.name}" for one in node.names if one.name.islower())


def wrong_imports(module: str, source: str) -> list[str]:
    """What `module` imports and must not."""
    part = part_of(module)
    return [name for name in imports(ast.parse(source)) if not _may_import(part, name)]


def _may_import(part: str, name: str) -> bool:
    top = name.split(".")[0]
    if top == "service":
        return part_of(name) in {part, "service", *BELOW[part]}
    if part == "service.core" and top in WORLDLY:
        return False
    return part not in PURE or top in sys.stdlib_module_names


def loose_tasks(source: str) -> list[int]:
    """Lines that start a task outside a task group."""
    tree = ast.parse(source)
    groups = set(_groups(tree))
    groups |= set(_other_names(tree, groups))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and _is_loose(node, groups)
    ]


def _is_loose(node: ast.Attribute | ast.Name, groups: set[str]) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr
    if name in {"ensure_future", "gather", "run_coroutine_threadsafe"}:
        return True
    if name != "create_task":
        return False
    return isinstance(node, ast.Name) or _last(node.value) not in groups


def _groups(tree: ast.AST) -> Iterator[str]:
    """Names that hold a TaskGroup: entered, annotated or assigned as one."""
    for node in ast.walk(tree):
        match node:
            case ast.withitem(context_expr=made, optional_vars=target) if target and _makes(made):
                yield _last(target)
            case ast.AnnAssign(target=target, annotation=kind) if "TaskGroup" in ast.unparse(kind):
                yield _last(target)
            case ast.arg(arg=name, annotation=kind) if kind and "TaskGroup" in ast.unparse(kind):
                yield name
            case ast.Assign(targets=[target], value=made) if _makes(made):
                yield _last(target)


def _other_names(tree: ast.AST, groups: set[str]) -> Iterator[str]:
    """Names that one of `groups` is assigned to: `self._group = group`."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[target], value=ast.Name(id=name)) if name in groups:
                yield _last(target)


def _makes(node: ast.AST) -> bool:
    return "TaskGroup()" in ast.unparse(node)


def _last(node: ast.AST) -> str:
    """`tasks` of `tasks`, `_tasks` of `self._tasks`; of anything else its text."""
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


# --- the rules of this repository ---


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_downward(file: Path) -> None:
    """core <- ports, settings <- pipeline <- kafka, llm, telemetry <- app <- workers <- commands.

    Adapters don't know each other, and the core knows neither the world nor a client library."""
    assert wrong_imports(module_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_tasks_are_born_in_groups(file: Path) -> None:
    """No task outlives its parent: none is started outside a TaskGroup."""
    assert loose_tasks(file.read_text(encoding="utf-8")) == []


def test_no_module_is_named_for_nothing() -> None:
    """A name like util says nothing about what belongs into the file."""
    assert [file for file in FILES if VAGUE & set(file.stem.split("_"))] == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_says_what_it_is(file: Path) -> None:
    """Every file opens with a sentence."""
    sentence = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert sentence
    assert sentence.split("\n\n")[0].rstrip().endswith((".", ":"))


# --- that the rules would be noticed ---


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("service.core.lanes", "from service.ports import Source"),
        ("service.core.lanes", "import aiokafka"),
        ("service.core.lanes", "import time"),
        ("service.core.lanes", "def f():\n    from service import settings"),
        ("service.pipeline", "from service.settings import Settings"),
        ("service.pipeline", "import pydantic"),
        ("service.kafka.sink", "from service.pipeline import Bounds"),
        ("service.core.lanes", "from service import clock"),
        ("service.kafka.sink", "from service.llm.prompt import build_prompt"),
        ("service.llm.extractor", "from service.telemetry.metrics import Metrics"),
        ("service.telemetry.probes", "import service.kafka.source"),
        ("service.settings", "from service.app import run"),
        ("service.workers", "from service.commands.plan import plan"),
        ("service.app", "from service.commands.cli import main"),
        ("service.kafka.source", "from service.demo.broker import EmbeddedBroker"),
    ],
)
def test_an_upward_import_is_noticed(module: str, source: str) -> None:
    """Each of these breaks the order and is found."""
    assert wrong_imports(module, source)


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio\nasyncio.create_task(f())",
        "from asyncio import create_task\ncreate_task(f())",
        "asyncio.get_running_loop().create_task(f())",
        "loop.create_task(f())",
        "await asyncio.gather(f(), g())",
        "asyncio.ensure_future(f())",
    ],
)
def test_a_loose_task_is_noticed(source: str) -> None:
    """Each of these starts a task that nobody waits for."""
    assert loose_tasks(source)


@pytest.mark.parametrize(
    "source",
    [
        "async def f():\n async with asyncio.TaskGroup() as tasks:\n  tasks.create_task(g())",
        "class A:\n def __init__(self, tasks: TaskGroup):\n  tasks.create_task(g())",
        "def f(group: TaskGroup):\n self._group = group\n self._group.create_task(g())",
        "self._tasks: asyncio.TaskGroup | None = None\nself._tasks.create_task(g())",
        "self._group = asyncio.TaskGroup()\nself._group.create_task(g())",
    ],
)
def test_a_task_in_a_group_is_fine(source: str) -> None:
    """Each of these is born in a group."""
    assert loose_tasks(source) == []
