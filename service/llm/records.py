"""The user's record type: found by name or by file, checked once, turned into JSON records."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import operator
import secrets
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeGuard

from instructor.v2.core.response_model import prepare_response_model
from pydantic import BaseModel, ConfigDict, RootModel, create_model

from service.core.errors import WrongSettings
from service.core.messages import Record
from service.llm.record_names import Dump, dump_of, hidden_field, published_schema
from service.llm.strict_json import strict_json
from service.llm.strictness import Derived, Lost, derive

OFF = "extraction.strict is off"
_VERSION_CHARS = 12
"""48 bits of a hash: enough to tell the versions of one schema or prompt apart."""


@dataclass(frozen=True, slots=True)
class RecordType:
    """What a message is turned into.

    `model` is the user's own class, `answer` what the language model is asked for: the same
    class, or with cardinality many a wrapper with a list of them.
    """

    model: type[BaseModel]
    answer: type[BaseModel]
    key_field: str | None
    schema: dict[str, Any]
    schema_version: str
    dump: Dump = field(repr=False)
    strict: Derived | Lost
    """What the answer's schema becomes under `strict: true`, and the way back."""

    @property
    def many(self) -> bool:
        return self.answer is not self.model

    @property
    def code_version(self) -> str:
        """A hash of the file that defines the model: its validators decide what is an answer.

        What that file imports plays no part in it; empty where there is no file.
        """
        try:
            return version_of(inspect.getsource(sys.modules[self.model.__module__]))
        except (OSError, TypeError, KeyError):
            return ""

    def records(self, answer: BaseModel) -> tuple[Record, ...]:
        """The records of a validated answer. Raises whatever the user's serializers raise."""
        return tuple(self._record(value) for value in self.values(answer))

    def values(self, answer: BaseModel) -> Iterable[BaseModel]:
        """The user's own values within an answer."""
        return answer.records if self.many else (answer,)  # type: ignore[attr-defined]

    def answer_of(self, text: str) -> Any:
        """An answer from its JSON. Strict, as instructor is: "30" is no age. Raises what validation
        raises, and their code."""
        return strict_json(self.answer)(self.strict.without_nulls(text))

    def element(self, text: str) -> Record:
        """One record of a list, from its JSON. Raises what validation raises, and their code."""
        return self._record(strict_json(self.model)(self.strict.element_without_nulls(text)))

    def _record(self, value: BaseModel) -> Record:
        return Record(
            self.dump(value), None if self.key_field is None else _key(value, self.key_field)
        )


def _key(value: BaseModel, field: str) -> bytes | None:
    """The field as it stands in the record's JSON, text without its quotes."""
    dumped = value.model_dump(mode="json", include={field}, by_alias=False, warnings="none")
    key = dumped.get(field)
    if key is None:
        return None
    return key.encode() if isinstance(key, str) else _canonical(key)


def load_record_type(
    reference: str,
    cardinality: Literal["one", "many"] = "one",
    key_field: str | None = None,
    confidence_field: str | None = None,
    strict: Literal["auto", "off"] = "auto",
) -> RecordType:
    """The type that `extraction.record` names; raises `WrongSettings` with a sentence."""
    model = _model(reference)
    schema = _schema(model, reference)
    _has_field(model, key_field, "output.key_field")
    _has_field(model, confidence_field, "extraction.confidence.field")
    answer = model if cardinality == "one" else _list_of(model)
    return RecordType(
        model=model,
        answer=answer,
        key_field=key_field,
        schema=schema,
        schema_version=version_of(schema),
        dump=dump_of(model),
        strict=Lost(OFF) if strict == "off" else derive(answer.model_json_schema()),
    )


def _has_field(model: type[BaseModel], field: str | None, setting: str) -> None:
    fields = (*model.model_fields, *model.model_computed_fields)
    if field is not None and field not in fields:
        known = ", ".join(fields) or "none"
        raise WrongSettings(
            f"{setting}: {model.__name__} has no field {field!r}; its fields: {known}."
        )


def version_of(value: object) -> str:
    """A short hash of a JSON value that does not depend on the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()[:_VERSION_CHARS]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _list_of(model: type[BaseModel]) -> type[BaseModel]:
    # A closed record stays closed inside its list, which strict schemas ask for.
    closed = model.model_config.get("extra") == "forbid"
    wrapper: type[BaseModel] = create_model(
        f"{model.__name__}List",
        __config__=ConfigDict(extra="forbid") if closed else None,
        __doc__=f"Every {model.__name__} that the text holds, in its order; none is an answer too.",
        __module__=model.__module__,
        records=(list[model], ...),  # type: ignore[valid-type]
    )
    return wrapper


def _schema(model: type[BaseModel], reference: str) -> dict[str, Any]:
    """The JSON schema; building it proves that the model can be asked for at all."""
    try:
        prepare_response_model(model)
        schema = published_schema(model)
        hidden = hidden_field(model)
    # The user's class: whatever its making raises is a wrong setting, told in a sentence.
    except Exception as error:
        raise WrongSettings(
            f"extraction.record: {reference!r} has no usable JSON schema: {_one_line(error)}"
        ) from None
    if hidden is not None:
        raise WrongSettings(
            f"extraction.record: the field {hidden!r} of {reference!r} is a secret, which would be "
            "published as asterisks: make it a str, or give it a field_serializer."
        )
    return schema


def _model(reference: str) -> type[BaseModel]:
    place, _, name = reference.rpartition(":")
    module = _file(place) if place.endswith(".py") else _module(place)
    return _checked(_member(module, place, name), reference)


def _member(module: ModuleType, place: str, name: str) -> object:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        known = [
            key
            for key, value in vars(module).items()
            if _is_model(value) and value.__module__ == module.__name__
        ]
        there = f"there are: {', '.join(known)}" if known else "there is no pydantic model in it"
        raise WrongSettings(f"extraction.record: {place!r} has no {name!r}; {there}.") from None


def _is_model(value: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _checked(value: object, reference: str) -> type[BaseModel]:
    if not _is_model(value):
        raise WrongSettings(
            f"extraction.record: {reference!r} is no pydantic model (a class derived from "
            "pydantic.BaseModel)."
        )
    if value is BaseModel or issubclass(value, RootModel):
        raise WrongSettings(
            f"extraction.record: {reference!r} must be a model with named fields; for a list of "
            "records set extraction.cardinality to many."
        )
    return value


def _module(name: str) -> ModuleType:
    # As `python -m` does, and the console script does not: the working directory counts. It goes
    # last, so that nothing in it hides an installed package.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise WrongSettings(
                f"extraction.record: there is no module {error.name!r}, neither installed nor in "
                f"{Path.cwd()}."
            ) from None
        raise _broken(name, error) from None
    # The user's module: whatever it raises is a wrong setting, told in a sentence.
    except Exception as error:
        raise _broken(name, error) from None


def _file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise WrongSettings(f"extraction.record: there is no file {str(path)!r}.")
    # Its own name for each path: a file called types.py must not hide Python's.
    name = f"sluice_record_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pydantic looks annotations up through sys.modules.
    sys.modules[name] = module
    try:
        with _beside(path.parent):
            spec.loader.exec_module(module)
    # The user's file: whatever it raises is a wrong setting, told in a sentence.
    except Exception as error:
        del sys.modules[name]
        raise _broken(place, error) from None
    return module


@contextmanager
def _beside(directory: Path) -> Iterator[None]:
    """Let the file import its neighbours while it is loaded, and no longer."""
    sys.path.append(str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _broken(place: str, error: Exception) -> WrongSettings:
    return WrongSettings(
        f"extraction.record: importing {place!r} failed: {_one_line(error)}{_where(error)}."
    )


def _where(error: Exception) -> str:
    """The line of the user's that raised it, where there is one."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})" if error.lineno else ""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if "importlib" not in frame.filename][1:]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def _one_line(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def new_answer_id() -> str:
    """The name of one set of records, for readers; drawn, so that no two answers share one."""
    return secrets.token_hex(16)
