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
    "service.signals": set(),
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

KAFKA_FLOORS = (
    "service.kafka.client",
    "service.kafka.headers",
    "service.kafka.sending",
    "service.kafka.transactions",
    "service.kafka.group",
    "service.kafka.letters",
    "service.kafka.decoding",
    "service.kafka.provisioning",
    "service.kafka.sink",
    "service.kafka.source",
)
"""The floors of the Kafka adapter, lowest first: a file imports its own floor and those below."""

CLASS_LINES_MAX, CLASS_METHODS_MAX = 350, 30
PIPELINE_METHODS_MAX = 20
FILE_LINES_MAX = 800
"""What one reader holds in mind; the pipeline's parts are bound closer."""

AIOKAFKA_OFFERS = {
    "aiokafka",
    "aiokafka.abc",
    "aiokafka.admin",
    "aiokafka.admin.config_resource",
    "aiokafka.coordinator.assignors.sticky.sticky_assignor",
    "aiokafka.errors",
    "aiokafka.partitioner",
    "aiokafka.structs",
}
"""Modules of aiokafka that users are meant to import."""

PRIVATE_OF_AIOKAFKA = "service/kafka/client/private.py"
REQUESTS = "service/kafka/client"
"""Requests that the client lacks are made of `aiokafka.protocol` in this folder alone."""

PRIVATE_OF_AIOHTTP = "service/llm/lean.py"

HARMLESS = {"_replace", "_asdict", "_fields", "_make", "_Hash"}
"""Public names of named tuples, which begin with an underscore so as not to be fields; and the
name that types have for what hashlib makes."""

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


def floor_of(module: str) -> int | None:
    """The floor of a file of the Kafka adapter, 0 being the lowest."""
    return next(
        (at for at, floor in enumerate(KAFKA_FLOORS) if f"{module}.".startswith(f"{floor}.")), None
    )


def imports_of_higher_floors(module: str, source: str) -> list[str]:
    """What a file of the Kafka adapter imports from a floor above its own."""
    own = floor_of(module)
    return [
        name
        for name in names_imported(ast.parse(source))
        if own is not None and (other := floor_of(name)) is not None and other > own
    ]


def names_imported(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and what is imported from them as if it were a module too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle_in(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one last too; empty if none do."""
    done: set[str] = set()

    def search(module: str, way: tuple[str, ...]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imported[module]):
            if found := search(other, (*way, module)):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imported) if (found := search(module, ()))), [])


def reads_of_private_names(source: str) -> list[str]:
    """Attributes with an underscore of objects that are neither `self` nor `cls`."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in HARMLESS
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    ]


def modules_of(package: str, source: str) -> set[str]:
    """The modules of a package that a file imports."""
    return {
        name
        for name in imports(ast.parse(source))
        if name == package or name.startswith(f"{package}.")
    }


def too_large(source: str, methods_max: int = CLASS_METHODS_MAX) -> list[str]:
    """Classes that have more lines or methods than one reader holds in mind."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            methods = sum(isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef) for x in node.body)
            if lines > CLASS_LINES_MAX or methods > methods_max:
                found.append(f"{node.name}: {lines} lines, {methods} methods")
    return found


# --- the rules of this repository ---


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_downward(file: Path) -> None:
    """core <- ports, settings <- pipeline <- kafka, llm, telemetry <- app <- workers <- commands.

    Adapters don't know each other, and the core knows neither the world nor a client library."""
    assert wrong_imports(module_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_floors_of_the_kafka_adapter(file: Path) -> None:
    """client <- sending <- transactions <- group <- letters <- sink, source: straight down."""
    assert imports_of_higher_floors(module_of(file), file.read_text(encoding="utf-8")) == []


def test_no_circle_of_files() -> None:
    """No file imports itself by way of others, not even for its types alone."""
    modules = {module_of(file): file for file in FILES}
    imported = {
        module: set(names_imported(ast.parse(file.read_text(encoding="utf-8")))) & modules.keys()
        for module, file in modules.items()
    }
    assert circle_in({module: found - {module} for module, found in imported.items()}) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_private_parts_of_aiokafka_are_used_in_one_file(file: Path) -> None:
    """A new version of the client is compared with one file, not with all of them."""
    source, path = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    if path == PRIVATE_OF_AIOKAFKA:
        return
    hidden = {
        name
        for name in modules_of("aiokafka", source) - AIOKAFKA_OFFERS
        if not (path.startswith(REQUESTS) and name.startswith("aiokafka.protocol"))
    }
    assert hidden == set()
    if path.startswith("service/kafka/"):
        assert reads_of_private_names(source) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_private_parts_of_aiohttp_are_used_in_one_file(file: Path) -> None:
    """So is what a new version of aiohttp, or of the model's client, can break."""
    source, path = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    if path == PRIVATE_OF_AIOHTTP:
        return
    assert modules_of("aiohttp", source) <= {"aiohttp"}
    if path.startswith("service/llm/"):
        assert reads_of_private_names(source) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_classes_fit_a_head(file: Path) -> None:
    """Whatever grows past these bounds is two things by then."""
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE_LINES_MAX
    in_pipeline = module_of(file).startswith("service.pipeline")
    assert too_large(source, PIPELINE_METHODS_MAX if in_pipeline else CLASS_METHODS_MAX) == []


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


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("service.kafka.client.stored", "from service.kafka.group.starts import HeldOut"),
        ("service.kafka.sending.queues", "from service.kafka.transactions import writer"),
        ("service.kafka.transactions.writer", "from service.kafka.group import holdings"),
        ("service.kafka.letters.written", "def f():\n import service.kafka.sink"),
    ],
)
def test_an_import_of_a_higher_floor_is_noticed(module: str, source: str) -> None:
    """Each of these climbs a stair and is found."""
    assert imports_of_higher_floors(module, source)


def test_a_circle_is_noticed() -> None:
    """Also one of three, and one that is reached from outside of it."""
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_read_of_a_private_name_is_noticed() -> None:
    """That of an object in one's own attribute too; one's own attributes and named tuples not."""
    assert reads_of_private_names("self._client._sender.task") == ["self._client._sender"]
    assert reads_of_private_names("admin._send_request(x)") == ["admin._send_request"]
    assert reads_of_private_names("self._client.send(cls._x, output._replace(a=1))") == []


def test_a_large_class_is_noticed() -> None:
    """By its lines, and by its methods."""
    methods = "".join(f" def f{n}(self): ...\n" for n in range(CLASS_METHODS_MAX + 1))
    assert too_large(f"class A:\n{methods}")
    assert too_large("class A:\n" + " x = 1\n" * CLASS_LINES_MAX)
    assert too_large(f"class A:\n{' def f(self): ...'}\n") == []
