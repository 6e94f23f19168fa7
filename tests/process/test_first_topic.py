"""README's "Your topic in ten minutes", typed as it stands there: a real Kafka, the local model."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.demo.model import local_model
from tests.support.kafka import free_ports
from tests.support.started import local_model_is_here
from tests.support.topics import produce, read_topic, unique_name

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## Your topic in ten minutes\n")[1]
SECTION = SECTION.split("\n## ")[0]
SERVERS = "localhost:9092"
"""README's broker; the test's own takes its place, and names that no other test has."""
FOLDER = "/home/ada/sluice/first"
"""README's folder, and the test's own in its place."""

pytestmark = [pytest.mark.real_kafka, pytest.mark.real_model, pytest.mark.timeout(300)]


@dataclass
class Typed:
    """A command, and what README says that it prints."""

    command: str
    printed: str


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, flags=re.M | re.S)


def typed() -> Iterator[Typed]:
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, printed = part.partition("\n")
            yield Typed(command, printed)


def alike(text: str) -> str:
    """What may differ from run to run made the same: numbers, times, spaces of a table."""
    text = re.sub(r"\d[\d.,:TZ-]*", "N", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


async def say(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Everything that a `sluice` command prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", *command.split()[1:]),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    return (await process.communicate())[0].decode()


async def test_the_first_topic(real_kafka: str, tmp_path: Path) -> None:
    """Each command prints what README shows, and the records are those that it shows."""
    await local_model_is_here()
    mails, orders = unique_name("mails"), unique_name("orders")

    def ours(text: str) -> str:
        text = re.sub(
            r"\bmails\b", mails, text.replace(SERVERS, real_kafka).replace(FOLDER, str(tmp_path))
        )
        return re.sub(r"\borders\b", orders, text)

    (record,), (settings,), (messages,) = blocks("python"), blocks("yaml"), blocks("json")
    (tmp_path / "record.py").write_text(record)
    (port,) = free_ports(1)
    # In the file: `check` names each SLUICE_ variable, and README's reader has set none.
    (tmp_path / "sluice.yaml").write_text(f"{ours(settings)}telemetry: {{port: {port}}}\n")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "SLUICE_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "140", "NO_PROXY": "127.0.0.1"}
    async with local_model() as base_url:
        environment["OPENAI_BASE_URL"] = base_url
        for step in typed():
            expected = ours(step.printed)
            if step.command.startswith("sluice run"):
                await produce(real_kafka, mails, [one.encode() for one in messages.splitlines()])
            if step.command.startswith("sluice "):
                said = await say(step.command, tmp_path, environment)
                assert alike(said) == alike(expected), said
            else:
                found = await read_topic(real_kafka, orders)
                values = sorted((one.value or b"").decode() for one in found)
                assert values == sorted(expected.splitlines())
