"""The table of failures in docs/, against the classes in the code and the tests that show them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from service.core.events import CallResult
from service.core.messages import Reason
from service.llm.failures import (
    REMEDIES,
    TABLE,
    FailureClass,
    Malformed,
    Refused,
    Row,
    Transient,
    Unserviceable,
    Unsupported,
    from_status,
)
from service.telemetry.metrics import RETRY_REASONS

ROOT = Path(__file__).parents[2]

PASSES = "contract/test_extractor.py::test_what_passes_is_handed_back_to_be_tried_again"
REJECTED = "contract/test_extractor.py::test_what_fails_for_good_is_rejected_at_once"
MENDED = "contract/test_extractor.py::test_what_somebody_must_mend_is_no_fault_of_the_message"
USER_CODE = "contract/test_extractor.py::test_an_exception_in_the_users_code_rejects_its_message"
OWN = "contract/test_extractor.py::test_what_says_nothing_is_its_own_once_others_are_answered"
SETTING = "unit/test_failures.py::test_what_somebody_must_mend"

SHOWN_BY = {
    "connection": PASSES,
    "timeout": "contract/test_extractor.py::test_a_call_that_never_returns_is_cut",
    "rate_limited": PASSES,
    "overloaded": PASSES,
    "server_error": PASSES,
    "broken_answer": PASSES,
    "invalid": "contract/test_extractor.py::test_an_answer_that_never_validates_is_rejected",
    "refused": REJECTED,
    "filtered": REJECTED,
    "truncated": "contract/test_cascade.py::test_an_answer_cut_off_twice_is_rejected",
    "too_long": "contract/test_cascade.py::test_cutting_has_an_end",
    "undecodable": "contract/test_extractor.py::test_half_a_character_is_undecodable",
    "bad_request": OWN,
    "user_code": USER_CODE,
    "credentials": "process/test_failures.py::test_credentials_refused_later_stop_intake_and_heal",
    "permission": SETTING,
    "unclear": OWN,
    "quota": MENDED,
    "model": MENDED,
    "endpoint": MENDED,
    "setting": SETTING,
    "account": SETTING,
    "region": SETTING,
}
"""By label."""


def shown_by(row: Row) -> str:
    return SHOWN_BY[row.label]


def seen(row: Row) -> str:
    """What a person sees of it."""
    match row.kind:
        case FailureClass.TRANSIENT:
            return f'`sluice_retries_total{{reason="{row.label}"}}`; all fail: not ready'
        case FailureClass.MESSAGE:
            return f"dead letter `{row.label}`"
        case FailureClass.SERVICE:
            return f"not ready ({row.label}): {REMEDIES[row.label]}"


def table() -> str:
    """Every failure, its class and its test, for docs/failures.md (`python -m tests.documents`)."""
    rows = ["| failure | class | what you see | shown by |", "|---|---|---|---|"]
    for row in TABLE:
        path, _, name = shown_by(row).partition("::")
        link = f"[`{name}`](../tests/{path})"
        rows.append(f"| {row.failure} | {row.kind} | {seen(row)} | {link} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("test", sorted({shown_by(row) for row in TABLE}))
def test_the_tests_that_it_names_exist(test: str) -> None:
    """Each is a test function of that file."""
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in tree.body if isinstance(node, kinds)}


def test_the_table_is_complete() -> None:
    """Every result of a call that is a failure, every reason of a dead letter that a call can
    have, every label of a retry and every remedy is in it, and nothing else."""
    labels = {kind: [row.label for row in TABLE if row.kind is kind] for kind in FailureClass}
    transient, message, service = labels.values()
    good = {"validated", "unsure", "service", "cancelled"}
    uncalled = {Reason.UNDECODABLE.value}
    assert {*transient, *message} - uncalled == {*get_args(CallResult)} - good
    elsewhere = {Reason.EXHAUSTED, Reason.PROCESS_DIED, Reason.OUTPUT_TOO_LARGE}
    assert {*message} == {reason.value for reason in Reason} - {one.value for one in elsewhere}
    assert {*service} == set(REMEDIES)
    assert {*transient, *service} == set(RETRY_REASONS)
    assert all(len(set(found)) == len(found) for found in labels.values())


EXAMPLES = [
    *[(400, "unclear"), (401, "credentials"), (402, "quota"), (403, "unclear")],
    *[(404, "endpoint"), (405, "endpoint"), (408, "timeout"), (409, "server_error")],
    *[
        (413, "too_long"),
        (418, "unclear"),
        (422, "unclear"),
        (424, "server_error"),
        (425, "server_error"),
    ],
    *[
        (429, "rate_limited"),
        (498, "overloaded"),
        (500, "server_error"),
        (503, "overloaded"),
        (529, "overloaded"),
    ],
]


@pytest.mark.parametrize(("status", "label"), EXAMPLES)
def test_a_status_has_the_class_of_its_row(status: int, label: str) -> None:
    """What the code makes of a bare status is the class that the table says."""
    match from_status(status, {}, {}, model="gpt", base_url="http://localhost/v1"):
        case Transient(found):
            kind = FailureClass.TRANSIENT
        case Refused(_, found):
            kind = FailureClass.MESSAGE
        case Unserviceable(found):
            kind = FailureClass.SERVICE
        case Unsupported() | Malformed():
            raise AssertionError("a status alone says neither")
    assert found == label
    assert label in {row.label for row in TABLE if row.kind is kind}
