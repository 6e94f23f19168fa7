"""The watchdog: what means silence, what a topic's end, and how often a client is replaced."""

import pytest

from service.core.messages import Partition
from service.kafka.group.watchdog import (
    GONE_S,
    REPLACED_WITHIN_S,
    Replacements,
    SilenceWatch,
    Standing,
    TopicSeen,
    TopicsWatch,
)

ONE, TWO = Partition("texts", 0), Partition("texts", 1)
EVERY_S = 10.0


class Looks:
    """Looks every ten seconds at one partition; the last says what was found."""

    def __init__(self) -> None:
        self.watch = SilenceWatch(silent_s=30)
        self.now_s = 0.0

    def look(
        self, at: int, end: int, *, asked: bool = True, after_s: float = EVERY_S
    ) -> str | None:
        self.now_s += after_s
        asked_for = {ONE} if asked else set()
        return self.watch.judge(self.now_s, EVERY_S, {ONE: Standing(at, end)}, asked_for)


@pytest.fixture
def looks() -> Looks:
    return Looks()


# --- silence ---


def test_messages_that_are_asked_for_and_do_not_come_are_silence(looks: Looks) -> None:
    """Thirty seconds after the first look that saw them waiting, and not before."""
    assert [looks.look(5, 9) for _ in range(3)] == [None] * 3
    said = looks.look(5, 9)
    assert said == (
        "silent: 1 partition gave nothing for 30 s, among them texts[0] at offset 5 of 9"
    )


def test_progress_is_no_silence(looks: Looks) -> None:
    """However slow: one message between two looks is enough, with any number waiting."""
    assert [looks.look(at, 1000) for at in range(50)] == [None] * 50


def test_a_reader_at_the_end_is_no_silence(looks: Looks) -> None:
    """Nothing is there; what comes after an hour has its thirty seconds."""
    assert [looks.look(9, 9) for _ in range(360)] == [None] * 360
    assert [looks.look(9, 10) for _ in range(3)] == [None] * 3
    assert looks.look(9, 10) is not None


def test_what_is_not_asked_for_is_no_silence(looks: Looks) -> None:
    """A full window for an hour, in which nothing is taken, blames nobody."""
    assert [looks.look(5, 9, asked=False) for _ in range(360)] == [None] * 360


def test_time_in_which_nothing_was_asked_does_not_count(looks: Looks) -> None:
    """Of many looks only those count before which it was polled for messages."""
    answers = [looks.look(5, 9, asked=number % 2 == 0) for number in range(6)]
    assert answers == [None] * 6  # twice asked, after the first look
    assert looks.look(5, 9) is not None


def test_a_process_that_was_stopped_did_not_wait(looks: Looks) -> None:
    """An hour between two looks (SIGSTOP, a suspended machine) counts as twenty seconds."""
    looks.look(5, 9)
    assert looks.look(5, 9, after_s=3600) is None
    assert looks.look(5, 9) is not None


def test_a_partition_that_went_and_came_starts_anew(looks: Looks) -> None:
    """Another's silence is not ours, and another client's neither."""
    for _ in range(3):
        looks.look(5, 9)
    looks.watch.judge(35, EVERY_S, {TWO: Standing(0, 0)}, {TWO})
    assert looks.look(5, 9) is None
    for _ in range(2):
        assert looks.look(5, 9) is None
    looks.watch.forget()
    assert looks.look(5, 9) is None


# --- topics ---

WELL = TopicSeen("id-1", partitions=2, known=2)


@pytest.fixture
def topics() -> TopicsWatch:
    return TopicsWatch({"texts": "id-1"}, behind_s=120)


def test_a_topic_that_is_gone_in_two_looks_ends_it(topics: TopicsWatch) -> None:
    """From the first on nothing may be committed for it; the sentence names it."""
    assert topics.judge(0, {"texts": WELL}) is None
    assert topics.doubtful == set()
    assert topics.judge(10, {"texts": None}) is None
    assert topics.doubtful == {"texts"}
    assert topics.judge(10 + GONE_S - 1, {"texts": None}) is None
    end = topics.judge(10 + GONE_S, {"texts": None})
    assert end is not None
    assert end.startswith("Topic texts was deleted while it was being read:")


def test_a_topic_that_one_broker_did_not_know_goes_on(topics: TopicsWatch) -> None:
    """The same id again: commits go on as well."""
    for now_s in range(0, 200, 20):
        assert topics.judge(now_s, {"texts": None}) is None
        assert topics.judge(now_s + 10, {"texts": WELL}) is None
        assert topics.doubtful == set()


def test_a_look_that_did_not_tell_of_a_topic_says_nothing(topics: TopicsWatch) -> None:
    """An error of another kind is neither gone nor back."""
    assert topics.judge(0, {"texts": None}) is None
    assert topics.judge(1000, {}) is None
    assert topics.doubtful == {"texts"}


def test_a_doubt_holds_until_a_look_finds_the_same_topic(topics: TopicsWatch) -> None:
    """A look that did not tell of it leaves the doubt."""
    topics.doubt(["texts"])
    assert topics.doubtful == {"texts"}
    assert topics.judge(0, {}) is None
    assert topics.doubtful == {"texts"}
    assert topics.judge(1, {"texts": WELL}) is None
    assert topics.doubtful == set()


def test_another_id_ends_it_at_once(topics: TopicsWatch) -> None:
    """Deleted and made again: nothing may be committed, and the sentence has both ids."""
    end = topics.judge(0, {"texts": TopicSeen("id-2", 2, 2)})
    assert end is not None
    assert end.startswith("Topic texts was deleted and made again while it was being read")
    assert "id-1 and is id-2" in end
    assert topics.doubtful == {"texts"}


def test_brokers_that_tell_no_id_change_nothing(topics: TopicsWatch) -> None:
    """Old ones among new ones, as in a rolling upgrade: the id that is known stays known."""
    assert topics.judge(0, {"texts": TopicSeen(None, 2, 2)}) is None
    assert topics.judge(1, {"texts": TopicSeen("id-2", 2, 2)}) is not None

    learns = TopicsWatch({"texts": None}, behind_s=120)
    assert learns.judge(0, {"texts": TopicSeen(None, 2, 2)}) is None
    assert learns.judge(1, {"texts": WELL}) is None
    assert learns.judge(2, {"texts": TopicSeen("id-2", 2, 2)}) is not None


def test_a_client_that_does_not_learn_of_partitions_is_behind(topics: TopicsWatch) -> None:
    """After twice the age at which it refreshes its metadata, counted anew for a new client."""
    more = {"texts": TopicSeen("id-1", partitions=3, known=2)}
    assert topics.behind(0, more) is None
    assert topics.behind(119, more) is None
    said = topics.behind(120, more)
    assert said == "its metadata is stale: it knows 2 partitions of topic texts, which has 3"
    topics.forget()
    assert topics.behind(130, more) is None
    assert topics.behind(140, {"texts": WELL}) is None
    assert topics.behind(300, more) is None


# --- how often ---


def test_the_third_replacement_within_ten_minutes_is_refused() -> None:
    """Two help or don't; later ones may help again."""
    replacements = Replacements()
    assert replacements.allow(0)
    assert replacements.allow(100)
    assert not replacements.allow(REPLACED_WITHIN_S - 1)
    assert replacements.allow(REPLACED_WITHIN_S)
    assert not replacements.allow(REPLACED_WITHIN_S + 99)
    assert replacements.allow(REPLACED_WITHIN_S + 100)
