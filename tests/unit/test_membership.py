"""What the client would not say of itself: another has taken our place while it joined."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from aiokafka.errors import KafkaError, for_code

from service.kafka.client.private import FencedInstanceIdError, Membership


def consumer(pending: Exception | None) -> SimpleNamespace:
    """A client whose group task waits to tell of this; `heard` counts how often it went on."""
    coordinator = SimpleNamespace(_pending_exception=pending, heard=0)

    def check_errors() -> None:
        coordinator.heard += 1
        if pending is not None:
            raise pending

    coordinator.check_errors = check_errors
    return SimpleNamespace(_coordinator=coordinator)


def test_whoever_is_put_out_while_it_joins_hears_why_and_does_not_join_again() -> None:
    """The client wraps what the broker answered; heard, it would try once more at once."""
    answered = for_code(82)()
    put_out = consumer(KafkaError(repr(answered)))
    with pytest.raises(FencedInstanceIdError):
        Membership(put_out).raise_what_failed()
    assert put_out._coordinator.heard == 0


def test_anything_else_is_raised_as_it_is() -> None:
    """The client goes on once it is heard."""
    other = consumer(KafkaError("something else"))
    with pytest.raises(KafkaError, match="something else"):
        Membership(other).raise_what_failed()
    assert other._coordinator.heard == 1
    Membership(consumer(None)).raise_what_failed()
