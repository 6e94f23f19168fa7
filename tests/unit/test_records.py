"""The record type: found by name or by file, refused in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.core.errors import WrongSettings
from service.core.messages import Record
from service.llm.records import load_record_type, version_of

PLACE = """
from __future__ import annotations
from datetime import date
from pydantic import BaseModel, ConfigDict
from neighbour import Country

class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    founded: date
    country: Country | None = None
    twin: Place | None = None
"""
NEIGHBOUR = """
from pydantic import BaseModel

class Country(BaseModel):
    code: str
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    (tmp_path / "types.py").write_text(PLACE)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    return f"{tmp_path / 'types.py'}:Place"


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("neighbour", "my_records"):
        sys.modules.pop(name, None)


def test_the_default_record_is_a_person() -> None:
    """A type is found by module and name, and says its schema."""
    record = load_record_type("service.demo.records:Person")
    assert set(record.schema["properties"]) == {"name", "age"}
    assert not record.many


def test_a_file_is_loaded_with_its_neighbours(place: str) -> None:
    """A file may import what lies beside it, refer to itself, and be called like a module."""
    record = load_record_type(place)
    answer = record.answer.model_validate_json('{"name": "Rome", "founded": "0753-04-21"}')
    assert record.records(answer) == (
        Record(b'{"name":"Rome","founded":"0753-04-21","country":null,"twin":null}'),
    )


def test_loading_a_file_leaves_the_import_path_alone(place: str) -> None:
    """Neither the file's directory nor its name stay behind for other imports."""
    before = list(sys.path)
    load_record_type(place)
    assert sys.path == before
    assert sys.modules["types"].__name__ == "types"


def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The console script finds what `python -m` would."""
    (tmp_path / "my_records.py").write_text(NEIGHBOUR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert load_record_type("my_records:Country").model.__name__ == "Country"


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("no.such.module:Person", "no module 'no'"),
        ("service.demo.nothing:Person", "no module 'service.demo.nothing'"),
        ("service.demo.records:Persona", "has no 'Persona'; there are: Person"),
        ("service.core.errors:WrongSettings", "is no pydantic model"),
        ("pydantic:BaseModel", "named fields"),
        ("nowhere/records.py:Person", "there is no file"),
    ],
)
def test_a_wrong_reference_is_a_sentence(reference: str, sentence: str) -> None:
    """Whatever is wrong with the name: what, where, what to do."""
    with pytest.raises(WrongSettings, match=r"^extraction\.record: ") as refused:
        load_record_type(reference)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("code", "sentences"),
    [
        ("x = 1\ny = x.nothing\n", ("AttributeError", "line 2")),
        ("class Broken(\n", ("SyntaxError", "line 1")),
        ("import no_such_thing\n", ("ModuleNotFoundError", "no_such_thing", "line 1")),
        (
            "def deep():\n    raise KeyError('boom')\n\ndeep()\n",
            ("KeyError", "boom", "line 2"),
        ),
    ],
)
def test_a_file_that_fails_is_a_sentence(
    tmp_path: Path, code: str, sentences: tuple[str, ...]
) -> None:
    """The user's mistake is told by type and line, without a stack trace."""
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(WrongSettings) as refused:
        load_record_type(f"{tmp_path / 'broken.py'}:Broken")
    for sentence in (*sentences, "broken.py"):
        assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    "field", ["call: Callable[[int], int]", "other: 'Nowhere'", "thing: Thing"]
)
def test_a_model_that_cannot_be_asked_for_is_a_sentence(tmp_path: Path, field: str) -> None:
    """A model without a JSON schema is refused before the first message."""
    (tmp_path / "odd.py").write_text(
        "from typing import Callable\nfrom pydantic import BaseModel\n"
        "class Thing: ...\n"
        "class Odd(BaseModel):\n"
        "    model_config = {'arbitrary_types_allowed': True}\n"
        f"    {field}\n"
    )
    with pytest.raises(WrongSettings, match="no usable JSON schema"):
        load_record_type(f"{tmp_path / 'odd.py'}:Odd")


def test_many_records_come_as_a_list() -> None:
    """With cardinality many the model is asked for a list, and none is an answer too."""
    record = load_record_type("service.demo.records:Person", "many")
    answer = record.answer.model_validate_json(
        '{"records": [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 5}]}'
    )
    assert [json.loads(one.json)["name"] for one in record.records(answer)] == ["Ada", "Bo"]
    assert record.records(record.answer.model_validate_json('{"records": []}')) == ()


def test_a_closed_record_stays_closed_in_its_list(place: str) -> None:
    """What forbids other fields alone forbids them in a list as well."""
    assert load_record_type(place, "many").answer.model_json_schema()["additionalProperties"] is (
        False
    )


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("name", b"Rome"),
        ("founded", b"0753-04-21"),
        ("country", b'{"code":"IT"}'),
        ("twin", None),
    ],
)
def test_the_key_is_the_field_as_it_stands_in_the_record(
    place: str, field: str, key: bytes | None
) -> None:
    """Text without quotes, anything else as JSON; an empty field leaves the message's key."""
    record = load_record_type(place, key_field=field)
    answer = record.answer.model_validate_json(
        '{"name": "Rome", "founded": "0753-04-21", "country": {"code": "IT"}}'
    )
    assert record.records(answer)[0].key == key


def test_a_key_field_must_be_a_field() -> None:
    """A misspelt key field is told with the names that there are."""
    with pytest.raises(WrongSettings, match=r"output\.key_field.*'nam'.*name, age"):
        load_record_type("service.demo.records:Person", key_field="nam")


def test_the_version_follows_the_schema_alone() -> None:
    """The same schema has the same version in whatever order; another one has another."""
    one = {"properties": {"a": 1, "b": [1, 2]}}
    assert version_of(one) == version_of({"properties": {"b": [1, 2], "a": 1}})
    assert version_of(one) != version_of({"properties": {"a": 1, "b": [2, 1]}})


def test_a_secret_that_would_be_published_as_asterisks_is_a_sentence() -> None:
    """Wherever it stands; where a serializer of the user's shows it, it is as they want it."""
    with pytest.raises(WrongSettings, match=r"'token'.*asterisks.*\."):
        load_record_type("tests.support.records:Hidden")
    load_record_type("tests.support.records:Shown")


def test_a_computed_field_can_be_the_key() -> None:
    """It stands in the record as any other does."""
    kind = load_record_type("tests.support.records:Counted", key_field="initial")
    value = kind.model.model_validate({"name": "Ann", "size": 1})
    assert [record.key for record in kind.records(value)] == [b"A"]
