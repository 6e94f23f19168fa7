"""Where a run stands: two states, and what each of them allows.

Rules of this file: pure. `Life` is the run's own way to its end, `Tenure` is what the group says
of the partitions; neither changes the other. Every part of the pipeline that has to know whether
it may take, call or publish asks here.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Life(IntEnum):
    """The run's way to its end. It only goes forward."""

    WORKING = 0
    STOPPING = 1  # nothing more is taken
    DRAINING = 2  # messages that wait for a call were let go; the others finish under a deadline
    ENDING = 3  # the last commits are made


class Tenure(Enum):
    """What the group says of the partitions."""

    NONE_YET = "none yet"  # before the first assignment
    HELD = "held"
    FINISHING = "finishing"  # a rebalance has begun; what is in flight may still finish
    LET_GO = "let go"  # a rebalance has begun, and nothing is published any more


class Phase:
    """Both states of a run. `forced`: the stop does not wait for what is in flight."""

    __slots__ = ("forced", "life", "tenure")

    def __init__(self) -> None:
        self.life, self.tenure = Life.WORKING, Tenure.NONE_YET
        self.forced = False

    # --- the run ---------------------------------------------------------------------------------

    def stop(self) -> None:
        self.life = max(self.life, Life.STOPPING)

    def force(self) -> None:
        self.forced = True
        self.stop()

    def drain(self) -> None:
        assert self.life is Life.STOPPING, f"a drain while {self.life.name}"
        self.life = Life.DRAINING

    def end(self) -> None:
        assert self.life is Life.DRAINING, f"the end while {self.life.name}"
        self.life = Life.ENDING

    @property
    def stopping(self) -> bool:
        """Nothing more is taken; it stays true until the run ends."""
        return self.life is not Life.WORKING

    @property
    def draining(self) -> bool:
        return self.life >= Life.DRAINING

    # --- the partitions --------------------------------------------------------------------------

    def revoke(self) -> None:
        """A rebalance has begun: all partitions may go to others. LET_GO stays LET_GO."""
        if self.tenure is Tenure.HELD:
            self.tenure = Tenure.FINISHING

    def let_go(self) -> None:
        """From here to the next assignment nothing is published."""
        if self.tenure is not Tenure.NONE_YET:
            self.tenure = Tenure.LET_GO

    def hold(self) -> None:
        self.tenure = Tenure.HELD

    @property
    def assigned_once(self) -> bool:
        return self.tenure is not Tenure.NONE_YET

    # --- what is allowed -------------------------------------------------------------------------

    @property
    def may_take(self) -> bool:
        """Messages may enter the window."""
        return self.life is Life.WORKING and self.tenure is Tenure.HELD

    @property
    def may_call(self) -> bool:
        """Calls may start. A drain needs no rule here: it lets go of the messages that wait."""
        return self.tenure is Tenure.HELD

    @property
    def may_publish(self) -> bool:
        """Outcomes may be handed to the sink."""
        return self.tenure is Tenure.HELD or self.tenure is Tenure.FINISHING

    @property
    def finishing(self) -> bool:
        """Messages have to finish soon, so their further calls wait for no budget."""
        return self.draining or self.tenure in (Tenure.FINISHING, Tenure.LET_GO)

    @property
    def clean(self) -> bool:
        """A commit made now is the last one of a holder that lets go of its partitions in order."""
        return self.life is Life.ENDING or self.tenure in (Tenure.NONE_YET, Tenure.LET_GO)
