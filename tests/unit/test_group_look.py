"""What `sluice check` hears of a group whose coordinator has just been found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)

from service.core.errors import Stop
from service.kafka import topics
from service.settings import Settings
from tests.support import virtual_time


class Admin:
    """Answers with these errors, one for each question, then that all is well."""

    def __init__(self, *errors: type[Exception]) -> None:
        self.errors = list(errors)

    async def find_coordinator(self, group_id: str) -> int:
        if self.errors and self.errors[0] is GroupCoordinatorNotAvailableError:
            raise self.errors.pop(0)
        return 1

    async def _send_request(self, request: object, node: int) -> Any:
        code = self.errors.pop(0).errno if self.errors else 0  # type: ignore[attr-defined]
        group = {"error_code": code, "state": "Stable", "members": [1, 2]}
        group["authorized_operations"] = -(2**31)
        return SimpleNamespace(to_object=lambda: {"groups": [group]})


def look(monkeypatch: pytest.MonkeyPatch, *errors: type[Exception]) -> topics.Group:
    @asynccontextmanager
    async def admin(kafka: object) -> AsyncIterator[Admin]:
        yield Admin(*errors)

    monkeypatch.setattr(topics, "_admin", admin)
    return virtual_time.run(topics.look_at_group(Settings().kafka))


def test_a_coordinator_that_loads_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a new cluster the first question comes too early: that is no broker which does not
    answer."""
    found = look(
        monkeypatch,
        GroupCoordinatorNotAvailableError,
        GroupLoadInProgressError,
        NotCoordinatorForGroupError,
    )
    assert (found.state, found.members) == ("Stable", 2)


def test_a_refusal_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting does not mend a right that is missing."""
    with pytest.raises(Stop):
        look(monkeypatch, GroupAuthorizationFailedError)
