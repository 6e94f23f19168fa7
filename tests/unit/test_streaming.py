"""Where elements end in a growing text, and what a set is to a reader."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

import pytest

from service.llm.streaming import Elements
from tests.chaos.reader import first_complete_sets

RECORDS = [
    {"name": 'quotes " and \\ and ]},[{', "tags": [], "inner": {"records": [1, {"a": "\\\\"}]}},
    {"name": "Ünï 🙂", "tags": ["]", "}", ","]},
    {},
]


def elements(text: str, sizes: list[int]) -> list[tuple[str, bool]]:
    found, at, parser = [], 0, Elements()
    while at < len(text):
        size = sizes.pop() if sizes else len(text)
        found += parser.feed(text[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("indent", [None, 2])
def test_elements_do_not_depend_on_the_pieces(indent: int | None) -> None:
    """Cut anywhere, a text has the elements that JSON says, and the last one is known as such."""
    for seed in range(200):
        chance = random.Random(seed)
        wanted = RECORDS[: chance.randrange(4)]
        text = json.dumps({"a": ["[", {"records": 1}], "records": wanted}, indent=indent)
        found = elements(text, [chance.randrange(1, 9) for _ in range(500)])
        assert [json.loads(each) for each, _ in found] == wanted, f"seed {seed}"
        assert [last for _, last in found] == [n + 1 == len(wanted) for n in range(len(wanted))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"records": []}', []),
        ('{"records": [ ]}', []),
        ('{"records": [1,]}', [("1", False)]),
        ('{"records": [1}', []),
        ('[{"a": 1}]', []),
        ('{"other": [1, 2]}', []),
        ('{"x": {"records": [1, 2]}}', []),
        ('{"records": [1, 2], "records": [3, 4]}', [("1", False), (" 2", True)]),
    ],
)
def test_what_is_no_list_of_ours(text: str, expected: list[tuple[str, bool]]) -> None:
    """Elements come from the list of records alone, and only up to its first end."""
    assert elements(text, []) == expected


def test_the_cost_is_linear() -> None:
    """Ten times the text in pieces of four characters takes about ten times as long, not a
    hundred times: within one long element as well."""

    def spent_s(size: int) -> float:
        text = json.dumps({"records": [{"name": "x," * size}]})
        began_s = time.process_time()
        assert len(elements(text, [4] * len(text))) == 1
        return time.process_time() - began_s

    spent_s(1_000)
    assert spent_s(100_000) < 40 * spent_s(10_000)


@dataclass
class Read:
    header: dict[str, str]


def part(answer: str, index: int, count: int | None = None) -> Read:
    header = {
        "sluice.id": f"in:0:7:{index}",
        "sluice.answer.id": answer,
        "sluice.record.index": str(index),
    }
    return Read(header | ({} if count is None else {"sluice.record.count": str(count)}))


def marker(answer: str, records: int) -> Read:
    return Read(
        {
            "sluice.id": "in:0:7:aborted",
            "sluice.answer.id": answer,
            "sluice.record.aborted": str(records),
        }
    )


def test_a_reader_takes_the_first_whole_set() -> None:
    """Closed and never closed answers are dropped, repeats too; order within does not matter."""
    closed = [part("a", 0), part("a", 1), marker("a", 2)]
    never = [part("b", 0)]
    whole = [part("c", 0), part("c", 2, 3), part("c", 0), part("c", 1)]
    again = [part("d", 0), part("d", 1, 2)]
    assert list(first_complete_sets([*closed, *never, *whole, *again])) == [
        [whole[2], whole[3], whole[1]]
    ]


def test_a_reader_of_whole_sets_reads_as_before() -> None:
    """Where every record says how many they are, nothing has changed."""
    records = [part("a", 1, 2), part("b", 0, 2), part("b", 1, 2)]
    assert list(first_complete_sets(records)) == [records[1:]]
