"""A worker's name (`kafka.group_instance_id`): two workers that share one take each other's place.

The group knows one member of a name: whoever joins last takes the place of the one before, at
once and without a rebalance.
"""

from __future__ import annotations

import asyncio
import logging

from aiokafka.errors import KafkaError

from service.core.errors import WrongSettings
from service.kafka.client.deadlines import within
from service.kafka.client.instances import Bearer
from service.kafka.client.private import Membership
from service.kafka.client.stored import read
from service.kafka.group.group_offsets import GroupOffsets
from service.settings import KafkaSettings

log = logging.getLogger(__name__)

PUT_OUT_TRIES = 5
"""How many times the group is asked whether another worker has taken our place."""

PUT_OUT_S = 3.0
"""One such question may take this long."""

PUT_OUT_AGAIN_S = 0.5
"""The pause between two such questions."""

FREE_S = 5.0
"""Reading who has last stored offsets under our name may take this long."""


class NameTaken(WrongSettings):
    """Two workers have one name."""


def put_out(name: str, group_id: str) -> NameTaken:
    """For whoever runs the worker that has lost its place."""
    return NameTaken(
        f"Another worker has joined the group {group_id} under kafka.group_instance_id {name} and "
        f"taken this one's place, so this one ends. {_REMEDY}"
    )


def in_use(name: str, group_id: str, pid: int) -> NameTaken:
    """For whoever starts a second worker of a name."""
    return NameTaken(
        f"Process {pid} on this machine reads for the group {group_id} under "
        f"kafka.group_instance_id {name}, and would be put out by this one. {_REMEDY}"
    )


_REMEDY = (
    "Give each worker a name of its own (with limits.workers above 1 each gets a number behind "
    "it), or leave kafka.group_instance_id out."
)


class WorkerName:
    """The name of this worker, if it has one. `joined_as` is the member and the generation of its
    last assignment."""

    def __init__(
        self,
        kafka: KafkaSettings,
        membership: Membership,
        offsets: GroupOffsets,
        own: Bearer | None,
    ) -> None:
        self._kafka, self._membership, self._offsets, self._own = kafka, membership, offsets, own
        self.joined_as = ("", -1)

    @property
    def put_out(self) -> NameTaken:
        """What ends the process where another worker has taken our place."""
        return put_out(str(self._kafka.group_instance_id), self._kafka.group_id)

    async def see_that_it_is_free(self) -> None:
        """Raises `NameTaken` where a process of this machine bears our name and reads."""
        own = self._own
        if own is None:
            return
        try:
            stored = await within(FREE_S, self._offsets.stored())
        except (KafkaError, TimeoutError) as error:
            log.warning("it cannot be read who bears our name: %s", type(error).__name__)
            return
        for each in filter(None, stored.values()):
            by = None if (found := read(each)) is None else found[1].bearer
            if by is not None and by.shares_its_name_with(own) and by.lives_beside(own):
                name = str(self._kafka.group_instance_id)
                raise in_use(name, self._kafka.group_id, by.pid)

    async def is_put_out(self) -> bool:
        """Whether another worker has joined under our name since we did."""
        for _ in range(PUT_OUT_TRIES):
            try:
                return await within(PUT_OUT_S, self._membership.is_put_out(*self.joined_as))
            except (KafkaError, TimeoutError) as error:
                # Without a coordinator nobody joins anything either.
                log.warning("it cannot be asked who has our place: %s", type(error).__name__)
                await asyncio.sleep(PUT_OUT_AGAIN_S)
        return False
