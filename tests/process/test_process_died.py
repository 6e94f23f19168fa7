"""A message that takes the whole process down: out of memory, a crash in a library, `os._exit`."""

from __future__ import annotations

from pathlib import Path

from service.core.tracker import UNCLEAN_ENDS_MAX
from tests.process.conftest import Scene
from tests.support.endpoint import Latency
from tests.support.service import run

COUNT = 60
SLOTS = 8
DEADLY = """
import os

from pydantic import BaseModel, field_validator


class Person(BaseModel):
    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _check(cls, age: int) -> int:
        if age == 666:
            os._exit(9)  # what a crash in a library does: no exception, no clean-up
        return age
"""


async def test_a_message_of_which_the_process_dies_is_rejected(
    scene: Scene, tmp_path: Path
) -> None:
    """Started again after each death, as Kubernetes does: in the end that message is a dead letter
    that says so, every other one has its record, and few calls were repeated."""
    (tmp_path / "records.py").write_text(DEADLY)
    scene.endpoint.latency = Latency(median_s=0.02, sigma=0.5)
    ages = [666 if n == 25 else n for n in range(COUNT)]
    await scene.send(*((b"key-%d" % (n % 7), b"Ada is %d" % age) for n, age in enumerate(ages)))
    environment = {
        **scene.environment,
        "SLUICE_EXTRACTION__RECORD": f"{tmp_path / 'records.py'}:Person",
        "SLUICE_LIMITS__CONCURRENCY": str(SLOTS),
    }
    codes = []
    while not codes or codes[-1] != 0:
        ended = await run(environment, "run", "--until-caught-up")
        codes.append(ended.code)
        assert len(codes) <= UNCLEAN_ENDS_MAX + 3, ended.printed
    assert set(codes[:-1]) == {9}
    [letter] = await scene.letters()
    assert letter.value == b"Ada is 666"
    assert letter.header["sluice.error.reason"] == "process_died"
    assert (await scene.outcomes()).keys() == (await scene.everything()).keys()
    # What was in the window, and what finished since the last commit (0.2 s at 400 a second).
    assert len(await scene.outputs()) <= COUNT + (4 * SLOTS + 80) * len(codes)
