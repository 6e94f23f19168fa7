"""What of exactly-once delivery needs no broker: names, bounds, and the order of what waits."""

import asyncio

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from service.core.messages import Partition
from service.kafka.client.stored import Stored
from service.kafka.sending.producers import Output
from service.kafka.sending.queues import Handover, Waiting
from service.kafka.transactions import outbox as module
from service.kafka.transactions.outbox import Outbox, Outgoing, by_output_partition, fail
from service.kafka.transactions.producer import transactional_id
from service.kafka.transactions.transactions import (
    PARTITIONS_MAX,
    partitions_max,
    too_many,
    transactional_options,
)
from service.kafka.transactions.writer import Writer, WriterContext
from tests.support.transactions import Ledger, Page, output

TOPICS = st.text("abcXYZ019._-", min_size=1, max_size=12)
PLACES = st.tuples(st.text(min_size=1, max_size=12), TOPICS, st.integers(0, 9999))


def test_a_transactional_id_is_prefix_group_topic_and_partition() -> None:
    """Permissions can be given for what it begins with."""
    assert transactional_id("sluice", "invoices", Partition("in", 7)) == "sluice-invoices:in:7"


@given(PLACES, PLACES)
def test_no_two_input_partitions_of_any_groups_share_an_id(
    one: tuple[str, str, int], other: tuple[str, str, int]
) -> None:
    """Or they would fence each other for ever: group a-b with topic c, group a with topic b-c."""
    ids = {transactional_id("sluice", g, Partition(t, p)) for g, t, p in (one, other)}
    assert len({one, other}) == len(ids)


def test_a_transaction_is_given_up_before_its_coordinator_aborts_it() -> None:
    """The coordinator's time is longer than ours."""
    assert transactional_options(60.0)["transaction_timeout_ms"] == 70_000


def test_a_worker_takes_as_many_partitions_as_it_may_have_connections() -> None:
    """1,024 open files are the usual limit; the sentence says how many workers there must be."""
    assert [partitions_max(files) for files in (100, 1024, 2700, 10**6)] == [1, 164, 500, 500]
    assert "at least 3 workers" in too_many(1001, PARTITIONS_MAX)
    assert "ulimit" not in too_many(1001, PARTITIONS_MAX)
    assert "ulimit -n; 500 need 2700" in too_many(200, 164)


def outgoing(offset: int | None, *sizes: int, where: int = 0) -> Outgoing:
    handover = Handover(1, lambda: None)
    outputs = [
        (TopicPartition("out", where), Waiting(Output("out", None, b"", [], None, size), handover))
        for size in sizes
    ]
    return Outgoing(offset, handover, outputs, 0.0)


def offsets(those: list[Outgoing]) -> list[int | None]:
    return [each.offset for each in those]


async def test_what_is_put_back_goes_before_all_others() -> None:
    """In the order it had; what was withdrawn meanwhile is left out."""
    box = Outbox()
    for offset in range(5):
        box.append(outgoing(offset, 10))
    taken = box.next_transaction(len)
    box.append(outgoing(5, 10))
    taken[1].handover.future.cancel()
    box.put_back(taken)
    assert offsets(box.next_transaction(len)) == [0, 2, 3, 4, 5]
    assert not box
    assert not box.urgent


async def test_a_transaction_is_bounded_in_messages_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fills one leaves at once; a single message goes whatever its size."""
    monkeypatch.setattr(module, "TRANSACTION_MESSAGES_MAX", 3)
    monkeypatch.setattr(module, "TRANSACTION_MAX_BYTES", 100)
    box = Outbox()
    for offset in range(4):
        assert box.urgent == (offset == 3)
        box.append(outgoing(offset, 10))
    assert offsets(box.next_transaction(len)) == [0, 1, 2]
    assert not box.urgent
    box.append(outgoing(4, 60, 60))
    assert box.urgent
    box.append(outgoing(5, 95))
    box.append(outgoing(6, 5))
    assert [offsets(box.next_transaction(len)) for _ in range(3)] == [[3], [4], [5, 6]]


async def test_what_has_no_room_is_held_back_and_the_lowest_offsets_go_first() -> None:
    """Nothing overtakes an earlier one of its lane, whichever was handed over first."""
    box = Outbox()
    for offset in (7, 3, 5):
        box.append(outgoing(offset, 10))
    box.append(outgoing(None))
    assert offsets(box.next_transaction(lambda those: 1 if len(those) > 1 else len(those))) == [
        None,
        3,
    ]
    assert box.ready  # something went: there may be room for more now
    assert offsets(box.next_transaction(lambda those: 0)) == []
    assert box
    assert not box.ready
    assert not box.urgent
    box.append(outgoing(6, 10))
    assert box.ready
    assert offsets(box.next_transaction(lambda those: min(2, len(those)))) == [5, 6]
    box.append(outgoing(1, 10))
    assert offsets(box.take_all()) == [7, 1]
    assert not box


async def test_what_is_held_back_is_bounded_and_may_be_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As everything in a transaction."""
    monkeypatch.setattr(module, "TRANSACTION_MESSAGES_MAX", 3)
    monkeypatch.setattr(module, "TRANSACTION_MAX_BYTES", 100)
    box = Outbox()
    those = [outgoing(offset, size) for offset, size in enumerate((10, 10, 10, 60, 60, 120))]
    for each in those:
        box.append(each)
    assert box.next_transaction(lambda _: 0) == []
    assert box.next_transaction(lambda _: 0) == []
    those[1].handover.future.cancel()
    taken = [offsets(box.next_transaction(len)) for _ in range(4)]
    assert taken == [[0, 2, 3], [4], [5], []]


async def test_a_wish_leaves_at_once() -> None:
    """Somebody waits for it; what waits with it goes along."""
    box = Outbox()
    box.append(outgoing(0, 10))
    assert not box.urgent
    box.append(outgoing(None))
    assert box.urgent
    assert offsets(box.next_transaction(len)) == [0, None]
    assert not box.urgent
    box.append(outgoing(None))
    assert offsets(box.take_all()) == [None]
    assert not box.urgent


async def test_outputs_keep_their_order_in_each_output_partition() -> None:
    """Those of one message and those of the next."""
    those = [outgoing(0, 1, 2), outgoing(1, 3, where=1), outgoing(2, 4)]
    queues = by_output_partition(those)
    found = {
        where.partition: [each.output.size_bytes for each in queue.waiting]
        for where, queue in queues.items()
    }
    assert found == {0: [1, 2, 4], 1: [3]}


async def test_failing_tells_in_order_and_only_those_that_wait() -> None:
    """A settled one stays as it is."""
    told: list[int] = []
    those = [outgoing(n) for n in range(3)]
    for n, each in enumerate(those):
        each.handover.on_failure = lambda n=n: told.append(n)  # type: ignore[misc]
    those[1].handover.acknowledged()
    fail(those, "why")
    await asyncio.sleep(0)
    assert told == [0, 2]
    assert those[1].handover.future.exception() is None


class InstantProducer:
    """Never waits: whatever happens between two of its transactions is the writer's doing."""

    used = False

    def __init__(self) -> None:
        self.steps: list[str] = []

    async def begin(self) -> None:
        self.steps.append("begin")

    async def send(self, batches: object) -> dict[TopicPartition, KafkaError]:
        self.steps.append("send")
        return {}

    async def store(self, group_id: str, partition: Partition, stored: Stored) -> None:
        self.steps.append(f"store {stored.metadata}")

    async def commit(self) -> None:
        self.steps.append("commit")


async def test_the_ledger_is_asked_once_it_knows_what_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Callbacks of a transaction run before the next one asks, however quick the broker is."""
    monkeypatch.setattr(module, "TRANSACTION_MESSAGES_MAX", 1)
    ledger, producer, partition = Ledger(), InstantProducer(), Partition("in", 0)
    page = ledger.pages[partition] = Page(None)
    async with asyncio.TaskGroup() as group:
        context = WriterContext(
            turn=asyncio.Semaphore(),
            open=lambda _: asyncio.sleep(0, producer),  # type: ignore[arg-type, return-value]
            end=lambda *_: None,
            ledger=ledger,
            batch_max_bytes=lambda _: 10**6,
            refused=lambda *_: None,
            observe=lambda _: None,
            group_id="group",
            interval_s=0.0,
            deadline_s=1.0,
            group=group,
        )
        writer = Writer(partition, producer, context)  # type: ignore[arg-type]
        for n in range(3):
            future = writer.queue_up(n, [(0, output("out", b"1"))], lambda: None)
            future.add_done_callback(lambda _, n=n: page.finished.add(n))
    assert page.finished == {0, 1, 2}
    assert producer.steps[-2:] == ["store [0, 1, 2]", "commit"]
