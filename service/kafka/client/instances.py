"""Which process bears a worker's name (`kafka.group_instance_id`), and whether it still runs.

The group knows one member of a name: whoever joins last takes the place of the one before, at
once and without a rebalance, whether that one runs or not. So what a worker with a name stores
says which process wrote it, and two questions can be answered: does that process still run, on
this machine? And did the next one come because it had ended, or only because of the name?
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

TEXT = re.compile(r"[0-9a-f]{8}\.[0-9a-f]{8}\.[0-9]{1,7}\.[0-9]{1,12}", re.ASCII)
"""The pattern of `Bearer.text`, as it stands in the metadata."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """A process that bears a name. `name` and `host` are hashes: metadata is read by others."""

    name: str
    host: str
    pid: int
    began: int
    """In ticks since the machine began, as Linux has it: process ids come back. 0: not known."""

    @property
    def text(self) -> str:
        return f"{self.name}.{self.host}.{self.pid}.{self.began}"

    def shares_its_name_with(self, other: Bearer) -> bool:
        """Whether the other one is a process of its own that bears the same name."""
        return self.name == other.name and self != other

    def lives_beside(self, own: Bearer) -> bool:
        """Whether it runs on the machine of this process; False where that cannot be seen."""
        return self.host == own.host and self.began > 0 and began(self.pid) == self.began


def bearer(text: str) -> Bearer:
    """What `text` was written for; the pattern above has matched."""
    name, host, pid, at = text.split(".")
    return Bearer(name, host, int(pid), int(at))


def this_process(name: str) -> Bearer:
    """This process under this name."""
    own = os.getpid()
    return Bearer(_short(name), _short(socket.gethostname()), own, began(own) or 0)


def began(pid: int) -> int | None:
    """When a process of this machine began; None where there is none, or nobody tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def has_lived_on(former: Bearer | None, own: Bearer | None) -> bool:
    """Whether the former holder of a partition was put out by its name alone, and did not die.

    On the same machine that can be seen: a process that does not run any more has died. On another
    machine it cannot be seen; but a worker that comes back after its death keeps its machine's name
    (a pod of a StatefulSet does), so that the same name on another machine is a second worker.
    """
    if former is None or own is None or not former.shares_its_name_with(own):
        return False
    return former.host != own.host or former.lives_beside(own)
