"""Answers as providers give them: what becomes of their messages (tests/conformance.py)."""

from __future__ import annotations

import pytest

from tests.conformance import Case, cases, give, is_right

pytestmark = pytest.mark.usefixtures("certificates_read_once")


@pytest.mark.parametrize(
    "case",
    cases(),
    ids=lambda case: f"{case.provider}: {case.case}",
)
async def test_an_answer_is_judged_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the row's `right` says."""
    monkeypatch.setenv("OPENAI_BASE_URL", "set by the case")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    got = await give(case)
    assert is_right(case, got), f"{case.right} expected, got {got}: {got.detail}"
