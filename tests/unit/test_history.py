"""What a message that is sent again carries of what happened to it before."""

from hypothesis import given
from hypothesis import strategies as st

from service.core.history import History, first_timestamp_ms, lived_on, origin, own_part
from service.core.messages import Headers, Message, Partition

HISTORY = History(b"notes:3:41", -1, 8, 1_700_000_001_000, redrives=2, retries=1, due_ms=5)
NAMES = st.sampled_from([*(name for name, _ in HISTORY.headers), "a"])
HEADERS = st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=3)), max_size=9).map(tuple)


def message(headers: Headers = ()) -> Message:
    return Message(Partition("notes", 0), 7, 1, b"k", b"v", headers, 1_700_000_009_000)


@given(HEADERS)
def test_it_is_read_back_and_taken_off(headers: Headers) -> None:
    """Behind any headers, of whatever names, the block is found and comes off without a trace."""
    again = (*headers, *HISTORY.headers)
    assert History.of(again) == HISTORY
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


def test_lives_add_up() -> None:
    """Attempts count on, the first failure and the first timestamp stay, a due time does not."""
    again = message(HISTORY.headers)
    lived = lived_on(again, 3, 1_700_000_009_999)
    assert lived == History(b"notes:3:41", -1, 11, 1_700_000_001_000, redrives=2, retries=1)
    assert (origin(again), first_timestamp_ms(again)) == (b"notes:3:41", -1)


def test_a_first_life_starts_here() -> None:
    """Without a block the message's own coordinates and timestamp are the first."""
    assert lived_on(message(), 3, 5) == History(b"notes:0:7", 1_700_000_009_000, 3, 5)
