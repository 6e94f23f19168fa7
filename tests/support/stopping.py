"""How long the service may take from SIGTERM to its end: what a grace period must cover."""

from __future__ import annotations

from service.kafka import sink
from service.kafka.client import deadlines, private
from service.kafka.group import committing
from service.kafka.sending import producers
from service.pipeline import commits
from service.settings import Settings
from service.telemetry import probes

CLOSING_S = 30.0
"""What the chart allows beyond drain and call; the bounds below must fit."""

BOUNDS_S = (
    commits.FINAL_COMMITS_S + committing.COMMIT_S,  # the last commits
    deadlines.STOP_S + private.ABANDON_S,  # leaving the group
    sink.FLUSH_TIMEOUT_S,
    producers.CLOSE_TIMEOUT_S,
    probes.CLOSE_S,
)


def longest_stop_s(settings: Settings) -> float:
    """The drain, a call that was let run into its own timeout, and closing."""
    return settings.delivery.drain_timeout_s + settings.extraction.call_timeout_s + sum(BOUNDS_S)
