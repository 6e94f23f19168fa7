"""The peers in Python, each as its documentation would have it: one process until it is killed.

    python -m tests.bench.peers gather | window | faststream | bare

They read what the driver puts into their environment (`Task`), take messages from a topic, call
the model, validate, publish, and commit.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from pydantic import BaseModel

from tests.bench.records import People, Person

Extract = Callable[[str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is told by its environment."""

    servers: str
    group: str
    input: str
    output: str
    url: str
    slots: int
    many: bool
    instructions: str

    @staticmethod
    def told() -> Task:
        told = {name: os.environ[f"BENCH_{name.upper()}"] for name in Task.__slots__}
        own: dict[str, Any] = {"slots": int(told["slots"]), "many": told["many"] == "1"}
        return Task(**(told | own))

    @property
    def model(self) -> type[BaseModel]:
        return People if self.many else Person

    def messages(self, text: str) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]

    def values(self, found: BaseModel) -> bytes:
        """One Kafka record for a message, whatever it holds: the cheapest for the peers."""
        return found.model_dump_json().encode()


def with_instructor(task: Task) -> Extract:
    """instructor on the openai SDK, as its first page has it."""
    import instructor
    import openai

    client = instructor.from_openai(
        openai.AsyncOpenAI(base_url=task.url, api_key="bench", max_retries=0),
        mode=instructor.Mode.JSON_SCHEMA,
    )

    async def extract(text: str) -> bytes:
        found = await client.chat.completions.create(
            model="bench",
            messages=task.messages(text),
            response_model=task.model,
            max_retries=2,
            max_tokens=1024,
        )
        return task.values(found)

    return extract


def bare(task: Task, session: aiohttp.ClientSession) -> Extract:
    """aiohttp and pydantic and nothing else: the floor for Python."""
    schema = {"name": "Person", "schema": task.model.model_json_schema()}
    form = {"type": "json_schema", "json_schema": schema}

    async def extract(text: str) -> bytes:
        body = {
            "model": "bench",
            "messages": task.messages(text),
            "response_format": form,
            "max_tokens": 1024,
        }
        async with session.post(f"{task.url}/chat/completions", json=body) as response:
            answer = json.loads(await response.read())
        content = answer["choices"][0]["message"]["content"]
        return task.values(task.model.model_validate_json(content))

    return extract


async def clients(task: Task) -> tuple[AIOKafkaConsumer, AIOKafkaProducer]:
    consumer = AIOKafkaConsumer(
        task.input,
        bootstrap_servers=task.servers,
        group_id=task.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=task.servers, acks="all", enable_idempotence=True, linger_ms=5
    )
    await consumer.start()
    await producer.start()
    return consumer, producer


async def gather(task: Task, extract: Extract) -> None:
    """The classic loop: a batch at once, the next one when all of it is done."""
    consumer, producer = await clients(task)

    async def one(message: Any) -> None:
        value = await extract(message.value.decode())
        await producer.send_and_wait(task.output, value, key=message.key)

    while True:
        found = await consumer.getmany(timeout_ms=200, max_records=task.slots)
        await asyncio.gather(*(one(message) for batch in found.values() for message in batch))
        if found:
            await consumer.commit()


async def window(task: Task, extract: Extract) -> None:
    """A semaphore and a task for each message; commits what is done below the first that isn't."""
    consumer, producer = await clients(task)
    slots = asyncio.Semaphore(task.slots)
    unfinished: dict[TopicPartition, dict[int, None]] = {}
    running = set()

    async def one(message: Any) -> None:
        try:
            value = await extract(message.value.decode())
            await producer.send_and_wait(task.output, value, key=message.key)
            del unfinished[TopicPartition(message.topic, message.partition)][message.offset]
        finally:
            slots.release()

    async def commit() -> None:
        while True:
            await asyncio.sleep(1)
            offsets = {where: next(iter(those), None) for where, those in unfinished.items()}
            known = {where: offset for where, offset in offsets.items() if offset is not None}
            if known:
                await consumer.commit(known)

    running.add(asyncio.create_task(commit()))
    async for message in consumer:
        await slots.acquire()
        unfinished.setdefault(TopicPartition(message.topic, message.partition), {})[
            message.offset
        ] = None
        task_of_it = asyncio.create_task(one(message))
        running.add(task_of_it)
        task_of_it.add_done_callback(running.discard)


async def run(name: str) -> None:
    task = Task.told()
    match name:
        case "gather":
            await gather(task, with_instructor(task))
        case "window":
            await window(task, with_instructor(task))
        case "faststream":
            from tests.bench.faststream_peer import faststream

            await faststream(task, with_instructor(task))
        case "bare":
            connector = aiohttp.TCPConnector(limit=task.slots + 1)
            async with aiohttp.ClientSession(connector=connector) as session:
                await window(task, bare(task, session))
        case _:
            raise SystemExit(f"no such peer: {name}")


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1]))
