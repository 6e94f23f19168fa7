"""FastStream with instructor: as many workers as there are slots.

Apart from the others, since only the extra `bench` brings FastStream, and it looks for the types of
its handlers among the module's names.
"""

from faststream import FastStream
from faststream.kafka import KafkaBroker, KafkaMessage

from tests.bench.peers import Extract, Task


async def faststream(task: Task, extract: Extract) -> None:
    """Runs until it is killed."""
    broker = KafkaBroker(
        task.servers, acks="all", enable_idempotence=True, linger_ms=5, logger=None
    )

    @broker.subscriber(
        task.input, group_id=task.group, auto_offset_reset="earliest", max_workers=task.slots
    )
    async def one(text: str, message: KafkaMessage) -> None:
        value = await extract(text)
        await broker.publish(value, task.output, key=message.raw_message.key)

    await FastStream(broker, logger=None).run()
