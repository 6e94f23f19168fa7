"""The rows of tests/mutations.py still say what stands in service/."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.defect[:40])
def test_the_text_of_each_row_stands_once(mutation: Mutation) -> None:
    """A guard whose text has changed would be missed only by the long run that takes it away."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
