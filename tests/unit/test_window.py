"""The window's bookkeeping: counts stay right whatever happens to an entry."""

import gc

from service.core.messages import Message, Partition, Skipped
from service.core.window import Entry, Stage, Window

WHERE = Partition("in", 0)


def message(offset: int, epoch: int = 1) -> Message:
    return Message(WHERE, offset, epoch, b"k", b"12345", (), 0)


def full(count: int) -> Window:
    window = Window("none")
    window.assign({WHERE: 1})
    for offset in range(count):
        entry = window.take(message(offset), now_s=0)
        assert entry is not None
        window.queue(entry)
    return window


def test_a_stale_message_is_not_taken() -> None:
    """Another epoch, an unknown partition, a known offset: none of them enters."""
    window = full(2)
    assert window.take(message(5, epoch=0), 0) is None
    assert window.take(message(1), 0) is None
    window.assign({})
    assert window.take(message(5), 0) is None


def test_a_lost_holding_leaves_nothing_behind() -> None:
    """Messages and bytes go back to zero, and what was queued or waiting never comes up."""
    window = full(4)
    called = window.call_next(0)
    waiting = window.call_next(0)
    window.call_ended(waiting)
    window.retry(waiting, now_s=0, due_s=1)
    handed = window.call_next(0)
    window.call_ended(handed)
    window.answered(handed, Skipped(), 0)
    assert window.hand_over(handed.holding, handed.lane, 0) is handed
    assert (window.messages, window.size_bytes, window.handed) == (4, 24, 1)
    [holding] = window.assign({WHERE: 2})
    assert holding.lost
    assert called.holding is holding
    assert (window.messages, window.size_bytes, window.handed) == (0, 0, 0)
    assert window.next_queued() is None
    assert window.next_retry_s is None


def test_lost_messages_do_not_pile_up_behind_a_kept_one() -> None:
    """However often a partition is lost, its messages are not kept in memory."""
    window = full(2)
    retried = window.call_next(0)
    window.call_ended(retried)
    window.retry(retried, now_s=0, due_s=1)
    other, kept = Partition("in", 1), {WHERE: 1}
    for epoch in range(2, 5):
        window.assign({**kept, other: epoch})
        for offset in range(3):
            entry = window.take(Message(other, offset, epoch, None, b"1", (), 0), now_s=0)
            assert entry is not None
            window.queue(entry) if offset else window.retry(entry, 0, due_s=99)
        del entry
    window.assign(kept)
    gc.collect()
    alive = [each for each in gc.get_objects() if isinstance(each, Entry)]
    assert [each for each in alive if each.message.partition == other] == []
    assert window.next_retry_s == 1
    assert window.next_queued() is not None


def test_due_retries_come_before_the_queue_the_earliest_first() -> None:
    """A retry keeps its place: it does not go to the end."""
    window = full(3)
    for due_s in (2.0, 1.0):
        entry = window.call_next(0)
        window.call_ended(entry)
        window.retry(entry, 0, due_s)
    window.requeue_due(0.5)
    assert window.next_retry_s == 1.0
    window.requeue_due(2.0)
    assert [window.call_next(2).message.offset for _ in range(3)] == [1, 0, 2]


def test_let_go_forgets_the_waiting_end_only() -> None:
    """What stands before a call, an answer or an acknowledged message stays."""
    window = full(6)
    entries = [window.call_next(0) for _ in range(4)]
    window.call_ended(entries[0])
    window.retry(entries[0], 0, 99)
    window.call_ended(entries[3])
    window.answered(entries[3], Skipped(), 0)
    window.hand_over(entries[3].holding, entries[3].lane, 0)
    entries[3].lane.acknowledge(3)
    window.finish(entries[3])
    window.let_go()
    assert [entry.message.offset for entry in window.entries()] == [0, 1, 2]
    assert [entry.stage for entry in window.entries()] == [
        Stage.RETRYING,
        Stage.CALLING,
        Stage.CALLING,
    ]
    assert window.committable() == {WHERE: 0}
