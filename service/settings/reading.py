"""Reads settings from a YAML file and the environment, and names everything that is wrong at
once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from service.core.errors import WrongSettings
from service.settings.bounded import Loader, of_values, text_of, too_much
from service.settings.settings import PREFIX, Settings
from service.settings.wording import (
    SECTIONS,
    Origins,
    Place,
    dotted,
    every_setting,
    sentences,
    unheard_of,
    variable,
)

DEFAULT_FILE = Path("sluice.yaml")
"""The file that is read where no other is named and it exists in the working folder."""


def load(config: Path | None, environ: Mapping[str, str]) -> Settings:
    """Settings from `config` (or sluice.yaml, where there is one), overridden by `environ`.

    Raises `WrongSettings`, whose text has one line for each wrong setting: where it came from, what
    is wrong and what is allowed. An empty variable counts as not set.
    """
    file = _read(config)
    variables, unknown = _variables(environ)
    wrong = [*file.wrong, *unknown]
    origins = Origins(file.name, file.lines, frozenset(variables))
    try:
        settings = Settings(**_merged(file.values, _Environment(variables)()))
    except ValidationError as error:
        # The error holds all values, secrets too, so `WrongSettings` is not raised from it.
        wrong += [line for one in error.errors() for line in sentences(one, origins)]
        settings = None
    if wrong or settings is None:
        raise WrongSettings("\n".join(wrong))
    return settings


def origin(config: Path | None, environ: Mapping[str, str]) -> str:
    """Where settings come from, for a person: the file's full path and the variables' names."""
    file = config or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    names = sorted(_variables(environ)[0])
    told = [] if file is None else [str(file.absolute())]
    told += [", ".join(names)] if names else []
    return ", and over it ".join(told) or f"defaults alone, no {DEFAULT_FILE} here"


# --- the file ---


@dataclass(frozen=True, slots=True)
class _File:
    """A YAML file: its values, the line of each name, and a sentence for each fault."""

    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[Place, int] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


def _read(config: Path | None) -> _File:
    if config is None and not DEFAULT_FILE.exists():
        return _File()
    path = config or DEFAULT_FILE
    try:
        return _parsed(str(path), text_of(path))
    except OSError as error:
        raise WrongSettings(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise WrongSettings(f"{path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark is None:
            raise WrongSettings(f"{path}: {error.problem}") from None
        why = error.problem or error.context
        raise WrongSettings(f"{path} line {mark.line + 1}: is not YAML: {why}") from None
    except yaml.YAMLError as error:
        raise WrongSettings(f"{path}: is not YAML ({type(error).__name__})") from None


def _parsed(name: str, text: str) -> _File:
    """Values and lines from one parse. The lines are read first, because building the values
    changes the tree where it has merge keys."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return _File(name)
        lines: dict[Place, int] = {}
        wrong = [f"{name} {sentence}" for sentence in _walk(node, (), lines)]
        values = loader.construct_document(node)
        if values is None:
            return _File(name)
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise WrongSettings(f"{name}: has no sections; it should start with one, such as kafka:")
    for place in filter(partial(_take_secret, values), SECRETS):
        wrong.append(
            f"{name} line {lines.get(place)}: {dotted(place)} is a secret and not read from this "
            f"file, which may be copied and committed; set {variable(place)}, or "
            f"{dotted(place)}_file to a file that holds it"
        )
    return _File(name, _tidied(values), lines, tuple(wrong))


_DEPTH = 3
"""How many levels of names there are: section, inner section, setting. Below them are values, which
may contain themselves in YAML."""


def _walk(node: yaml.Node, path: Place, lines: dict[Place, int]) -> Iterator[str]:
    """Note the line of each name; yield a sentence for each name that is there twice."""
    if not isinstance(node, yaml.MappingNode) or len(path) == _DEPTH:
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            yield f"line {line}: {dotted(here)} is there twice (line {lines[here]} has it too)"
        lines.setdefault(here, line)
        yield from _walk(value, here, lines)


SECRETS: tuple[Place, ...] = (("kafka", "security", "password"), ("cache", "redis_url"))
"""Settings that are secrets. Each has a second setting, its name with `_file` at the end, that
names a file with the secret."""


def _take_secret(values: Any, place: Place) -> bool:
    """Remove a secret, so that no later sentence can show it; True: there was one."""
    *sections, name = place
    for section in sections:
        values = values.get(section) if isinstance(values, dict) else None
    return isinstance(values, dict) and values.pop(name, _NOT_THERE) is not _NOT_THERE


_NOT_THERE = object()


def _tidied(values: Any, depth: int = 1) -> Any:
    """The values with all names as text. A section whose settings are all commented out (null in
    YAML) becomes an empty one."""
    tidy = {}
    for name, value in values.items():
        if isinstance(value, dict) and depth < _DEPTH:
            value = _tidied(value, depth + 1)
        elif value is None and str(name) in SECTIONS:
            value = {}
        tidy[str(name)] = value
    return tidy


# --- the environment over it ---


def _variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our variables by name, and a sentence for each that begins with our prefix and is unknown."""
    known = {variable(place) for place in every_setting()}
    given = {name.upper(): value for name, value in environ.items() if value}
    wrong = [
        f"{name}: {unheard_of(name, known)}"
        for name, value in sorted(given.items())
        if name.startswith(PREFIX)
        and name not in known
        and not _KUBERNETES.fullmatch(f"{name}={value}")
    ]
    return {name: given[name] for name in known & given.keys()}, wrong


_KUBERNETES = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    rf"|{PREFIX}(\w+_)?PORT=\w+://.*"
)
"""Variables that Kubernetes sets in every pod of a namespace with a Service called sluice or
sluice-…. A SLUICE_PORT whose value is no URL is not Kubernetes' but a person's mistake."""


class _Environment(EnvSettingsSource):
    """Reads the variables that are passed in, not the process's own."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.env_vars = {name.lower(): value for name, value in variables.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Parse JSON. Text that is no JSON or exceeds a bound stays as it is, so that validation
        reports it together with all other faults."""
        try:
            found = super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError):
            return value
        return value if too_much(found, of_values) else found


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins, setting by setting."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = _merged(below, value)
        else:
            merged[name] = value
    return merged
