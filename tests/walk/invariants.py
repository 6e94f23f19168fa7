"""What must be true of each worker whenever nothing is left to do at one moment."""

from __future__ import annotations

from collections.abc import Iterable

from tests.walk import inside
from tests.walk.loop import Violation
from tests.walk.worker import Worker


def check(workers: Iterable[Worker], now_s: float) -> None:
    for worker in workers:
        if worker.up and not worker.ended:
            if worker.hedges() or not inside.is_idle(worker.pipeline):
                _permits(worker)
                _waits(worker, now_s)
            _partitions(worker)


def _permits(worker: Worker) -> None:
    """A slot is taken for each call that runs, hedges included, and for nothing else."""
    calls = inside.calling(worker.pipeline)
    busy, hedges = inside.busy(worker.pipeline), worker.hedges()
    if busy != len(calls) + hedges:
        raise Violation(f"{busy} slots are taken by {len(calls)} calls and {hedges} hedges")
    for entry in calls:
        if entry.holding.lost:
            raise Violation(f"{entry.message.coordinates} is lost, and its call keeps its slot")
    if sum(worker.model.running.values()) > busy:
        raise Violation(f"{worker.model.running} run with {busy} slots")


def _waits(worker: Worker, now_s: float) -> None:
    """Nobody waits without somebody who will wake him, nor for longer than is promised."""
    for due_s, entry in inside.retries_due_s(worker.pipeline):
        if due_s - now_s > inside.RETRY_WAIT_MAX_S:
            at = entry.message.coordinates
            raise Violation(f"{at} is asked again in {due_s - now_s:.0f} s")
    for problem in (
        inside.sleeps_unwoken(worker.pipeline, now_s),
        inside.lanes_asleep(worker.pipeline),
    ):
        if problem is not None:
            raise Violation(problem)


def _partitions(worker: Worker) -> None:
    """What the group has given is held, on its way, or held out with a sentence."""
    consumer = inside.consumer_of(worker.source)
    if consumer is None:
        return
    forgotten = inside.forgotten(worker.source, consumer.given)
    if forgotten:
        raise Violation(f"{sorted(forgotten)} are given and forgotten")


FORCED_S = 45.0
"""From a forced stop to the end of the run: commits have bounds of their own."""


def check_end(worker: Worker) -> None:
    """A run that has ended has given everything back."""
    left = inside.left_over(worker.pipeline)
    if worker.model.running:
        left.append(f"calls of {dict(worker.model.running)}")
    if worker.up and worker.said is None:
        left += inside.sink_left_over(worker.sink)
        if worker.forced_at_s is not None:
            took_s = worker.pipeline_ended_at_s - worker.forced_at_s
            if took_s > FORCED_S:
                raise Violation(f"a forced stop took {took_s:.0f} s")
        elif worker.stopping:
            took_s = worker.pipeline_ended_at_s - worker.stopped_at_s
            delivery = worker.settings.delivery
            bound_s = delivery.drain_timeout_s + 5 * delivery.commit_interval_s + FORCED_S
            if took_s > bound_s:
                raise Violation(f"a stop took {took_s:.0f} s")
    if left:
        raise Violation(f"a worker has ended and not given back: {', '.join(left)}")
