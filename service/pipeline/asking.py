"""One attempt for one message: a suspect runs alone, a slow call is hedged, a late one cut off."""

from __future__ import annotations

import asyncio
from functools import partial, reduce

from service import clock
from service.core.admission.admission import Admission, Turn
from service.core.admission.hedges import Hedges
from service.core.admission.retry import others_succeed
from service.core.errors import CallFailure
from service.core.events import Hedged, Observe
from service.core.window import Entry
from service.pipeline.bounds import Bounds
from service.pipeline.commits import COMMIT_AGAIN_S, Commits
from service.pipeline.outcomes import (
    CutOff,
    Result,
    better,
    calls_made,
    cost_usd,
    is_answer,
)
from service.pipeline.purse import Purse
from service.pipeline.streaming import Streaming
from service.ports import Extractor

LOOK_S = 1.0
"""Seconds between two looks at a call that should be hedged or cut off already, while another rule
does not allow it yet."""


class Asking:
    """Makes the calls of an attempt, and owns the budget of second calls (hedges)."""

    def __init__(
        self,
        extractor: Extractor,
        admission: Admission,
        streaming: Streaming,
        commits: Commits,
        purse: Purse,
        bounds: Bounds,
        observe: Observe,
    ) -> None:
        self._extractor, self._admission = extractor, admission
        self._streaming, self._commits, self._purse = streaming, commits, purse
        self._bounds, self._observe = bounds, observe
        self._hedges = Hedges(bounds.hedge_after_s)
        self._watches = bounds.hedge_after_s is not None or bounds.message_timeout_s is not None

    async def alone(self, entry: Entry, turn: Turn) -> Result | CutOff:
        """An attempt for a suspect. No other call runs beside it, and Kafka holds its offset: if
        the process dies now, the next holder knows which message was the cause."""
        await self._mark_alone(entry, entry.message.offset)
        result = await self.ask(entry, turn)
        await self._mark_alone(entry, None)
        return result

    async def _mark_alone(self, entry: Entry, offset: int | None) -> None:
        """Store in Kafka which message runs alone (None: none does).

        It is stored before the message runs, and again before others run after it. Tries until it
        is stored; where the partition is lost, the task is cancelled.
        """
        entry.holding.alone = offset
        while True:
            if await self._commits.commit():
                return
            await asyncio.sleep(COMMIT_AGAIN_S)

    async def ask(self, entry: Entry, turn: Turn) -> Result | CutOff:
        """One attempt, with the hedge and the time limit of the settings."""
        self._hedges.called()
        if not self._watches:
            return await self._once(entry)
        return await self._watched(entry, turn)

    async def _once(self, entry: Entry) -> Result:
        try:
            if self._streaming.on:
                return await self._streaming.ask(entry)
            return await self._extractor.call(entry.text, entry.progress)
        except CallFailure as failure:
            return failure

    # --- a second call, or an end ----------------------------------------------------------------

    async def _watched(self, entry: Entry, turn: Turn) -> Result | CutOff:
        """An attempt that may get a second call beside the first, or be cut off.

        The first answer wins. A failure is returned only when no other call of the attempt runs.
        """
        async with asyncio.TaskGroup() as calls:
            running = {first := calls.create_task(self._once(entry))}
            ended: dict[asyncio.Task[Result], Result] = {}
            hedged = cut_off = False
            while running and not cut_off and not any(map(is_answer, ended.values())):
                look_at_s = self._look_again_s(entry, turn, hedged=hedged)
                timeout_s = None if look_at_s is None else max(0.0, look_at_s - clock.now_s())
                done, running = await asyncio.wait(
                    running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                ended |= {call: call.result() for call in done}
                cut_off = not done and self.overstays(entry)
                if not done and not cut_off and not hedged and self._may_hedge(entry, turn):
                    hedged = True
                    second = calls.create_task(self._once(entry))
                    second.add_done_callback(partial(self._second_ended, entry.route))
                    running.add(second)
            stream = self._streaming.of(entry)  # read now: the end of the call's task forgets it
            for call in running:
                call.cancel()
        result = CutOff() if cut_off else reduce(better, ended.values())
        if hedged:
            answer = next((call for call, each in ended.items() if each is result), None)
            answered = answer is not None and is_answer(result)
            self._observe(
                Hedged("none" if not answered else "first" if answer is first else "second")
            )
        self._account_beside(entry, result, tuple(ended.values()), len(running))
        if cut_off and stream is not None:
            await self._streaming.close_cut_off(entry, stream)
        return result

    def _account_beside(
        self, entry: Entry, result: Result | CutOff, ended: tuple[Result, ...], called_off: int
    ) -> None:
        """Count the calls of an attempt that its result does not count, and what they cost.

        A call that has ended tells its cost. For a call that was cancelled because the other one
        was answered, the cost of that other call is assumed; where no call was answered, the cost
        is not known and counts as 0.
        """
        known = () if isinstance(result, CutOff) else (result,)
        calls = sum(calls_made(entry, each) for each in ended)
        usd = sum(cost_usd(entry, each) for each in ended)
        entry.calls_beside += calls - sum(calls_made(entry, each) for each in known) + called_off
        beside_usd = usd - sum(cost_usd(entry, each) for each in known)
        beside_usd += called_off * sum(cost_usd(entry, each) for each in known)
        entry.beside_usd += beside_usd
        if beside_usd > 0:
            self._purse.spent(beside_usd)

    def _look_again_s(self, entry: Entry, turn: Turn, *, hedged: bool) -> float | None:
        """When to look at a running call again: at `hedge_after_s` or `message_timeout_s`."""
        now_s, moments = clock.now_s(), []
        if not hedged and (due_s := self._hedges.due_s(turn.started_s)) is not None:
            moments.append(due_s)
        if self._bounds.message_timeout_s is not None and entry.first_called_s is not None:
            moments.append(entry.first_called_s + self._bounds.message_timeout_s)
        # A moment that has passed is looked at again every `LOOK_S`: another rule holds it up.
        return min(
            (max(at_s, now_s + LOOK_S if at_s <= now_s else at_s) for at_s in moments), default=None
        )

    def _may_hedge(self, entry: Entry, turn: Turn) -> bool:
        now_s = clock.now_s()
        due_s = self._hedges.due_s(turn.started_s)
        if due_s is None or due_s > now_s or entry.alone or self._admission.finishing:
            return False
        estimate = self._extractor.estimate(entry.text, entry.progress)
        if not self._hedges.may() or self._admission.hold(now_s, estimate) is not None:
            return False
        self._hedges.hedged()
        self._admission.admit(now_s, estimate)
        return True

    def _second_ended(self, route: str, _: asyncio.Task[Result]) -> None:
        """Give back the second call's own slot, also where its task never came to its first
        step."""
        self._admission.release(route)

    def overstays(self, entry: Entry) -> bool:
        """Whether the message has gone without an answer for `message_timeout_s`, and others are
        answered meanwhile, so that no outage is the reason.

        A streamed answer that has come to its end is not cut off: it only waits for Kafka, and its
        set of records may be complete already.
        """
        if self._bounds.message_timeout_s is None or entry.first_called_s is None:
            return False
        stream = self._streaming.of(entry)
        if stream is not None and stream.completing:
            return False
        now_s = clock.now_s()
        age_s = now_s - entry.first_called_s
        return age_s >= self._bounds.message_timeout_s and others_succeed(
            now_s, self._admission.routes.last_success_s(entry.route)
        )
