"""One scene for each test: topics on a real Kafka, a scripted endpoint, the environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from service.core.errors import ALL_REJECTED
from tests.support.endpoint import Endpoint
from tests.support.service import Ended, run
from tests.support.topics import (
    Read,
    Sent,
    committed,
    create_topic,
    end_offsets,
    produce,
    read_topic,
    unique_name,
)

PARTITIONS = 6


@dataclass
class Scene:
    """What the process tests act on."""

    servers: str
    endpoint: Endpoint
    input: str = field(default_factory=lambda: unique_name("input"))
    output: str = field(default_factory=lambda: unique_name("output"))
    dead_letters: str = field(default_factory=lambda: unique_name("dead-letters"))
    group: str = field(default_factory=lambda: unique_name("group"))

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SLUICE_KAFKA__BOOTSTRAP_SERVERS": self.servers,
            "SLUICE_KAFKA__GROUP_ID": self.group,
            "SLUICE_KAFKA__SESSION_TIMEOUT_S": "6",
            "SLUICE_INPUT__TOPICS": self.input,
            "SLUICE_OUTPUT__TOPIC": self.output,
            "SLUICE_DEAD_LETTERS__TOPIC": self.dead_letters,
            "SLUICE_EXTRACTION__MODEL": "scripted",
            "SLUICE_EXTRACTION__RECORD": "service.demo.records:Person",
            "SLUICE_DELIVERY__COMMIT_INTERVAL_S": "0.2",
            "OPENAI_BASE_URL": self.endpoint.url,
            "OPENAI_API_KEY": "test",
        }

    async def create_topics(self, partitions: int = PARTITIONS) -> None:
        await create_topic(
            self.servers, self.input, partitions, config={"max.message.bytes": "20000000"}
        )
        await create_topic(self.servers, self.output, partitions)
        await create_topic(
            self.servers, self.dead_letters, 1, config={"max.message.bytes": "30000000"}
        )

    async def send(self, *messages: Sent) -> None:
        await produce(self.servers, self.input, messages)

    async def catch_up(self, within_s: float = 60, **settings: str) -> Ended:
        """Run until caught up; it must end well, though every message may have been rejected."""
        ended = await run(
            {**self.environment, **settings}, "run", "--until-caught-up", within_s=within_s
        )
        assert ended.code in (0, ALL_REJECTED), ended.printed
        return ended

    async def outputs(self) -> list[Read]:
        return await read_topic(self.servers, self.output)

    async def letters(self) -> list[Read]:
        return await read_topic(self.servers, self.dead_letters)

    async def outcomes(self) -> Counter[str]:
        """How many outcomes each message has, by topic:partition:offset of its origin."""
        origins = [read.header["sluice.id"].rsplit(":", 1)[0] for read in await self.outputs()]
        origins += [
            "{}:{}:{}".format(
                *(read.header[f"__dlq.errors.{each}"] for each in ("topic", "partition", "offset"))
            )
            for read in await self.letters()
        ]
        return Counter(origins)

    async def everything(self) -> Counter[str]:
        """One outcome for each message that stands in the input."""
        messages = await read_topic(self.servers, self.input)
        return Counter(f"{m.topic}:{m.partition}:{m.offset}" for m in messages)

    async def lag(self) -> int:
        """Messages and markers between the committed offsets and the ends."""
        ends = await end_offsets(self.servers, self.input)
        stored = await committed(self.servers, self.group, self.input, len(ends))
        return sum(end - stored.get(number, (0, ""))[0] for number, end in ends.items())


@pytest.fixture
async def scene(real_kafka: str) -> AsyncIterator[Scene]:
    async with Endpoint() as endpoint:
        made = Scene(real_kafka, endpoint)
        await made.create_topics()
        yield made
