"""Lanes: what is handed over, and in which order it lands."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.core.lanes import Lane, lane_id
from service.core.messages import Message, Partition


def message(offset: int, key: bytes | None) -> Message:
    return Message(Partition("in", 0), offset, 0, key, b"text", (), 0)


def test_a_stopped_lane_hands_nothing_over() -> None:
    """From a failure until everything handed over is settled, later ones wait."""
    lane = Lane()
    for offset in range(3):
        lane.enter(offset)
    lane.answer(0)
    lane.answer(1)
    assert [lane.hand_over(), lane.hand_over()] == [0, 1]
    assert not lane.fail(0)
    lane.answer(2)
    assert not lane.ready
    assert lane.hand_over() is None
    assert lane.acknowledge(1)
    assert [lane.hand_over(), lane.hand_over()] == [0, 2]


def test_which_lane() -> None:
    """Key order: a lane a key, keyless messages alone; partition order: one; none: each alone."""
    assert lane_id("key", message(1, b"k")) == lane_id("key", message(2, b"k"))
    assert lane_id("key", message(1, b"")) == lane_id("key", message(2, b""))
    assert lane_id("key", message(1, None)) != lane_id("key", message(2, None))
    assert lane_id("partition", message(1, b"a")) == lane_id("partition", message(2, None))
    assert lane_id("none", message(1, b"k")) != lane_id("none", message(2, b"k"))


class Lanes(RuleBasedStateMachine):
    """A lane between calls that answer in any order and a log in which sends may fail.

    The log is what a reader sees; a failed send fails what was handed over behind it too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lane = Lane()
        self.entered = 0
        self.unanswered: list[int] = []
        self.handed: list[int] = []
        self.log: list[int] = []
        self.failing = False

    @rule()
    def enter(self) -> None:
        self.lane.enter(self.entered)
        self.unanswered.append(self.entered)
        self.entered += 1

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(self.unanswered))
        self.unanswered.remove(offset)
        self.lane.answer(offset)

    @rule()
    def hand_over(self) -> None:
        ready = self.lane.ready
        offset = self.lane.hand_over()
        assert (offset is not None) == ready
        if offset is not None:
            assert not self.failing, "handed over while a failure is unsettled"
            self.handed.append(offset)

    @precondition(lambda self: self.handed)
    @rule(fails=st.booleans())
    def settle(self, fails: bool) -> None:
        offset = self.handed.pop(0)
        self.failing = self.failing or fails
        if self.failing:
            reopened = self.lane.fail(offset)
        else:
            self.log.append(offset)
            reopened = self.lane.acknowledge(offset)
        assert reopened == (self.failing and not self.handed)
        if reopened:
            self.failing = False

    @invariant()
    def log_is_in_order_without_holes(self) -> None:
        assert self.log == list(range(len(self.log)))

    def teardown(self) -> None:
        """Whatever happened, everything gets through in the end."""
        for offset in self.unanswered:
            self.lane.answer(offset)
        while self.handed:
            self.settle(False)
        while (offset := self.lane.hand_over()) is not None:
            self.log.append(offset)
            self.lane.acknowledge(offset)
        assert self.log == list(range(self.entered))
        assert self.lane.empty


TestLanes = Lanes.TestCase


@given(st.permutations(range(5)))
def test_failed_ones_come_first_again_in_order(order: list[int]) -> None:
    """In whatever order failures become known, they are handed over in input order."""
    lane = Lane()
    for offset in range(6):
        lane.enter(offset)
        lane.answer(offset)
    for _ in range(5):
        lane.hand_over()
    assert [lane.fail(offset) for offset in order] == [False] * 4 + [True]
    assert [lane.hand_over() for _ in range(6)] == list(range(6))
