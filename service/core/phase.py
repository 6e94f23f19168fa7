"""Where a run stands: two states, and what each of them allows.

Rules of this file: pure. `Life` is the run's own way to its end, `Tenure` is what the group says
of the partitions; neither changes the other. Whoever asks "may I?" asks here.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Life(IntEnum):
    """The run's way to its end. It only goes forward."""

    WORKING = 0
    STOPPING = 1  # nothing more is taken
    DRAINING = 2  # what was let go is gone, the rest comes to its end under a deadline
    ENDING = 3  # the last commits


class Tenure(Enum):
    """What the group says of the partitions."""

    NONE_YET = "none yet"  # before the first assignment
    HELD = "held"
    FINISHING = "finishing"  # in question: what is in flight may come to its end
    LET_GO = "let go"  # in question, and nothing is published any more


class Phase:
    """Both states of a run. `forced`: nobody waits for what is in flight."""

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
        """Nothing more is taken; true to the end."""
        return self.life is not Life.WORKING

    @property
    def draining(self) -> bool:
        return self.life >= Life.DRAINING

    # --- the partitions --------------------------------------------------------------------------

    def revoke(self) -> None:
        """All partitions are in question; what was let go before stays so."""
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
        """Calls may start. A drain ends them by itself: it lets go of what waits."""
        return self.tenure is Tenure.HELD

    @property
    def may_publish(self) -> bool:
        """Outcomes may be handed to the sink."""
        return self.tenure is Tenure.HELD or self.tenure is Tenure.FINISHING

    @property
    def finishing(self) -> bool:
        """Messages are to come to their end: their further calls wait for no budget."""
        return self.draining or self.tenure in (Tenure.FINISHING, Tenure.LET_GO)

    @property
    def clean(self) -> bool:
        """What is committed now is the last word of a holder that lets go in order."""
        return self.life is Life.ENDING or self.tenure in (Tenure.NONE_YET, Tenure.LET_GO)
