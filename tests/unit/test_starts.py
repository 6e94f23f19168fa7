"""Where reading starts, decided from what Kafka stores."""

import pytest

from service.core.messages import Partition
from service.kafka.settling import SettlingClock
from service.kafka.starts import (
    Bounds,
    HeldOut,
    Start,
    Stored,
    is_foreign,
    is_new,
    metadata_of,
    where_to_start,
)

P, Q = Partition("in", 0), Partition("in", 1)
NONCE = "0123456789abcdef"


@pytest.mark.parametrize(
    ("stored", "chosen", "expected"),
    [
        (None, 7, Start(7, pin=True)),
        (None, 0, Start(0, pin=True)),
        (None, None, Start(5, pin=True)),
        (5, None, Start(5)),
        (9, None, Start(9)),
        (3, None, Start(3)),
        (9, 7, Start(9)),
    ],
)
def test_a_start_is_what_is_stored_else_what_is_chosen_else_the_logs(
    stored: int | None, chosen: int | None, expected: Start
) -> None:
    """The settings choose only where nothing is stored; only such a start is pinned."""
    found = None if stored is None else Stored(stored, "")

    assert where_to_start(P, found, Bounds(5, 9), chosen) == expected


def test_beyond_the_end_nobody_starts() -> None:
    """The sentence names both offsets, what starting over costs, and how to."""
    held_out = where_to_start(P, Stored(10, ""), Bounds(5, 9), None)

    assert isinstance(held_out, HeldOut)
    for words in ("in[0] is 10", "ends at 9", "pay for", "--reset-offsets", "kafka.group_id"):
        assert words in held_out.problem


@pytest.mark.parametrize(
    ("stored", "new"),
    [
        ({}, True),
        ({P: None, Q: None}, True),
        ({P: None, Q: Stored(1, "")}, False),
        ({P: None, Q: Stored(1, metadata_of(NONCE, None))}, False),
        ({P: None, Q: Stored(1, metadata_of(NONCE, 3))}, True),
        ({P: None, Q: Stored(1, metadata_of(NONCE, 2))}, False),
        ({P: None, Q: Stored(1, metadata_of(NONCE, 33))}, False),
    ],
)
def test_a_group_is_new_in_the_generation_in_which_it_was_found_so(
    stored: dict[Partition, Stored | None], new: bool
) -> None:
    """A member that is faster by a moment does not make the group a known one."""
    assert is_new(stored, generation=3) is new


@pytest.mark.parametrize("began", [None, 1, 2_147_483_647])
def test_our_own_metadata_is_known_again(began: int | None) -> None:
    """With whatever may follow it later."""
    metadata = metadata_of(NONCE, began)

    assert metadata.isascii()
    assert not is_foreign(Stored(0, metadata))
    assert not is_foreign(Stored(0, f"{metadata}:the completed map"))


@pytest.mark.parametrize(
    "metadata", ["", "x", "sluice1:", "sluice1:xyz", "sluice2:" + NONCE, f"sluice1:{NONCE}x"]
)
def test_other_metadata_is_foreign(metadata: str) -> None:
    """Nothing of it is believed."""
    assert is_foreign(Stored(0, metadata))


def test_unsettled_time_counts_only_while_brokers_answer() -> None:
    """An outage in between is left out; settling starts it anew."""
    clock = SettlingClock()
    clock.heard(0.0)
    for now_s in (0.0, 2.0, 4.0):
        clock.tick(now_s, settled=False)
    assert clock.unsettled_s == 4.0

    clock.tick(60.0, settled=False)
    assert clock.unsettled_s == 4.0
    assert not clock.answers(60.0)

    clock.heard(60.0)
    clock.tick(61.0, settled=False)
    assert clock.unsettled_s == 5.0

    clock.tick(62.0, settled=True)
    assert clock.unsettled_s == 0.0


def test_an_old_fetch_is_no_news() -> None:
    """The same answered fetch, seen again, does not mean that a broker answers."""
    clock = SettlingClock()
    clock.fetched(1000, now_s=1.0)
    clock.fetched(1000, now_s=30.0)
    assert not clock.answers(30.0)

    clock.fetched(1001, now_s=31.0)
    assert clock.answers(31.0)
