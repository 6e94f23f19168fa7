"""An upstream of docker-compose.yml: writes short texts to a topic, a few a second, until stopped.

Nothing of Sluice is imported: any program that writes UTF-8 text to the topic would do.
"""

import asyncio
import os
import random
import signal
from collections.abc import Iterator

from aiokafka import AIOKafkaProducer

NAMES = ("Amara", "Bjorn", "Chiara", "Dmitri", "Esperanza", "Farid", "Greta", "Haruki", "Ines")
SENTENCES = (
    "{name} turned {age} last week and still cycles to work every day.",
    "Please note that the applicant, {name}, is {age} years old.",
    "At {age}, {name} was the youngest person in the choir.",
    "My neighbour {name} ({age}) found your wallet at the bus stop.",
    "Patient {name}, age {age}, reports no pain since Tuesday.",
    "{name} wrote to say the parcel never came; she is {age} and cannot climb the stairs.",
    "For the record: {name} will be {age} when the course begins.",
)


def texts(chance: random.Random) -> Iterator[tuple[str, str]]:
    """Who the text is about (the key, so that one person's texts keep their order) and the text."""
    while True:
        name = chance.choice(NAMES)
        yield name, chance.choice(SENTENCES).format(name=name, age=chance.randint(18, 90))


async def produce(servers: str, topic: str, per_second: float, stopped: asyncio.Event) -> int:
    """Write until `stopped`; returns how many messages the broker acknowledged."""
    written = 0
    async with AIOKafkaProducer(bootstrap_servers=servers, acks="all") as producer:
        for key, text in texts(random.Random()):
            if stopped.is_set():
                break
            await producer.send_and_wait(topic, text.encode(), key=key.encode())
            written += 1
            try:
                await asyncio.wait_for(stopped.wait(), 1 / per_second)
            except TimeoutError:
                continue
    return written


async def main() -> None:
    """Settings from the environment; ends at SIGTERM or Ctrl-C.

    Process 1 of a container ignores a signal that it has no handler for.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    topic = os.environ.get("PRODUCER_TOPIC", "messages")
    written = await produce(
        os.environ.get("PRODUCER_BOOTSTRAP_SERVERS", "localhost:9092"),
        topic,
        float(os.environ.get("PRODUCER_PER_SECOND", "1")),
        stopped,
    )
    print(f"{written} texts written to {topic}")


if __name__ == "__main__":
    asyncio.run(main())
