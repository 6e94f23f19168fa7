"""What a message that is sent again carries of what happened to it before."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.history import (
    History,
    first_timestamp_ms,
    lived_on,
    origin,
    origin_topic_id,
    own_part,
)
from service.core.messages import Headers, Message, Partition

TOPIC_ID = b"AAAAAAAAAAAAAAAAAAAA-_"
HISTORY = History(b"notes:3:41", -1, 8, 1_700_000_001_000, redrives=2, retries=1, due_ms=5)
NAMED = replace(HISTORY, topic_id=TOPIC_ID)
NAMES = st.sampled_from([*(name for name, _ in NAMED.headers), "a"])
HEADERS = st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=3)), max_size=9).map(tuple)


def message(headers: Headers = (), topic_id: str = "") -> Message:
    where = Partition("notes", 0)
    return Message(where, 7, 1, b"k", b"v", headers, 1_700_000_009_000, topic_id=topic_id)


@pytest.mark.parametrize("history", [HISTORY, NAMED], ids=["no topic id", "topic id"])
@given(HEADERS)
def test_it_is_read_back_and_taken_off(history: History, headers: Headers) -> None:
    """Behind any headers, of whatever names, the block is found and comes off without a trace."""
    again = (*headers, *history.headers)
    assert History.of(again) == history
    assert own_part(again) == headers


@given(HEADERS)
def test_what_is_no_whole_block_is_the_messages_own(headers: Headers) -> None:
    """Headers of these names that are no complete block, in its order, stay where they are."""
    assert History.of(headers) is None
    assert own_part(headers) == headers


def test_a_damaged_block_is_not_believed() -> None:
    """A block with a word for a number, or an origin of four parts, is the message's own."""
    for index, value in ((0, b"notes:3:41:0"), (2, b"many"), (3, None), (6, b"")):
        block = list(HISTORY.headers)
        block[index] = (block[index][0], value)
        assert own_part(tuple(block)) == tuple(block)
    for value in (b"", b"short", b"A" * 21 + b":", None):
        block = list(NAMED.headers)
        block[1] = (block[1][0], value)
        assert own_part(tuple(block)) == tuple(block)


def test_a_topics_id_is_that_of_the_topic_in_the_origin() -> None:
    """Its own in a first life, what is carried in a later one, nothing where nothing is said."""
    own = "BBBBBBBBBBBBBBBBBBBBBB"
    assert origin_topic_id(message(topic_id=own)) == own.encode()
    assert lived_on(message(topic_id=own), 3, 5).topic_id == own.encode()
    again = message(NAMED.headers, own)
    assert origin_topic_id(again) == lived_on(again, 3, 5).topic_id == TOPIC_ID
    assert origin_topic_id(message(HISTORY.headers, own)) == b""
    claimed = (("sluice.id", b"notes:0:5"), ("sluice.source.topic.id", b"?"))
    assert origin_topic_id(message(claimed, own)) == b""
    an_output = (("sluice.id", b"notes:0:5:1"), ("sluice.source.topic.id", TOPIC_ID))
    assert origin_topic_id(message(an_output, own)) == own.encode()


def test_lives_add_up() -> None:
    """Attempts count on, the first failure and the first timestamp stay, a due time does not."""
    again = message(HISTORY.headers)
    lived = lived_on(again, 3, 1_700_000_009_999)
    assert lived == History(b"notes:3:41", -1, 11, 1_700_000_001_000, redrives=2, retries=1)
    assert (origin(again), first_timestamp_ms(again)) == (b"notes:3:41", -1)


def test_a_first_life_starts_here() -> None:
    """Without a block the message's own coordinates and timestamp are the first."""
    assert lived_on(message(), 3, 5) == History(b"notes:0:7", 1_700_000_009_000, 3, 5)
