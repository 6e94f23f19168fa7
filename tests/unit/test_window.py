"""The window's bookkeeping: counts stay right whatever happens to an entry."""

import gc
from random import Random

from service.core.completed import decode, encode, fits_for_sure
from service.core.messages import Message, Partition, Skipped
from service.core.tracker import UNCLEAN_ENDS_MAX, Given, Progress
from service.core.window import (
    FIRST_MAX,
    MAP_CHARS_MAX,
    MAP_FULL,
    MEASURE_AGAIN,
    RUNS_SURE,
    SPAN_SURE,
    Entry,
    Holding,
    Stage,
    Window,
)

WHERE = Partition("in", 0)


def given(epoch: int) -> Given:
    return Given(epoch, Progress(0))


def message(offset: int, epoch: int = 1) -> Message:
    return Message(WHERE, offset, epoch, b"k", b"12345", (), 0)


def full(count: int) -> Window:
    window = Window("none", suspects=2)
    window.assign({WHERE: given(1)})
    for offset in range(count):
        window.queue(taken(window, message(offset)))
    return window


def taken(window: Window, one: Message) -> Entry:
    entry = window.take(one, now_s=0)
    assert isinstance(entry, Entry)
    return entry


def called_next(window: Window, now_s: float = 0) -> Entry:
    entry = window.next_queued()
    assert entry is not None
    return window.call(entry, now_s)


def test_a_stale_message_is_not_taken() -> None:
    """Another epoch, an unknown partition, a known offset: none of them enters."""
    window = full(2)
    assert window.take(message(5, epoch=0), 0) == "stale"
    assert window.take(message(1), 0) == "stale"
    window.assign({})
    assert window.take(message(5), 0) == "stale"


def test_a_lost_holding_leaves_nothing_behind() -> None:
    """Messages and bytes go back to zero, and what was queued or waiting never comes up."""
    window = full(4)
    called = called_next(window)
    waiting = called_next(window)
    window.call_ended(waiting)
    window.retry(waiting, now_s=0, due_s=1)
    handed = called_next(window)
    window.call_ended(handed)
    window.answered(handed, Skipped(), 0)
    assert window.hand_over(handed.holding, handed.lane, 0) is handed
    assert (window.messages, window.size_bytes, window.handed) == (4, 24, 1)
    [holding] = window.assign({WHERE: given(2)})
    assert holding.lost
    assert called.holding is holding
    assert (window.messages, window.size_bytes, window.handed) == (0, 0, 0)
    assert window.next_queued() is None
    assert window.next_retry_s is None


def test_lost_messages_do_not_pile_up_behind_a_kept_one() -> None:
    """However often a partition is lost, its messages are not kept in memory."""
    window = full(2)
    retried = called_next(window)
    window.call_ended(retried)
    window.retry(retried, now_s=0, due_s=1)
    other, kept = Partition("in", 1), {WHERE: given(1)}
    for epoch in range(2, 5):
        window.assign({**kept, other: given(epoch)})
        for offset in range(3):
            entry = taken(window, Message(other, offset, epoch, None, b"1", (), 0))
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
        entry = called_next(window)
        window.call_ended(entry)
        window.retry(entry, 0, due_s)
    window.requeue_due(0.5, most=9)
    assert window.next_retry_s == 1.0
    window.requeue_due(2.0, most=9)
    assert [called_next(window, 2).message.offset for _ in range(3)] == [1, 0, 2]


def test_a_retry_that_is_turned_away_again_and_again_lets_others_go_first() -> None:
    """One call at a time, and it would have them all."""
    window = full(3)
    entry = called_next(window)
    window.call_ended(entry)
    entry.attempts = FIRST_MAX
    window.retry(entry, 0, 1.0)
    window.requeue_due(1.0, most=9)
    assert [called_next(window, 1).message.offset for _ in range(3)] == [1, 2, 0]


def test_retries_are_woken_but_for_what_the_provider_asked() -> None:
    """Their own backoff is over at once; a Retry-After is not. No more come than may."""
    window = full(3)
    for offset in range(3):
        entry = called_next(window)
        window.call_ended(entry)
        entry.not_before_s = 20.0 if offset == 1 else 0.0
        window.retry(entry, 0, due_s=30.0)
    window.wake_retries(5.0)
    assert window.next_retry_s == 5.0
    assert window.requeue_due(5.0, most=1) == 1
    assert window.requeue_due(5.0, most=9) == 1
    assert window.next_retry_s == 20.0


def test_a_wake_makes_no_retry_later() -> None:
    """Whatever stands in the entry, what was due at a moment is due then or before."""
    window = full(1)
    entry = called_next(window)
    window.call_ended(entry)
    entry.not_before_s = 86_400.0
    window.retry(entry, 0, due_s=900.0)
    window.wake_retries(5.0)
    assert window.next_retry_s == 900.0


def finish(window: Window, entry: Entry) -> None:
    window.call_ended(entry)
    window.answered(entry, Skipped(), 0)
    window.hand_over(entry.holding, entry.lane, 0)
    entry.lane.acknowledge(entry.message.offset)
    window.finish(entry)


def test_let_go_forgets_what_waits() -> None:
    """Messages that wait for a slot or another attempt go, wherever they stand; the map keeps what
    has finished behind them."""
    window = full(6)
    entries = [called_next(window) for _ in range(4)]
    window.call_ended(entries[0])
    window.retry(entries[0], 0, 99)
    finish(window, entries[3])
    window.let_go()
    assert [entry.message.offset for entry in window.entries()] == [1, 2]
    assert [entry.stage for entry in window.entries()] == [Stage.CALLING, Stage.CALLING]
    assert window.held[WHERE].progress(clean=True) == Progress(0, runs=(3, 1))


def test_let_go_keeps_what_a_paid_answer_waits_for() -> None:
    """In one lane, what stands before a call or an answer has to be published first: it stays."""
    window = Window("key", suspects=2)
    window.assign({WHERE: given(1)})
    for offset in range(4):
        window.queue(taken(window, message(offset)))
    first, second = called_next(window), called_next(window)
    window.call_ended(first)
    window.retry(first, 0, 99)
    window.call_ended(second)
    window.answered(second, Skipped(), 0)
    window.let_go()
    assert [entry.message.offset for entry in window.entries()] == [0, 1]


def test_a_crowded_map_closes_its_partition_until_it_fits_again() -> None:
    """From three quarters of its room on the partition takes no more; others do."""
    window = Window("none", suspects=2)
    other = Partition("in", 1)
    window.assign({WHERE: given(1), other: given(2)})
    random = Random(7)
    entries = []
    for offset in range(40_000):
        entry = taken(window, message(offset))
        if offset and random.random() < 0.5:
            window.queue(entry)
            finish(window, called_next(window))
        else:
            entries.append(entry)
    window.measure()
    assert window.held[WHERE].map_fullness >= MAP_FULL
    assert window.crowded() == {WHERE}
    for entry in entries[: len(entries) * 3 // 4]:
        window.queue(entry)
        finish(window, called_next(window))
    window.measure()
    assert window.crowded() == frozenset()


def test_a_partition_is_closed_before_its_unfinished_messages_could_overfill_the_map() -> None:
    """However large the window is; and in whatever order they then finish, the map is whole."""
    window = Window("none", suspects=2)
    window.assign({WHERE: given(1)})
    offset = 0
    while not window.crowded() and offset < 30_000:
        for _ in range(500):
            taken(window, message(offset))
            offset += 1
    assert 16_000 < offset < 18_000
    holding = window.held[WHERE]
    order = list(holding.entries.values())[1:]
    Random(7).shuffle(order)
    for number, entry in enumerate(order):
        window.queue(entry)
        finish(window, called_next(window))
        if number % 500 == 0:
            runs = holding.progress(clean=False).runs
            assert decode(encode(runs, MAP_CHARS_MAX)) == runs


def test_a_partition_with_nothing_unfinished_is_never_crowded() -> None:
    """An earlier holder has left a map that is nearly full: only messages make it shorter."""
    random = Random(7)
    runs = tuple(random.choice((1, 2, 3)) for _ in range(11_000))
    window = Window("none", suspects=2)
    window.assign({WHERE: Given(1, Progress(0, runs))})
    window.measure()
    assert window.held[WHERE].map_fullness >= MAP_FULL
    assert window.crowded() == frozenset()
    taken(window, message(0))
    assert window.crowded() == {WHERE}


def test_a_map_is_measured_again_where_much_has_changed() -> None:
    """Not at each look, and not at regular times only: a thousand messages are taken in less."""
    window = Window("none", suspects=2)
    window.assign({WHERE: given(1)})
    holding = window.held[WHERE]
    entries = [taken(window, message(offset)) for offset in range(MEASURE_AGAIN)]
    window.queue(entries[5])
    finish(window, called_next(window))
    window.crowded()
    measured = holding.map_fullness
    assert measured > 0.0
    for entry in entries[10::2]:
        window.queue(entry)
        finish(window, called_next(window))
    window.crowded()
    assert holding.map_fullness == measured
    for offset in range(MEASURE_AGAIN, 2 * MEASURE_AGAIN):
        taken(window, message(offset))
    window.crowded()
    assert holding.map_fullness > measured


def test_there_is_room_while_few_messages_are_out() -> None:
    """Near the next offset, or few in all; said at once, and right in whatever order they end."""
    window = Window("none", suspects=2)
    window.assign({WHERE: given(1)})
    holding = window.held[WHERE]
    for offset in range(SPAN_SURE):
        taken(window, message(offset))
    assert holding.has_room()
    taken(window, message(SPAN_SURE))
    assert not holding.has_room()
    runs = (1, 1) * (SPAN_SURE // 2)
    assert fits_for_sure(runs, MAP_CHARS_MAX)
    few = Window("none", suspects=2)
    few.assign({WHERE: given(1)})
    for offset in range(RUNS_SURE // 2):
        taken(few, message(offset * 1_000_000))
    assert few.held[WHERE].has_room()
    taken(few, message(10**12))
    assert not few.held[WHERE].has_room()
    assert fits_for_sure((1, 1_000_000) * (RUNS_SURE // 2), MAP_CHARS_MAX)


def test_a_partition_is_closed_while_its_map_is_still_whole() -> None:
    """Nothing has been left out of it by then, and there is room for what is out."""
    window = Window("none", suspects=2)
    window.assign({WHERE: given(1)})
    random = Random(7)
    offset = 0
    while not window.crowded():
        for _ in range(500):
            entry = taken(window, message(offset))
            if offset and random.random() < 0.5:
                window.queue(entry)
                finish(window, called_next(window))
            offset += 1
        window.measure()
        runs = window.held[WHERE].progress(clean=False).runs
        assert decode(encode(runs, MAP_CHARS_MAX)) == runs
    assert window.held[WHERE].map_fullness < 0.9


def holding_after(unclean_ends: int, alone: int | None = None) -> Holding:
    window = Window("none", suspects=2)
    window.assign({WHERE: Given(1, Progress(0, (), unclean_ends, alone))})
    for offset in range(4):
        taken(window, message(offset))
    return window.held[WHERE]


def test_after_three_unclean_ends_messages_are_suspects() -> None:
    """Not before, so many only, and not where it is known who ran alone."""
    own = 1  # a holder's own end is counted in advance
    few = holding_after(UNCLEAN_ENDS_MAX - 1 + own)
    assert [entry.alone for entry in few.entries.values()] == [False] * 4
    many = holding_after(UNCLEAN_ENDS_MAX + own)
    assert [entry.alone for entry in many.entries.values()] == [True, True, False, False]
    known = holding_after(UNCLEAN_ENDS_MAX + own, alone=0)
    assert not any(entry.alone for entry in known.entries.values())


def test_progress_clears_the_count_and_a_clean_end_does_not_add_to_it() -> None:
    """Held: its own end in advance. Let go in order: without. Moved on: none."""
    window = Window("none", suspects=2)
    window.assign({WHERE: Given(1, Progress(0, (), unclean_ends=3))})
    window.queue(taken(window, message(0)))
    holding = window.held[WHERE]
    assert holding.progress(clean=False).unclean_ends == 3
    assert holding.progress(clean=True).unclean_ends == 2
    finish(window, called_next(window))
    assert holding.progress(clean=False) == Progress(1)


def test_who_runs_alone_is_forgotten_when_called_off_or_passed_by() -> None:
    """A call cut off in order has not died; one that died before is still to be rejected."""
    holding = holding_after(UNCLEAN_ENDS_MAX + 1)
    holding.alone = 0
    assert holding.progress(clean=False).alone == 0
    assert holding.progress(clean=True).alone is None
    died = holding_after(UNCLEAN_ENDS_MAX + 1, alone=1)
    assert died.progress(clean=True).alone == 1
    assert died.progress(clean=True, finishing=frozenset({0, 1})).alone is None
