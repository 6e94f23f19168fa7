"""Dead letters read back and sent again, on a real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.core.errors import CannotRun
from service.core.history import History
from service.core.messages import Headers, Message, Partition, Reason, Rejected
from service.kafka.letters.reader import Letter, Selection, opened
from service.kafka.letters.redrive import Left, RedrivePlan, RedriveRequest, plan_redrive, redrive
from service.kafka.letters.written import dead_letter
from service.kafka.transactions.producer import TransactionalProducer
from service.settings import Settings
from tests.support.topics import (
    Read,
    create_topic,
    end_offsets,
    producer,
    read_topic,
    unique_name,
)

ALL = RedriveRequest(Selection())


@dataclass
class Scene:
    """An input, its dead letter topic, and letters of messages that never were."""

    servers: str
    name: str = field(default_factory=lambda: unique_name("letters"))

    @property
    def settings(self) -> Settings:
        return Settings.model_validate(
            {
                "kafka": {
                    "bootstrap_servers": self.servers,
                    "group_id": self.name,
                    "request_timeout_s": 10,
                },
                "input": {"topics": f"{self.name}-in"},
                "output": {"topic": f"{self.name}-out"},
                "dead_letters": {"topic": f"{self.name}-dead"},
            }
        )

    def message(
        self, offset: int, headers: Headers = (), value: bytes | None = b"v", topic: str = ""
    ) -> Message:
        where = Partition(topic or f"{self.name}-in", offset % 2)
        return Message(where, offset, 1, b"key", value, headers, 1_600_000_000_000 + offset)

    async def reject(self, *messages: Message, reason: Reason = Reason.INVALID) -> None:
        """Each in the partition of the dead letter topic that its offset says."""
        async with producer(self.servers) as client:
            for each in messages:
                rejected = Rejected(reason, "age: old", attempts=3, first_failed_at_ms=77)
                letter = dead_letter(each, rejected, "group", 99)
                await client.send_and_wait(
                    f"{self.name}-dead",
                    letter.value,
                    letter.key,
                    headers=letter.headers,
                    partition=each.offset % 3,
                )

    async def redrive(self, request: RedriveRequest = ALL) -> tuple[RedrivePlan, int]:
        done: list[int] = []
        plan = await redrive(self.settings, request, lambda _: True, done.append)
        return plan, sum(done)

    async def sent(self) -> list[Read]:
        """What the input holds once all transactions have ended: a commit is answered a moment
        before readers see it."""
        topic = f"{self.name}-in"
        while await end_offsets(self.servers, topic) != await end_offsets(
            self.servers, topic, committed_only=False
        ):
            await asyncio.sleep(0.05)
        return await read_topic(self.servers, topic)

    async def letters(self, selection: Selection) -> list[Letter]:
        async with opened(self.settings) as reader:
            return [letter async for letter in reader.letters(selection)]


@pytest.fixture
async def scene(real_kafka: str) -> Scene:
    made = Scene(real_kafka)
    await create_topic(real_kafka, f"{made.name}-in", 2)
    await create_topic(real_kafka, f"{made.name}-dead", 3)
    return made


async def test_it_goes_back_byte_for_byte_and_once(scene: Scene) -> None:
    """Key, value and headers come back to their partition with their history; a second redrive
    sends none of them, `again` all."""
    own: Headers = (("a", b"\xff\x00"), ("a", None), ("sluice.id", b"x:0:1:2"))
    await scene.reject(scene.message(4, own, b"\xff\xfe"), scene.message(7, value=None))
    assert (await plan_redrive(scene.settings, ALL)).sent == 2
    assert await scene.redrive() == (RedrivePlan(sent=2), 2)
    first, second = await scene.sent()
    assert (first.partition, first.key, first.value) == (0, b"key", b"\xff\xfe")
    history = History(f"{scene.name}-in:0:4".encode(), 1_600_000_000_004, 3, 77, redrives=1)
    assert first.headers == (*own, *history.headers)
    assert (second.partition, second.value) == (1, None)

    plan, sent = await scene.redrive()
    assert (sent, plan.sent, [*plan.left]) == (0, 0, [Left.ALREADY])
    assert len(await scene.sent()) == 2
    assert (await scene.redrive(RedriveRequest(Selection(), again=True)))[1] == 2
    assert len(await scene.sent()) == 4


async def test_selection_and_limit(scene: Scene) -> None:
    """Filters hold for what is read and for what is sent; what is left comes with a later one."""
    await scene.reject(*(scene.message(n, value=b"v%d" % n) for n in range(6)))
    await scene.reject(scene.message(6, value=b"caf\xc3\xa9"), reason=Reason.REFUSED)
    refused = Selection(reasons=frozenset({"refused"}))
    assert [each.value for each in await scene.letters(refused)] == [b"caf\xc3\xa9"]
    assert [each.origin.offset for each in await scene.letters(Selection(text="é"))] == [6]
    assert len(await scene.letters(Selection(partition=1))) == 3
    assert await scene.letters(Selection(topic="other")) == []
    assert await scene.letters(Selection(until_ms=1_600_000_000_000)) == []
    assert (await scene.redrive(RedriveRequest(Selection(), limit=2)))[1] == 2
    assert (await scene.redrive(RedriveRequest(Selection(at=frozenset({(1, 0)})))))[1] == 1
    assert (await scene.redrive())[1] == 4
    assert sorted(each.value or b"" for each in await scene.sent()) == [
        *(b"caf\xc3\xa9", b"v0", b"v1", b"v2", b"v3", b"v4", b"v5"),
    ]


async def test_what_is_refused_is_said(scene: Scene) -> None:
    """What came back too often, or belongs to another input, is left, and the rest goes."""
    often = History(f"{scene.name}-in:0:1".encode(), 5, 9, 6, redrives=3)
    await scene.reject(
        scene.message(0, often.headers), scene.message(3), scene.message(6, topic="other")
    )
    plan, sent = await scene.redrive()
    assert sent == 1
    assert plan.refused
    assert {why: len(letters) for why, letters in plan.left.items()} == {
        Left.TOO_OFTEN: 1,
        Left.NOT_OURS: 1,
    }
    assert (await scene.redrive(RedriveRequest(Selection(), attempts_max=4)))[1] == 1
    [again] = (History.of(each.headers) for each in await scene.sent() if each.partition == 0)
    assert again is not None
    assert (again.origin, again.redrives, again.attempts) == (often.origin, 4, 12)


class Killed(Exception):
    """The process is gone: nothing of it can tidy up any more."""


Point = Callable[[pytest.MonkeyPatch], None]


def before_the_commit(patch: pytest.MonkeyPatch) -> None:
    async def die(_: Any) -> None:
        raise Killed

    patch.setattr(TransactionalProducer, "commit", die)


def before_the_answer(patch: pytest.MonkeyPatch) -> None:
    commit = TransactionalProducer.commit

    async def die(producer: TransactionalProducer) -> None:
        await commit(producer)
        raise Killed

    patch.setattr(TransactionalProducer, "commit", die)


@pytest.mark.parametrize("point", [before_the_commit, before_the_answer])
async def test_a_kill_in_between_neither_loses_nor_doubles(scene: Scene, point: Point) -> None:
    """Killed with a transaction open, or committed and not heard of, the next redrive sends the
    rest, whoever reads what is committed sees each message once."""
    await scene.reject(*(scene.message(n, value=b"%d" % n) for n in range(9)))
    with pytest.MonkeyPatch.context() as patch:
        point(patch)
        patch.setattr(TransactionalProducer, "end", TransactionalProducer.cut_off)
        with pytest.raises(Killed):
            await scene.redrive()
    _, sent = await scene.redrive()
    assert sent == (9 if point is before_the_commit else 6)
    assert sorted(each.value or b"" for each in await scene.sent()) == [b"%d" % n for n in range(9)]


async def test_of_two_at_once_one_is_shut_out(scene: Scene) -> None:
    """A redrive that begins while another waits for its answer shuts that one out; nothing goes
    twice."""
    await scene.reject(*(scene.message(n) for n in range(4)))
    second: list[tuple[RedrivePlan, int]] = []

    def meanwhile(_: RedrivePlan) -> bool:
        with asyncio.Runner() as runner:
            second.append(runner.run(scene.redrive()))
        return True

    def first() -> None:
        with asyncio.Runner() as runner, pytest.raises(CannotRun, match="shut this one out"):
            runner.run(redrive(scene.settings, ALL, in_a_thread(meanwhile), lambda _: None))

    await asyncio.to_thread(first)
    assert [sent for _, sent in second] == [4]
    assert len(await scene.sent()) == 4


def in_a_thread(ask: Callable[[RedrivePlan], bool]) -> Callable[[RedrivePlan], bool]:
    """A loop cannot run within another of the same thread."""
    from concurrent.futures import ThreadPoolExecutor

    def asked(plan: RedrivePlan) -> bool:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(ask, plan).result()

    return asked


async def test_many_letters_and_large_ones(scene: Scene) -> None:
    """More than fit one transaction, some larger than a batch, all arrive, in their order."""
    values = [b"%d:" % n + b"x" * (200_000 if n % 50 == 0 else 300) for n in range(600)]
    await scene.reject(*(scene.message(2 * n, value=v) for n, v in enumerate(values)))
    assert (await scene.redrive())[1] == 600
    sent = await scene.sent()
    assert {each.value for each in sent} == set(values)
    assert len(sent) == 600
