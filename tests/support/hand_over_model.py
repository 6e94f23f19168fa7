"""The exactly-once hand-over as a small machine, and a search through all that it can do.

Two owners, A and B, of one input partition with two messages, and Kafka between them. Each state
has every step that could come next; the search takes them all. It is the view from above: one
step here is one request to Kafka, one answer, or one decision, and between any two of them
anything else may happen: a rebalance gives the partition to the other (who may begin long before
the first hears of it, if ever), an answer is lost, the coordinator aborts, a process dies.

    step here          what it stands for in service/kafka/
    told               holdings.on_assigned
    leaves             holdings.on_revoked or on_assigned without it: Transactions.drop;
                       Holdings.hand_back; the death of the process
    fenced             Transactions.fence, from Holdings._read; the broker's InitProducerId
    read               Holdings._read behind the fence; starts.read
    begun              Writer._transact: begin and send; the mark of Holdings._mark has no outcomes
    asked              Writer._transact: to_store, store, and commit is sent
    arrived            the coordinator writes "prepared": the transaction is committed
    visible            the markers are written: readers see the outcomes and the offset
    heard              Writer._committed
    failed, unheard    Writer._replace: no answer, or an error; what was sent may still arrive
    refused            Writer._fenced, Holdings.fenced: a newer epoch is there
    renewed            Writer._renew_now: context.open
    read back          Writer._renew_now: read_back, and what follows from it (`became`)

An owner that comes again has the nonce that it had, as a client that was replaced; a process that
was started again has another, which is what the other owner stands for.

What is left out: a partition that is kept through a rebalance (for Kafka nothing happens then);
outcomes refused by a broker (they are sent again as others are); waits and deadlines (any order
is tried anyway); produce requests that arrive after their transaction has ended (refused since
Kafka 4.0; before, they hold readers up until the transaction's timeout, and nobody sees them).
That Kafka keeps what it has acknowledged is taken for granted.

Stored values are the real ones (`starts.to_store` and `read`), and so is `became`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import NamedTuple, TypeAlias, TypeVar

from service.core.completed import finished_ranges
from service.core.tracker import Progress
from service.kafka.client.stored import Mark, Stored, read, to_store
from service.kafka.transactions.writer import Became, became

MESSAGES = 2
ALL = 2**MESSAGES - 1
"""Messages are bits: outcomes, what is finished and what is visible are sets of them."""


Value: TypeAlias = int
"""What Kafka holds, by its place in `STORED`: states are compared millions of times."""

NONE = 0
STORED: list[Stored | None] = [None]


T = TypeVar("T")


class At(IntEnum):
    """Where an owner stands."""

    AWAY = auto()  # it does not have the partition, as far as it knows
    GIVEN = auto()  # it has been told that it has
    READ_EARLY = auto()  # only without a guard: read before the fence
    FENCED = auto()  # its epoch is the newest, nothing was read since
    HELD = auto()  # restored; no transaction is open
    BEGUN = auto()  # one is, with the outcomes in it
    ASKED = auto()  # the commit is sent
    ANSWERED = auto()  # the answer is on its way back
    DOUBT = auto()  # no producer: the one it had is cut off
    READ_BACK_EARLY = auto()  # only without a guard: read back before the new epoch
    RENEWED = auto()  # an epoch of its own making, nothing was read since
    LOST = auto()  # fenced: to be restored from the fence on
    DEAF = auto()  # only without a guard: lost, and nobody restores it


class Owner(NamedTuple):
    at: At = At.AWAY
    newest: bool = False
    """Whether its epoch is the newest. Numbers of epochs do not matter beyond that."""
    known: Value = NONE
    finished: int = 0
    again: int = 0
    """Outcomes that were handed over and wait for another transaction."""
    sending: int = 0
    attempted: Value = NONE


class Transaction(NamedTuple):
    outcomes: int
    stored: Value = NONE


class State(NamedTuple):
    owners: tuple[Owner, Owner] = (Owner(), Owner())
    open: tuple[Transaction | None, Transaction | None] = (None, None)
    """The transaction of each owner; a new epoch ends those of all older ones."""
    commits: tuple[bool, bool] = (False, False)
    """Requests to commit it that are under way; under an older epoch they are refused."""
    prepared: Transaction | None = None
    held: Value = NONE
    """What Kafka holds for the group, and tells whoever reads."""
    visible: int = 0


@dataclass(frozen=True, slots=True)
class Guards:
    """What keeps the promise; the search must find what happens without each of them."""

    fence_before_read: bool = True
    read_behind_the_markers: bool = True  # stable_offsets; from Kafka 4.0 on the fence itself
    one_id_for_a_partition: bool = True  # else older epochs go on beside the newest
    withdrawn_by_the_fence: bool = True
    doubt_is_read_back: bool = True
    new_epoch_before_reading_back: bool = True
    another_owner_is_seen: bool = True
    offset_in_the_transaction: bool = True
    no_answer_is_no_commit: bool = True
    the_fenced_restore: bool = True
    a_topic_in_doubt_is_waited_for: bool = True


class Step(NamedTuple):
    name: str
    state: State
    trouble: bool = False
    """Nobody can count on it."""


class Broken(AssertionError):
    """The steps that lead to it, and what is broken there."""


# --- values ---------------------------------------------------------------------------------------


def _to_store(finished: int, nonce: str) -> Stored:
    """With the real codec: a next offset, and runs of what is finished beyond it."""
    bits = [finished >> n & 1 for n in range(MESSAGES)] + [0]
    next_offset = bits.index(0)
    rest, runs = bits[next_offset:], []
    while any(rest):
        for bit in (0, 1):
            length = next((n for n, each in enumerate(rest) if each != bit), len(rest))
            runs.append(length)
            rest = rest[length:]
    return to_store(Progress(next_offset, tuple(runs)), Mark(nonce))


@cache
def value_of(finished: int, who: int) -> Value:
    STORED.append(_to_store(finished, _nonce(who)))
    return len(STORED) - 1


@cache
def finished_in(value: Value) -> int:
    stored = STORED[value]
    if stored is None:
        return 0
    found = read(stored)
    assert found is not None, "what is stored cannot be read"
    progress = found[0]
    beyond = finished_ranges(progress.next_offset, progress.runs)
    return sum(1 << n for each in (range(progress.next_offset), *beyond) for n in each)


def _nonce(who: int) -> str:
    return f"{who:016x}"


@cache
def _is_his(value: Value, who: int) -> bool:
    stored = STORED[value]
    found = None if stored is None else read(stored)
    return found is not None and found[1].nonce == _nonce(who)


# --- steps ----------------------------------------------------------------------------------------


class HandOver:
    """All steps from a state."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards

    def steps(self, state: State) -> Iterator[Step]:
        if state.prepared is not None:
            yield Step("visible", self._visible(state))
        if any(state.open):
            yield Step("the coordinator aborts", _new_epoch(state, None), trouble=True)
        yield from self._of(state, 0)
        yield from self._of(state, 1)

    def _of(self, state: State, who: int) -> Iterator[Step]:
        one = state.owners[who]
        yield from self._of_the_group(state, who, one)
        if state.commits[who] and state.prepared is None:
            yield Step("arrived", self._arrived(state, who))
        match one.at:
            case At.GIVEN if not self._guards.fence_before_read:
                yield Step("read", _put(state, who, self._restored(state, one, At.READ_EARLY)))
            case At.GIVEN:
                yield from self._fence(state, who, At.FENCED)
            case At.LOST if self._guards.the_fenced_restore:
                yield Step("starts over", _put(state, who, one._replace(at=At.GIVEN)))
            case At.READ_EARLY:
                yield from self._fence(state, who, At.HELD)
            case At.FENCED:
                yield Step("read", _put(state, who, self._restored(state, one, At.HELD)))
            case At.HELD:
                yield from self._begin(state, who, one)
            case At.BEGUN:
                yield from self._ask(state, who, one)
            case At.ASKED if self._is_refused(one):
                yield _refused(state, who, one)
            case At.ANSWERED:
                yield Step("heard", _put(state, who, _committed(one)))
            case At.DOUBT if not self._guards.new_epoch_before_reading_back:
                yield Step("read back", self._read_back(state, who, one, At.READ_BACK_EARLY))
            case At.DOUBT:
                yield from self._fence(state, who, At.RENEWED)
                if not self._guards.a_topic_in_doubt_is_waited_for:
                    yield Step("in doubt", _put(state, who, Owner(At.DEAF)), trouble=True)
            case At.READ_BACK_EARLY:
                yield from self._fence(state, who, At.HELD)
            case At.RENEWED:
                yield Step("read back", self._read_back(state, who, one, At.HELD))
        if one.at is At.BEGUN:
            doubt = one._replace(at=At.DOUBT, again=one.sending, sending=0, newest=False)
            yield Step("failed", _put(state, who, doubt), trouble=True)
        if one.at in (At.ASKED, At.ANSWERED):
            doubt = one._replace(at=At.DOUBT, newest=False)
            yield Step("unheard", _put(state, who, doubt), trouble=True)

    def _of_the_group(self, state: State, who: int, one: Owner) -> Iterator[Step]:
        if one.at is not At.AWAY:
            yield Step("leaves", _put(state, who, Owner()), trouble=True)
        else:
            # While the other has it, the group gives it away only if something happens to him.
            trouble = state.owners[1 - who].at is not At.AWAY
            yield Step("told", _put(state, who, Owner(At.GIVEN)), trouble)

    # --- epochs ---

    def _fence(self, state: State, who: int, at: At) -> Iterator[Step]:
        if state.prepared is not None and self._guards.read_behind_the_markers:
            return  # one step for both: no epoch is of use before it can be read behind
        name = "fenced" if at is At.FENCED else "renewed"
        yield Step(name, self._fenced(state, who, at))
        yield Step(f"{name}, unheard", self._fenced(state, who, None), trouble=True)

    def _fenced(self, state: State, who: int, at: At | None) -> State:
        if self._guards.one_id_for_a_partition:
            state = _new_epoch(state, who if at is not None else None)
        one = state.owners[who]
        if at is None:
            return state
        if at is At.FENCED and self._guards.withdrawn_by_the_fence:
            one = one._replace(again=0, sending=0, attempted=NONE)
        return _put(state, who, one._replace(at=at))

    def _is_refused(self, one: Owner) -> bool:
        return self._guards.one_id_for_a_partition and not one.newest

    # --- reading ---

    def _restored(self, state: State, one: Owner, at: At) -> Owner:
        return one._replace(at=at, known=state.held, finished=finished_in(state.held))

    def _read_back(self, state: State, who: int, one: Owner, at: At) -> State:
        outcome = became(STORED[one.attempted], STORED[state.held], STORED[one.known])
        if not self._guards.doubt_is_read_back:
            outcome = Became.NOT_COMMITTED
        if not self._guards.no_answer_is_no_commit and one.attempted:
            outcome = Became.COMMITTED
        if outcome is Became.ANOTHER and not self._guards.another_owner_is_seen:
            outcome = Became.NOT_COMMITTED
        match outcome:
            case Became.COMMITTED:
                one = _committed(one)
            case Became.NOT_COMMITTED:
                again = one.again | one.sending
                one = one._replace(again=again, sending=0, attempted=NONE)
            case Became.ANOTHER:
                return _refused(state, who, one).state
        return _put(state, who, one._replace(at=at))

    # --- a transaction ---

    def _begin(self, state: State, who: int, one: Owner) -> Iterator[Step]:
        if self._is_refused(one):
            yield _refused(state, who, one)
            return
        if not _is_his(one.known, who):
            choices: tuple[int, ...] = (0,)  # the mark of the restore comes first
        elif one.again:
            choices = (one.again,)
        else:
            choices = tuple(s for s in range(1, ALL + 1) if not s & one.finished)
        for outcomes in choices:
            rest = one.again & ~outcomes
            begun = one._replace(at=At.BEGUN, again=rest, sending=outcomes)
            opened = _with(state.open, who, Transaction(outcomes))
            yield Step(f"begun {outcomes:0{MESSAGES}b}", _put(state, who, begun, open=opened))

    def _ask(self, state: State, who: int, one: Owner) -> Iterator[Step]:
        transaction = state.open[who]
        if self._is_refused(one) or transaction is None:
            yield _refused(state, who, one)
            return
        stored, held = value_of(one.finished | one.sending, who), state.held
        if self._guards.offset_in_the_transaction:
            transaction = transaction._replace(stored=stored)
        else:
            held = stored
        yield Step(
            "asked",
            _put(
                state,
                who,
                one._replace(at=At.ASKED, attempted=stored),
                open=_with(state.open, who, transaction),
                commits=_with(state.commits, who, True),
                held=held,
            ),
        )

    def _arrived(self, state: State, who: int) -> State:
        one = state.owners[who]
        state = state._replace(
            commits=_with(state.commits, who, False),
            prepared=state.open[who],
            open=_with(state.open, who, None),
        )
        # Whoever waits no longer, or has a newer epoch by now, does not hear of it.
        waits = one.at is At.ASKED
        return _put(state, who, one._replace(at=At.ANSWERED)) if waits else state

    def _visible(self, state: State) -> State:
        done = state.prepared
        assert done is not None
        if done.outcomes & state.visible:
            raise Broken("an outcome is visible twice")
        visible = state.visible | done.outcomes
        held = done.stored or state.held
        return state._replace(prepared=None, visible=visible, held=held)


def _with(pair: tuple[T, T], who: int, value: T) -> tuple[T, T]:
    return (value, pair[1]) if who == 0 else (pair[0], value)


def _put(state: State, who: int, one: Owner, **changes: object) -> State:
    return state._replace(owners=_with(state.owners, who, one), **changes)


def _new_epoch(state: State, who: int | None) -> State:
    """It ends what is open; what older epochs have sent will be refused. `who` hears of it."""
    first, second = (one._replace(newest=which == who) for which, one in enumerate(state.owners))
    return state._replace(owners=(first, second), open=(None, None), commits=(False, False))


def _committed(one: Owner) -> Owner:
    finished = one.finished | one.sending
    return one._replace(
        at=At.HELD, known=one.attempted, finished=finished, sending=0, attempted=NONE
    )


def _refused(state: State, who: int, one: Owner) -> Step:
    lost = Owner(At.LOST, again=one.again | one.sending)
    return Step("refused", _put(state, who, lost))


# --- the search ----------------------------------------------------------------------------------


def check(state: State, before: State) -> None:
    """What holds in every state; raises `Broken`."""
    finished = finished_in(state.held)
    if finished & ~state.visible:
        raise Broken("an outcome counts as finished and is not visible: it is lost")
    if finished_in(before.held) & ~finished:
        raise Broken("what was finished is not finished any more")
    if state.visible & ~finished:
        raise Broken("an outcome is visible and does not count as finished")


def explore(guards: Guards = Guards()) -> int:
    """How many states there are. Raises `Broken` with the shortest way to what is broken.

    In every state nothing is visible twice, nothing finished is not visible, and what is finished
    stays so. From every state those steps lead to the end that are nobody's trouble: nothing
    waits for a death, a rebalance or a fault in order to go on.
    """
    machine, start = HandOver(guards), State()
    came_by: dict[State, tuple[State, str] | None] = {start: None}
    leads_to: dict[State, list[State]] = {}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        try:
            for step in machine.steps(state):
                if step.state.held != state.held or step.state.visible != state.visible:
                    check(step.state, state)
                if step.state not in came_by:
                    came_by[step.state] = state, step.name
                    waiting.append(step.state)
                if not step.trouble:
                    leads_to.setdefault(step.state, []).append(state)
        except Broken as broken:
            raise Broken(_told(came_by, state, str(broken))) from None
    stuck = came_by.keys() - _that_lead_to_the_end(came_by, leads_to)
    if stuck:
        first = next(state for state in came_by if state in stuck)
        raise Broken(_told(came_by, first, "nobody goes on from here"))
    return len(came_by)


def _that_lead_to_the_end(
    states: dict[State, tuple[State, str] | None], leads_to: dict[State, list[State]]
) -> set[State]:
    found = {each for each in states if each.visible == ALL and finished_in(each.held) == ALL}
    waiting = list(found)
    while waiting:
        for before in leads_to.get(waiting.pop(), ()):
            if before not in found:
                found.add(before)
                waiting.append(before)
    return found


def _told(came_by: dict[State, tuple[State, str] | None], state: State, what: str) -> str:
    steps: list[str] = []
    while (came := came_by[state]) is not None:
        before, name = came
        changed = [who for who in (0, 1) if before.owners[who].at is not state.owners[who].at]
        steps.append(f"{'AB'[changed[0]]} {name}" if changed else name)
        state = before
    return f"{what}, after: {', '.join(reversed(steps))}"
