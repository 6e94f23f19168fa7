"""Numbers in sentences."""

import pytest

from service.core.words import how_many


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 dead letters"),
        (1, "1 dead letter"),
        (2, "2 dead letters"),
        (1200, "1,200 dead letters"),
    ],
)
def test_only_one_is_singular(number: int, expected: str) -> None:
    """None and many take an s."""
    assert how_many(number, "dead letter", ",") == expected
