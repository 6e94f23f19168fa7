"""Takes guards away and sees that a test fails: `python -m tests.mutations`.

Each row names a defect that readers of Kafka have had, the text in service/ that keeps it out,
what stands there without the guard, and tests of which one at least must fail then. They run in
a temporary copy of the checkout: first unchanged, where all must pass, then once for each row.

    python -m tests.mutations               all of them, in about five minutes
    python -m tests.mutations 18 suspect    those with this number, or this word in the defect

A few need a real Kafka: that of KAFKA_BOOTSTRAP_SERVERS, else one is started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.kafka import a_kafka

ROOT = Path(__file__).parent.parent

TEST_S = 60
"""A test that hangs without its guard has failed; with it none takes half as long."""

BOUNDED = "service/settings/bounded.py"
SECTIONS = "service/settings/sections.py"
ANSWERING = "service/pipeline/answering.py"
ASKING = "service/pipeline/asking.py"
BLAME = "service/pipeline/blame.py"
CALLS = "service/pipeline/calls.py"
COMMITS = "service/pipeline/commits.py"
INTAKE = "service/pipeline/intake.py"
OUTCOMES = "service/pipeline/outcomes.py"
PIPELINE = "service/pipeline/pipeline.py"
PROBING = "service/pipeline/probing.py"
PURSE = "service/pipeline/purse.py"
PUBLISHING = "service/pipeline/publishing.py"
STREAMED = "service/pipeline/streaming.py"
TASKS = "service/pipeline/tasks.py"
WINDOW = "service/core/window.py"
TRACKER = "service/core/tracker.py"
CIRCUIT = "service/core/admission/circuit.py"
RETRY = "service/core/admission/retry.py"
STARTS = "service/kafka/group/starts.py"
HOLDINGS = "service/kafka/group/holdings.py"
INSTANCES = "service/kafka/client/instances.py"
SOURCE = "service/kafka/source.py"
SINK = "service/kafka/sink.py"
SENDING = "service/kafka/sending/queues.py"
LEAN = "service/llm/lean.py"
SHAPES = "service/llm/shapes.py"
ANSWER_TEXT = "service/llm/answer_text.py"
MEMBERSHIP = "service/kafka/client/private.py"
TRANSACTIONS = "service/kafka/transactions/transactions.py"
WRITERS = "service/kafka/transactions/writer.py"
WATCHDOG = "service/kafka/group/watchdog.py"
STORED = "service/kafka/client/stored.py"
HEADERS = "service/kafka/headers.py"
COMMITTING = "service/kafka/group/committing.py"
MEMBER = "service/kafka/group/member.py"
TRAIL = "service/kafka/group/trail.py"
POSITIONS = "service/kafka/group/positions.py"
READING = "service/kafka/group/reading.py"
RESTORE = "service/kafka/group/restore.py"

WAY = "tests/pipeline/test_way.py::test_"
ADMISSION = "tests/pipeline/test_admission.py::test_"
STREAMING = "tests/pipeline/test_streaming.py::test_"
REBALANCE = "tests/pipeline/test_rebalance.py::test_"
SPEND = "tests/pipeline/test_spend.py::test_"
ROUTES = "tests/pipeline/test_routes.py::test_"
DIED = "tests/pipeline/test_process_died.py::test_"
SIMULATION = "tests/pipeline/test_simulation.py::test_"
UNIT_WINDOW = "tests/unit/test_window.py::test_"
UNIT_OFFSETS = "tests/unit/test_offsets.py::test_"
ROOM = "tests/unit/test_map_room.py::test_"
UNIT_TRANSACTIONS = "tests/unit/test_transactions.py::test_"
UNIT_STARTS = "tests/unit/test_starts.py::test_"
UNIT_HISTORY = "tests/unit/test_history.py::test_"
UNIT_EPOCHS = "tests/unit/test_epochs.py::test_"
UNIT_HOLDINGS = "tests/unit/test_holdings.py::test_"
CONTRACT = "tests/contract/test_source.py::test_"
CONTRACT_SINK = "tests/contract/test_sink.py::test_"
ONCE = "tests/contract/test_transactions.py::test_"
SUPERVISION = "tests/contract/test_supervision.py::test_"
LEAN_TESTS = "tests/contract/test_lean.py::test_"
MODEL = "tests/unit/test_hand_over_model.py::test_"
HAND_OVER = "tests/unit/test_hand_over.py::test_"
UNIT_FAILURES = "tests/unit/test_failures.py::test_"
EXTRACTOR_TESTS = "tests/contract/test_extractor.py::test_"
ASKING_TESTS = "tests/contract/test_asking.py::test_"
STREAMED_TESTS = "tests/contract/test_extractor_streaming.py::test_"
UNIT_ANSWER_TEXT = "tests/unit/test_answer_text.py::test_"
UNIT_DEPARTURES = "tests/unit/test_departures.py::test_"
UNIT_SENDING = "tests/unit/test_sending.py::test_"
UNIT_SETTINGS = "tests/unit/test_settings.py::test_"
UNIT_WATCHDOG = "tests/unit/test_watchdog.py::test_"


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old` stands exactly once in `file`; with `new` in its place one of `tests` fails."""

    defect: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TAKEN_AWAY = (
    Mutation(
        "1 a late acknowledgement commits a revoked partition",
        PUBLISHING,
        "acknowledged.exception()\n        if entry.holding.lost:\n            return\n",
        "acknowledged.exception()\n",
        (REBALANCE + "an_acknowledgement_in_the_moment_of_the_loss_marks_nothing",),
    ),
    Mutation(
        "1 a late commit is sent in the generation of another owner",
        COMMITTING,
        "if held != self._held_of(held):",
        "if False:",
        (CONTRACT + "a_commit_does_not_outlive_its_assignment[real_kafka]",),
    ),
    Mutation(
        "2 a batch that was fetched before a revoke is taken after it",
        WINDOW,
        "if holding is None or holding.epoch != message.epoch:",
        "if holding is None:",
        (REBALANCE + "a_batch_from_before_a_rebalance_is_not_taken_after_it",),
    ),
    Mutation(
        "2 a poll returns messages while a revoke waits for the ones before",
        SOURCE,
        "if not member.settled:",
        "if False:",
        (CONTRACT + "nothing_is_read_or_committed_until_it_is_known_whose_it_is[real_kafka]",),
    ),
    Mutation(
        "3 a commit that a rebalance refuses ends the run",
        COMMITS,
        "except CommitFailed:\n                return False",
        "except CommitFailed:\n                raise",
        (WAY + "a_refused_commit_is_made_good",),
    ),
    Mutation(
        "3 a commit that a rebalance refuses is an error that nobody expects",
        COMMITTING,
        "            raise _commit_failed(error) from error\n",
        "            raise\n",
        (CONTRACT + "a_refused_commit_is_neither_done_nor_an_end",),
    ),
    Mutation(
        "4 a member that drains polls no more",
        PIPELINE,
        "                await self._drain()\n",
        "                intake.cancel()\n                await self._drain()\n",
        (WAY + "a_drain_goes_on_polling_and_takes_nothing",),
    ),
    Mutation(
        "4 a drain takes what a poll under way returns",
        INTAKE,
        "            if self._phase.stopping:\n                # Messages that were let",
        "            if False:\n                # Messages that were let",
        (WAY + "a_drain_goes_on_polling_and_takes_nothing",),
    ),
    Mutation(
        "4 a member that polls no more keeps its partitions",
        MEMBERSHIP,
        "subscription._fetch_count = 0",
        "pass",
        (CONTRACT + "who_stops_polling_gives_its_partitions_up",),
    ),
    Mutation(
        "5 a revoke waits for a commit that waits for the group",
        COMMITTING,
        "await within(COMMIT_S, self._commit_while_held(partitions))",
        "await self._commit_while_held(partitions)",
        (CONTRACT + "a_commit_without_an_answer_fails_in_time[mock_kafka]",),
    ),
    Mutation(
        "5 a revoke waits for calls without end",
        PIPELINE,
        "            self._bounds.rebalance_drain_s,\n",
        "            None,\n",
        (REBALANCE + "the_wait_is_bounded",),
    ),
    Mutation(
        "6 an offset stored for a topic that was made again is believed",
        STARTS,
        "if then is not None and topic_id is not None and then != topic_id:",
        "if False:",
        (UNIT_STARTS + "an_offset_of_a_topic_made_again_is_not_believed",),
    ),
    Mutation(
        "6 a partition of a topic that was made again is kept",
        READING,
        "            and self._is_the_topic_it_was(partition.topic, topic_ids)\n",
        "",
        (UNIT_HOLDINGS + "a_partition_of_a_topic_made_again_is_not_kept",),
    ),
    Mutation(
        "6 a completed map counts from another offset than its own",
        STARTS,
        "    if found is None or found[0].next_offset != offset:\n",
        "    if found is None:\n",
        (UNIT_STARTS + "whoever_takes_a_partition_over_counts_his_own_end_in_advance",),
    ),
    Mutation(
        "7 a new group that is idle forgets at a rebalance where it began",
        RESTORE,
        "if marks and self._holdings.unrestored is given:",
        "if False:",
        (UNIT_HOLDINGS + "idle_rebalances_leave_the_offset_where_it_is",),
    ),
    Mutation(
        "7 whoever takes a partition over moves its offset before reading",
        TRACKER,
        "self._position = next_offset\n",
        "self._position = next_offset + 1\n",
        (UNIT_OFFSETS + "next_offset_is_the_smallest_unfinished_delivered_one",),
    ),
    Mutation(
        "8 a refused commit is taken for done",
        COMMITS,
        "except CommitFailed:\n                return False",
        "except CommitFailed:\n                return True",
        (WAY + "a_last_commit_that_fails_is_said",),
    ),
    Mutation(
        "8 a commit that was sent counts as stored",
        HOLDINGS,
        "        holding.attempt(stored, progress)\n",
        "        holding.attempt(stored, progress)\n        self.stored(partition, stored)\n",
        (CONTRACT + "a_refused_commit_is_neither_done_nor_an_end",),
    ),
    Mutation(
        "9 a close skips the last commit",
        PIPELINE,
        "committed = await self._commits.finally_()",
        "committed = True",
        (WAY + "stop_lets_go_of_what_costs_nothing",),
    ),
    Mutation(
        "9 a close commits what it lets go of",
        WINDOW,
        "                    self._remove(entry)\n                else:",
        "                    holding.tracker.finish(entry.message.offset)\n"
        "                    self._remove(entry)\n                else:",
        (WAY + "stop_lets_go_of_what_costs_nothing",),
    ),
    Mutation(
        "9 a close does not wait for acknowledgements",
        PIPELINE,
        "lambda: self._phase.forced or not self._window.messages, ",
        "lambda: self._phase.forced or not self._window.calling, ",
        (WAY + "stop_waits_for_acknowledgements",),
    ),
    Mutation(
        "9 last commits that are refused wait for the commit interval",
        COMMITS,
        "await self._conditions.until(lambda: self._phase.forced, COMMIT_AGAIN_S)",
        "await self._conditions.until(lambda: self._phase.forced, self._interval_s)",
        (WAY + "last_commits_do_not_wait_for_the_commit_interval",),
    ),
    Mutation(
        "9 a second signal waits for last commits",
        COMMITS,
        "await self._conditions.until(lambda: self._phase.forced, COMMIT_AGAIN_S)",
        "await self._conditions.until(lambda: False, COMMIT_AGAIN_S)",
        (
            WAY + "a_forced_stop_tries_one_commit_and_does_not_wait",
            WAY + "a_second_signal_ends_the_last_commits",
        ),
    ),
    Mutation(
        "9 a message that runs alone waits for the commit interval",
        ASKING,
        "            await asyncio.sleep(COMMIT_AGAIN_S)\n",
        "            await asyncio.sleep(self._bounds.commit_interval_s)\n",
        (DIED + "a_suspect_does_not_wait_for_the_commit_interval",),
    ),
    Mutation(
        "10 the queue of retries is unbounded",
        INTAKE,
        "room = self._bounds.window - self._window.messages",
        "waiting = len(self._window._retries)\n"
        "        room = max(0, self._bounds.window - self._window.messages + waiting)",
        (WAY + "waiting_retries_stay_within_the_window",),
    ),
    Mutation(
        "11 a slot is lost with the partition of its call",
        CALLS,
        "        self._admission.release(turn.estimate.route)\n",
        "        if not entry.holding.lost:\n"
        "            self._admission.release(turn.estimate.route)\n",
        (REBALANCE + "slots_are_whole_after_many_rebalances",),
    ),
    Mutation(
        "11 a slot is lost with a call that was called off before its first step",
        CALLS,
        "        if self._turns.get(entry) is turn:  # `_call` has never begun",
        "        if False:  # `_call` has never begun",
        (
            REBALANCE + "a_call_that_is_called_off_before_it_begins_gives_its_slot_back",
            REBALANCE + "a_suspect_that_is_called_off_before_it_begins_lets_others_run",
        ),
    ),
    Mutation(
        "11 a probe that was called off before its first step counts as out",
        PROBING,
        "            del self._running[route]\n"
        "            self._admission.routes.probe_cancelled(route)\n",
        "            del self._running[route]\n",
        (ADMISSION + "a_probe_that_never_begins_is_told_to_the_circuit",),
    ),
    Mutation(
        "11 two probes at once",
        PROBING,
        "if wait_s is None or route in self._running:",
        "if wait_s is None:",
        (ADMISSION + "one_probe_at_a_time_where_the_circuit_has_closed_and_opened_beside_it",),
    ),
    Mutation(
        "11 an older call's failure is taken for the answer to a probe",
        BLAME,
        "if not failure.shared and (a_try or not self._admission.routes.probe_is_out(route)):",
        "if not failure.shared:",
        (ADMISSION + "one_probe_at_a_time_whatever_older_calls_come_to",),
    ),
    Mutation(
        "14 a text that is refused alone is everybody's fault",
        BLAME,
        "        if found.its_own:\n",
        "        if False:\n",
        (ROUTES + "one_text_that_is_asked_to_wait_is_found_where_others_fail_now_and_then",),
    ),
    Mutation(
        "14 each Retry-After of a text that is refused alone is everybody's",
        BLAME,
        "if failure.reason in OVERLOAD and not found.others_go_through:",
        "if failure.reason in OVERLOAD:",
        (ROUTES + "one_text_that_is_asked_to_wait_makes_the_others_wait_once",),
    ),
    Mutation(
        "14 a Retry-After is everybody's only the first time, although its text alone was asked",
        "service/core/admission/suspicion.py",
        "return self.others_answered > 0 and self.others_failed == 0",
        "return self.failures > 1 and self.others_failed == 0",
        (
            "tests/unit/test_suspicion.py::test_others_go_through_where_they_are_answered_and_none_fails",
        ),
    ),
    Mutation(
        "14 a Retry-After is the message's alone although others fail too",
        "service/core/admission/suspicion.py",
        "return self.others_answered > 0 and self.others_failed == 0",
        "return self.others_answered > 0",
        (
            "tests/unit/test_suspicion.py::test_others_go_through_where_they_are_answered_and_none_fails",
        ),
    ),
    Mutation(
        "14 a Retry-After that everybody is told holds nobody else, so that it is ignored alone",
        BLAME,
        "if failure.reason in OVERLOAD and not found.others_go_through:",
        "if False:",
        (ROUTES + "a_provider_that_asks_everybody_to_wait_is_obeyed_each_time",),
    ),
    Mutation(
        "14 what was under way at the first failure speaks for the others, not for it alone",
        "service/core/admission/route.py",
        "return Suspicion(name, since, since)",
        "return Suspicion(name, since, now)",
        (
            "tests/unit/test_suspicion.py"
            "::test_calls_that_began_after_its_first_failure_go_through_however_long_they_last",
        ),
    ),
    Mutation(
        "14 what a message's own refusals have taught of the route stays",
        BLAME,
        "            self._admission.routes.take_back(route, entry.untroubled)\n",
        "",
        (ROUTES + "one_poisoned_text_slows_nobody",),
    ),
    Mutation(
        "14 a message that is turned away by chance is rejected",
        BLAME,
        "return entry.suspicion is not None and entry.suspicion.certain",
        "return True",
        (ROUTES + "a_crowded_provider_rejects_nobody",),
    ),
    Mutation(
        "14 a count alone exhausts messages where calls fail at random",
        BLAME,
        "if entry.suspicion is not None and entry.suspicion.may_be_chance:",
        "if False:",
        (ROUTES + "failures_at_random_reject_nobody_and_the_poison_among_them",),
    ),
    Mutation(
        "14 an unknown refusal of a route that never answered does not stop intake",
        BLAME,
        "known = not unclear or self._admission.routes.last_success_s(route) is None",
        "known = not unclear",
        (ROUTES + "an_unknown_refusal_before_the_first_success_stops_intake",),
    ),
    Mutation(
        "14 nobody is asked whether a text that is alone is refused alone",
        BLAME,
        "        return self._admission.routes.nobody_else(entry.suspicion)\n",
        "        return False\n",
        (ROUTES + "a_poisoned_text_alone_is_found_by_probes",),
    ),
    Mutation(
        "14 a guardrail that refuses the probe's text keeps everybody out",
        CIRCUIT,
        "return (self.tries + 1) % MESSAGE_EVERY == 0",
        "return False",
        (ROUTES + "an_unknown_refusal_before_the_first_success_stops_intake",),
    ),
    Mutation(
        "14 what waits for a second model stops what needs the first alone",
        CALLS,
        "while (entry := self._window.next_queued(self._holds)) is not None:",
        "while not self._holds and (entry := self._window.next_queued()) is not None:",
        (ROUTES + "what_a_second_model_refuses_stops_nobody_else",),
    ),
    Mutation(
        "14 what was spent is forgotten by whoever takes a partition over",
        PIPELINE,
        "        self._purse.reassigned(before)\n",
        "",
        (SPEND + "workers_that_start_together_or_later_keep_the_limit",),
    ),
    Mutation(
        "14 each cost goes onto any account, so that divided ones exceed their part",
        PURSE,
        "min(self._window.held.values(), key=lambda each: total_usd(each.spent))",
        "next(iter(self._window.held.values()))",
        (SPEND + "workers_that_start_together_or_later_keep_the_limit",),
    ),
    Mutation(
        "14 what was spent does not travel with the offset",
        "service/kafka/client/stored.py",
        '        ("s", accounts.written(progress.spent)),\n',
        "",
        (SPEND + "the_commit_has_it_and_says_nothing_where_nothing_was_spent",),
    ),
    Mutation(
        "11 what a run that is ending starts is an error of its own",
        TASKS,
        "        except RuntimeError:\n            coroutine.close()\n            return None\n",
        "        except ZeroDivisionError:\n            return None\n",
        (WAY + "nothing_is_started_in_the_moment_in_which_a_bug_ends_the_run",),
    ),
    Mutation(
        "12 markers behind the last message hold the next offset back",
        TRACKER,
        "return max(self._position, self.last_delivered + 1)",
        "return self.last_delivered + 1",
        (UNIT_OFFSETS + "the_position_steps_over_markers", WAY + "holes_do_not_hold_the_commit"),
    ),
    Mutation(
        "12 offsets that are never delivered count as unfinished",
        TRACKER,
        "for offset in self._unfinished:",
        "for offset in self._unfinished and range(self.next_offset, map_end):",
        (UNIT_OFFSETS + "holes_count_as_finished_in_the_map",),
    ),
    Mutation(
        "13 a kept partition that is fetched again is taken again, behind what came after",
        TRACKER,
        "if offset <= self.last_delivered:",
        "if False:",
        (REBALANCE + "a_kept_partition_keeps_its_running_call",),
    ),
    Mutation(
        "13 a partition is read on from where the client left it",
        POSITIONS,
        "        self._consumer.seek(TopicPartition(*partition), holding.next)\n",
        "",
        (UNIT_HOLDINGS + "the_same_member_in_the_next_generation_keeps_its_partition",),
    ),
    Mutation(
        "14 attempts of before a revoke count",
        WINDOW,
        "if partition not in given or given[partition].epoch != holding.epoch",
        "if partition not in given",
        (REBALANCE + "attempts_count_for_one_holder",),
    ),
    Mutation(
        "14 a Retry-After of a day is waited for a day",
        RETRY,
        "return min(retry_after_s, RETRY_AFTER_MAX_S)",
        "return retry_after_s",
        (ADMISSION + "a_retry_after_of_a_day_is_asked_again_after_the_cap",),
    ),
    Mutation(
        "14 a provider that is back makes a retry later",
        WINDOW,
        "(min(due_s, max(now_s, entry.not_before_s)), number, entry)",
        "(max(min(due_s, now_s), entry.not_before_s), number, entry)",
        (UNIT_WINDOW + "a_wake_makes_no_retry_later",),
    ),
    Mutation(
        "14 a second call's answer is dropped where the first found no room",
        OUTCOMES,
        "    if not isinstance(other, CallFailure):\n        return other\n",
        "    if not isinstance(other, CallFailure):\n"
        "        return one if isinstance(one, NoRoom) else other\n",
        (ADMISSION + "a_second_call_is_answered_where_the_first_found_no_room",),
    ),
    Mutation(
        "14 of two calls the answers of one are paid for again",
        OUTCOMES,
        "further = one if _calls(one.provenance) > _calls(other.provenance) else other",
        "further = other",
        (ADMISSION + "of_two_calls_without_an_answer_the_better_progress_is_kept",),
    ),
    Mutation(
        "14 the other one of two calls costs nothing",
        ASKING,
        "        entry.beside_usd += beside_usd\n        if beside_usd > 0:\n",
        "        if False:\n",
        (
            ADMISSION + "a_second_call_is_answered_where_the_first_found_no_room",
            ADMISSION + "a_slow_call_is_made_a_second_time_and_both_are_paid_for",
        ),
    ),
    Mutation(
        "14 a call that was cut off is no attempt",
        ASKING,
        "for each in known) + called_off\n",
        "for each in known)\n",
        (ADMISSION + "a_dead_letter_counts_calls_that_were_cut_off",),
    ),
    Mutation(
        "14 a message that takes too long does not wait in the retry topic",
        ANSWERING,
        "return self._postponed(entry) or overstayed(",
        "return overstayed(",
        (ADMISSION + "a_message_that_takes_too_long_waits_in_the_retry_topic",),
    ),
    Mutation(
        "14 a set whose call is cut off is not closed",
        ASKING,
        "        if cut_off and stream is not None:\n",
        "        if False:\n",
        (STREAMING + "a_message_that_is_cut_off_closes_its_set",),
    ),
    Mutation(
        "14 a set that is cut off holds its message for as long as Kafka is down",
        STREAMED,
        "            async with asyncio.timeout(CLOSE_S):\n",
        "            async with asyncio.timeout(None):\n",
        (STREAMING + "a_message_that_is_cut_off_while_kafka_is_down_ends_all_the_same",),
    ),
    Mutation(
        "14 an answer that is complete is cut off while Kafka takes it",
        ASKING,
        "        if stream is not None and stream.completing:\n",
        "        if False:\n",
        (STREAMING + "an_answer_that_waits_for_kafka_only_is_not_cut_off",),
    ),
    Mutation(
        "15 a dead letter that cannot be published counts as finished",
        PUBLISHING,
        "                self._not_published(entry, failure)\n",
        "                self._finish(entry)\n",
        (WAY + "a_dead_letter_that_cannot_be_published_holds_its_offset",),
    ),
    Mutation(
        "15 a dead letter that fits nowhere is dropped",
        SINK,
        'raise PublishFailed(f"a dead letter of {size} bytes does not fit topic {topic}")',
        "return []",
        (CONTRACT_SINK + "a_dead_letter_shrinks_and_then_is_held",),
    ),
    Mutation(
        "16 a partition that was closed for its map stays closed",
        WINDOW,
        "self.map_fullness = fullness(",
        "self.map_fullness = self.map_fullness or fullness(",
        (UNIT_WINDOW + "a_crowded_map_closes_its_partition_until_it_fits_again",),
    ),
    Mutation(
        "16 a circuit that has opened stays open",
        CIRCUIT,
        "        self.state, self.reason = CircuitState.CLOSED, None\n",
        "        self.reason = None\n",
        (WAY + "an_outage_rejects_nothing",),
    ),
    Mutation(
        "16 an open circuit asks nobody whether the provider is back",
        PROBING,
        "            if wait_s > 0.0:\n",
        "            if True:\n",
        (WAY + "poison_alone_does_not_keep_the_others_out",),
    ),
    Mutation(
        "16 a drain with an open circuit asks nobody whether the provider is back",
        PROBING,
        "            if self._phase.draining and not self._window.waits_for_a_call:\n",
        "            if self._phase.draining:\n",
        (ADMISSION + "a_drain_asks_whether_the_provider_is_back",),
    ),
    Mutation(
        "16 a drain with an open circuit asks without end",
        PROBING,
        "                continue  # the end of a running call calls `admit` again\n",
        "                return now_s + wait_s\n",
        (ADMISSION + "a_drain_sends_no_probe_that_nobody_waits_for",),
    ),
    Mutation(
        "16 intake that a revoke has stopped does not go on",
        PIPELINE,
        "        self._phase.hold()\n",
        "",
        (REBALANCE + "a_kept_partition_keeps_its_running_call",),
    ),
    Mutation(
        "16 the client's pause of the restore does not end",
        POSITIONS,
        "        self._consumer.resume(TopicPartition(*partition))\n",
        "",
        (UNIT_HOLDINGS + "the_same_member_in_the_next_generation_keeps_its_partition",),
    ),
    Mutation(
        "16 while the window is full nothing polls, and the group takes its member for dead",
        INTAKE,
        "await self._conditions.until(lambda: self._room() > 0, IDLE_TURN_S)",
        "await self._conditions.until(lambda: self._room() > 0)",
        (WAY + "the_window_bounds_what_is_taken",),
    ),
    Mutation(
        "17 a message that waits for another attempt holds its slot",
        ASKING,
        "        except CallFailure as failure:\n            return failure",
        "        except CallFailure as failure:\n"
        "            await asyncio.sleep(1)\n"
        "            return failure",
        (WAY + "a_waiting_retry_holds_no_slot",),
    ),
    Mutation(
        "18 a partition is kept under another member id",
        READING,
        "if (before.member_id, before.generation + 1) != (given.member_id, given.generation):",
        "if before.generation + 1 != given.generation:",
        (UNIT_HOLDINGS + "a_partition_that_another_may_have_had_starts_anew",),
    ),
    Mutation(
        "19 a partition is kept although a generation was missed",
        READING,
        "if (before.member_id, before.generation + 1) != (given.member_id, given.generation):",
        "if before.member_id != given.member_id:",
        (UNIT_HOLDINGS + "a_partition_that_another_may_have_had_starts_anew",),
    ),
    Mutation(
        "20 a partition is kept although another process has stored its offset",
        READING,
        "ours[each] for each in ours if ours[each].wrote(stored[each])",
        "ours[each] for each in ours",
        (UNIT_HOLDINGS + "a_partition_that_another_may_have_had_starts_anew",),
    ),
    Mutation(
        "20 an offset counts as ours whatever its metadata says",
        HOLDINGS,
        "return stored == self.stored or stored in self.attempted",
        "return stored is not None and stored.offset == self.stored.offset",
        (UNIT_HOLDINGS + "a_partition_that_another_may_have_had_starts_anew",),
    ),
    Mutation(
        "18-20 a member that stood still goes on with what it had",
        READING,
        "kept = {each: ours[each] for each in ours if ours[each].wrote(stored[each])}",
        "kept = dict(self._before.holdings) if self._before else {}",
        (CONTRACT + "a_member_that_stood_still_holds_nothing_of_before",),
    ),
    Mutation(
        "21 calls start before the restore has ended",
        CALLS,
        "if not self._tasks.is_open or not self._phase.may_call:",
        "if not self._tasks.is_open:",
        (REBALANCE + "calls_in_flight_are_waited_for_and_committed",),
    ),
    Mutation(
        "21 messages are fetched before the restore has ended",
        MEMBER,
        "        self._consumer.pause(*partitions)  # until it is known from where to fetch\n",
        "",
        (UNIT_HOLDINGS + "nothing_is_held_before_its_restore",),
    ),
    Mutation(
        "21 a slow restore holds what was revoked meanwhile",
        RESTORE,
        "if self._holdings.unrestored is given and not self._membership.reassigning:",
        "if True:",
        (HAND_OVER + "a_restore_that_is_overtaken_behind_its_read_holds_nothing",),
    ),
    Mutation(
        "21 the answer to a call that was cut off is taken for the next one's",
        LEAN,
        "        whole = False\n",
        "        whole = True\n",
        (LEAN_TESTS + "a_connection_whose_call_was_cut_off_is_not_used_again",),
    ),
    Mutation(
        "21 the rest of a request is taken for the next one's beginning",
        LEAN,
        "whole = ended and not _has_unsent(connection.protocol)",
        "whole = ended",
        (LEAN_TESTS + "an_answer_before_the_whole_request_ends_its_connection",),
    ),
    Mutation(
        "21 a topic that has to be looked up holds up the others",
        SENDING,
        "if not producer.knows(each)",
        "if False",
        (UNIT_DEPARTURES + "what_has_to_be_looked_up_holds_up_nobody_else",),
    ),
    Mutation(
        "9 a worker that was put out by its name puts the other out",
        MEMBER,
        "if not self.membership.member_id and await self.name.is_put_out():",
        "if False:",
        (UNIT_HOLDINGS + "whoever_is_put_out_by_his_name_does_not_join_again",),
    ),
    Mutation(
        "9 whoever is put out while it joins joins again",
        MEMBERSHIP,
        "if pending is not None and FencedInstanceIdError.__name__ in str(pending):",
        "if False:",
        (
            "tests/unit/test_membership.py::"
            "test_whoever_is_put_out_while_it_joins_hears_why_and_does_not_join_again",
        ),
    ),
    Mutation(
        "9 being put out counts as a death",
        STARTS,
        "lived_on = has_lived_on(mark.bearer, own)",
        "lived_on = False",
        (UNIT_STARTS + "being_put_out_by_another_of_the_same_name_is_no_death",),
    ),
    Mutation(
        "9 a death does not count where workers have names",
        INSTANCES,
        "return former.host != own.host or former.lives_beside(own)",
        "return True",
        (UNIT_STARTS + "being_put_out_by_another_of_the_same_name_is_no_death",),
    ),
    Mutation(
        "9 a second worker of a name begins beside the first",
        INSTANCES,
        "began(self.pid) == self.began",
        "False",
        (UNIT_HOLDINGS + "a_name_is_free_once_nobody_runs_who_bears_it",),
    ),
    Mutation(
        "21 what stands behind a failed message in another partition goes first",
        SENDING,
        "while failed and isinstance(error, PublishFailed):",
        "while False:",
        (UNIT_SENDING + "what_stands_behind_a_failed_one_in_another_partition_fails_with_it",),
    ),
    Mutation(
        "21 only the next queue is looked at, not the one behind it",
        SENDING,
        "failed = dict.fromkeys(chain(*(q.behind(failed) for q in self._queues.values())))",
        "failed, before = {}, failed\n"
        "            for each in chain(*(q.behind(before) for q in self._queues.values())):\n"
        "                each.fail(error)",
        (UNIT_SENDING + "it_goes_on_from_queue_to_queue",),
    ),
    Mutation(
        "21 a dead letter that is too large lets its lane's next one pass",
        SENDING,
        "self._fail([batch[0].handover], failure)",
        "batch[0].handover.fail(failure)",
        (UNIT_SENDING + "a_dead_letter_that_is_refused_for_its_size_keeps_its_place",),
    ),
    Mutation(
        "21 a streamed record goes before one of its message that has failed",
        "service/pipeline/record_stream.py",
        "while any(_has_failed(future) for _, future in self._unacknowledged):",
        "while False:",
        ("tests/unit/test_streams.py::test_what_has_failed_goes_before_the_next_piece",),
    ),
    Mutation(
        "21 the queues do not know which messages share a lane",
        SINK,
        "self._failures.lane(message) or message.coordinates",
        "message.coordinates",
        (CONTRACT_SINK + "no_order_changes_where_records_have_keys_of_their_own[mock]",),
    ),
    Mutation(
        "22 the call of a lost partition goes on",
        TASKS,
        "            if holding in lost:\n                task.cancel()\n",
        "            if holding in lost:\n                pass\n",
        (REBALANCE + "a_late_outcome_of_a_lost_partition_goes_nowhere",),
    ),
    Mutation(
        "22 an outcome that waits for a broker is published after the loss",
        PIPELINE,
        "        self._publishing.withdraw(lost)\n",
        "",
        (REBALANCE + "what_was_handed_over_is_withdrawn_with_its_partition",),
    ),
    Mutation(
        "22 an outcome that waits for another send is published after the loss",
        PUBLISHING,
        "if holding.lost or not self._phase.may_publish:",
        "if not self._phase.may_publish:",
        (REBALANCE + "a_resting_lane_is_lost_with_its_partition",),
    ),
    Mutation(
        "22 an outcome is published while nobody knows whose it is",
        PUBLISHING,
        "if holding.lost or not self._phase.may_publish:",
        "if holding.lost:",
        (REBALANCE + "nothing_is_published_between_revoke_and_assignment",),
    ),
    Mutation(
        "23 a holder that dies before it has finished anything is not counted",
        STARTS,
        "return progress if counted else replace(",
        "return progress if True else replace(",
        (UNIT_HOLDINGS + "the_end_of_a_holder_is_counted_before_he_holds",),
    ),
    Mutation(
        "23 the mark of an unclean end stands only in memory",
        RESTORE,
        "if marks and self._holdings.unrestored is given:",
        "if False:",
        (UNIT_HOLDINGS + "the_end_of_a_holder_is_counted_before_he_holds",),
    ),
    Mutation(
        "23 an end in order counts as unclean",
        WINDOW,
        "unclean_ends = max(0, self.given.unclean_ends - clean)",
        "unclean_ends = self.given.unclean_ends",
        (DIED + "ends_in_order_are_no_deaths",),
    ),
    Mutation(
        "24 others start beside a suspect",
        CALLS,
        "return self._alone is None and not (entry.alone and self._window.calling)",
        "return not (entry.alone and self._window.calling)",
        (DIED + "suspects_run_one_at_a_time_and_nothing_beside_them",),
    ),
    Mutation(
        "24 a suspect starts beside others",
        CALLS,
        "return self._alone is None and not (entry.alone and self._window.calling)",
        "return self._alone is None",
        (DIED + "a_suspect_waits_for_the_calls_that_run",),
    ),
    Mutation(
        "24 a suspect starts before Kafka knows of it",
        ASKING,
        "        await self._mark_alone(entry, entry.message.offset)\n",
        "",
        (DIED + "a_suspect_waits_until_kafka_knows_that_it_runs",),
    ),
    Mutation(
        "25 a partition whose map is nearly full takes more",
        INTAKE,
        "await self._source.poll(limit, self._window.crowded())",
        "await self._source.poll(limit, frozenset())",
        (WAY + "a_crowded_map_closes_its_partition_and_no_other",),
    ),
    Mutation(
        "25 a map has lost its end by the time its partition is closed",
        WINDOW,
        "self.map_fullness + unfinished / MAP_BITS >= MAP_FULL",
        "self.map_fullness + unfinished / MAP_BITS >= 1.6",
        (UNIT_WINDOW + "a_partition_is_closed_while_its_map_is_still_whole",),
    ),
    Mutation(
        "25 what is out overfills a map that was measured when nothing had finished",
        WINDOW,
        "self.map_fullness + unfinished / MAP_BITS >= MAP_FULL",
        "self.map_fullness >= MAP_FULL",
        (
            UNIT_WINDOW
            + "a_partition_is_closed_before_its_unfinished_messages_could_overfill_the_map",
        ),
    ),
    Mutation(
        "25 a partition whose map an earlier holder has filled is closed for ever",
        WINDOW,
        "return unfinished > 0 and",
        "return",
        (UNIT_WINDOW + "a_partition_with_nothing_unfinished_is_never_crowded",),
    ),
    Mutation(
        "25 a map is measured once a commit interval, in which the window fills many times",
        WINDOW,
        ">= MEASURE_AGAIN:",
        ">= 10**9:",
        (UNIT_WINDOW + "a_map_is_measured_again_where_much_has_changed",),
    ),
    Mutation(
        "25 behind one held message every finished one is remembered",
        TRACKER,
        "            del self._unfinished[offset]\n",
        "            assert self._unfinished[offset] >= 0\n",
        (UNIT_OFFSETS + "behind_one_message_any_number_may_finish",),
    ),
    Mutation(
        "25 each message taken makes the map longer by the hole before it",
        TRACKER,
        "            if offset >= map_end:\n                break\n",
        "            map_end = max(map_end, offset)\n",
        (UNIT_OFFSETS + "the_map_ends_with_the_last_finished_offset",),
    ),
    Mutation(
        "30 a partition is kept behind the fence that has dropped its commit in doubt",
        "service/kafka/group/reading.py",
        "            given.anew.update(unfenced)\n",
        "",
        (HAND_OVER + "a_commit_in_doubt_is_not_forgotten_by_its_fence",),
    ),
    Mutation(
        "30 a fenced partition that is then held out keeps its messages in the window",
        RESTORE,
        "        if first or given_now != self._told:\n",
        "        new = any(self._told.get(each) != at for each, at in given_now.items())\n"
        "        if first or new:\n",
        (HAND_OVER + "a_fenced_partition_that_is_then_held_out_leaves_the_pipeline",),
    ),
    Mutation(
        "25 exactly once: what the map cannot hold goes into a transaction all the same",
        HOLDINGS,
        "            return len(offsets)\n        fits,",
        "            return len(offsets)\n        return len(offsets)\n        fits,",
        (ROOM + "whatever_is_committed_is_in_the_map_and_everything_finishes",),
    ),
    Mutation(
        "25 exactly once: the message that holds the next offset waits for room as others do",
        HOLDINGS,
        "                or offsets[count - 1] < progress.next_offset\n",
        "",
        (ROOM + "an_earlier_map_that_is_too_large_stops_nobody",),
    ),
    Mutation(
        "25 exactly once: outcomes without outputs finish beside a map that is full",
        SINK,
        "if not outputs and self._has_room(message):",
        "if not outputs:",
        (ROOM + "an_outcome_without_outputs_needs_room_in_the_map_too",),
    ),
    Mutation(
        "25 exactly once: what waits for room waits for ever",
        WRITERS,
        "asyncio.timeout(HELD_BACK_S)",
        "asyncio.timeout(None)",
        (ROOM + "nobody_waits_for_room_for_ever",),
    ),
    Mutation(
        "25 exactly once: what was held back goes only when something else comes",
        "service/kafka/transactions/outbox.py",
        "return bool(self._queue) or self._went",
        "return bool(self._queue)",
        (UNIT_TRANSACTIONS + "what_has_no_room_is_held_back_and_the_lowest_offsets_go_first",),
    ),
    Mutation(
        "25 exactly once: what is held back is overtaken within its lane",
        "service/kafka/transactions/outbox.py",
        "sorted(taken, key=_offset)",
        "taken",
        (UNIT_TRANSACTIONS + "what_has_no_room_is_held_back_and_the_lowest_offsets_go_first",),
    ),
    Mutation(
        "26 the next holder's first commit drops the map of what it has not read yet",
        TRACKER,
        "            if before.stop > beyond:",
        "            if False:",
        (UNIT_OFFSETS + "the_next_holder_goes_on_with_what_is_not_finished",),
    ),
    Mutation(
        "26 what an earlier holder has finished is called again",
        TRACKER,
        "if before and offset in before[0]:",
        "if False:",
        (SIMULATION + "a_crash_repeats_only_what_no_map_held",),
    ),
    Mutation(
        "27 a message is let go that a paid answer of its lane waits for",
        WINDOW,
        "if waits and entry.lane not in needed:",
        "if waits:",
        (WAY + "stop_finishes_a_retry_that_paid_answers_of_its_lane_wait_for",),
    ),
    Mutation(
        "28 an outcome goes into a transaction before the restore has ended",
        TRANSACTIONS,
        "if writer is not None and self._ledger.takes(partition):",
        "if writer is not None:",
        (ONCE + "nothing_is_taken_before_the_restore_has_ended",),
    ),
    Mutation(
        "28 a fence leaves in the queue what is of an older assignment",
        WRITERS,
        "if self.lost or self._outbox or self._producer is None:",
        "if self.lost or self._producer is None:",
        (ONCE + "a_fence_withdraws_what_was_queued",),
    ),
    Mutation(
        "28 the ledger is asked for what a restore has withdrawn",
        WRITERS,
        "        self._see_that_all_stands()\n        offsets =",
        "        offsets =",
        (ONCE + "the_ledger_is_not_asked_for_what_was_withdrawn",),
    ),
    Mutation(
        "28 what is withdrawn in the last moment is committed",
        WRITERS,
        "        self._see_that_all_stands()\n        self._attempted =",
        "        self._attempted =",
        (ONCE + "what_is_withdrawn_is_not_published",),
    ),
    Mutation(
        "29 a commit that arrived without an answer is published again",
        WRITERS,
        "if attempted is not None and found == attempted:",
        "if False:",
        (ONCE + "a_commit_without_an_answer_is_settled",),
    ),
    Mutation(
        "29 what another owner has committed in between goes unseen",
        WRITERS,
        "return Became.NOT_COMMITTED if found == known else Became.ANOTHER",
        "return Became.NOT_COMMITTED",
        (
            ONCE + "another_owner_in_between_ends_the_doubt",
            MODEL + "no_order_of_steps_breaks_the_hand_over",
        ),
    ),
    Mutation(
        "29 an epoch is taken for a partition that another holds",
        WRITERS,
        "if context.ledger.to_store(self._partition, frozenset()) is None:",
        "if False:",
        (ONCE + "without_the_partition_no_epoch_is_taken",),
    ),
    Mutation(
        "30 what Kafka holds is read before the older producer is fenced",
        READING,
        "            if not unfenced:\n                stable = await",
        "            if True:\n                stable = await",
        (SUPERVISION + "a_mark_in_doubt_is_fenced_before_it_is_made_again",),
    ),
    Mutation(
        "30 a mark in doubt is made again without a fence",
        RESTORE,
        "        given.fenced.difference_update(marks)\n",
        "",
        (SUPERVISION + "a_mark_in_doubt_is_fenced_before_it_is_made_again",),
    ),
    Mutation(
        "70 an older worker drops what a newer one has stored besides",
        STORED,
        "for other in mark.others.true_of(progress.next_offset):",
        "for other in ():",
        (
            UNIT_STARTS + "fields_of_a_later_version_are_passed_over_and_kept",
            UNIT_HOLDINGS + "what_a_newer_version_stores_is_kept",
        ),
    ),
    Mutation(
        "71 fields of others take the map's part",
        STORED,
        "if len(metadata) + len(other) < FIELDS_CHARS_MAX:",
        "if len(metadata) + len(other) < METADATA_CHARS_MAX:",
        (UNIT_STARTS + "the_map_keeps_its_part_whatever_others_store",),
    ),
    Mutation(
        "72 what was true of one offset is stored beside the next",
        STORED,
        "moved = next_offset != self.at",
        "moved = False",
        (UNIT_STARTS + "only_what_stays_true_is_kept_at_another_offset",),
    ),
    Mutation(
        "73 a log that was cut is read on once it has grown again",
        STARTS,
        "ends = [] if mark is None or mark.cut_at is None else [mark.cut_at]",
        "ends: list[int] = []",
        (UNIT_STARTS + "a_log_that_was_cut_stays_held_out",),
    ),
    Mutation(
        "73 whoever sees a cut reads on once the log has grown again",
        POSITIONS,
        "if holding.next > found.end or holding.cut_at is not None:",
        "if holding.next > found.end:",
        (UNIT_HOLDINGS + "a_log_that_was_cut_is_not_read_on_when_it_has_grown",),
    ),
    Mutation(
        "73 a rebalance forgets that a log was cut",
        POSITIONS,
        "        if holding.cut_at is not None:\n            self.unreadable",
        "        if False:\n            self.unreadable",
        (UNIT_HOLDINGS + "a_log_that_was_cut_is_not_read_on_when_it_has_grown",),
    ),
    Mutation(
        "73 a cut that a reader finds is not stored",
        POSITIONS,
        "        await self._store_traces()\n",
        "",
        (UNIT_HOLDINGS + "a_log_that_was_cut_is_not_read_on_when_it_has_grown",),
    ),
    Mutation(
        "73 a cut that a start finds is not stored",
        RESTORE,
        "        marks |= self._traces(held_out, stored)\n",
        "",
        (UNIT_HOLDINGS + "a_cut_that_a_start_finds_is_stored",),
    ),
    Mutation(
        "73 a cut whose trace could not be stored is forgotten",
        RESTORE,
        "            if at is None or each not in self._remembered.cuts\n",
        "            if True\n",
        (UNIT_HOLDINGS + "a_cut_whose_trace_could_not_be_stored_is_not_forgotten",),
    ),
    Mutation(
        "73 a map that reaches beyond the log's end hides new messages",
        STARTS,
        "finished = reached(progress)",
        "finished = stored.offset",
        (UNIT_STARTS + "a_map_beyond_the_end_shows_a_cut_too",),
    ),
    Mutation(
        "74 starting over keeps what was finished behind the cut",
        STARTS,
        "range(each.start, min(each.stop, cut_at))",
        "each",
        (UNIT_STARTS + "starting_over_behind_a_cut_loses_nothing_and_repeats_nothing",),
    ),
    Mutation(
        "74 --start-over holds for later cuts too",
        RESTORE,
        "for each in held_out.keys() - self._remembered.had}",
        "for each in held_out.keys()}",
        (UNIT_HOLDINGS + "a_cut_log_is_started_over_where_it_was_cut",),
    ),
    Mutation(
        "75 a partition without an offset of a topic made again is started",
        STARTS,
        "if at is None and partition.topic in another:",
        "if False:",
        (UNIT_STARTS + "no_partition_of_a_topic_made_again_is_started",),
    ),
    Mutation(
        "75 a group without offsets starts without a line",
        RESTORE,
        "            self._tell_of_starts(taken, stored, bounds)\n",
        "",
        (UNIT_HOLDINGS + "a_group_without_offsets_is_told_before_it_starts",),
    ),
    Mutation(
        "76 a message sent again is named with the id of the topic that it waited in",
        "service/core/history.py",
        "    if _claimed_origin(message) is None:\n        return message.topic_id.encode()\n",
        "    return message.topic_id.encode()\n",
        (UNIT_HISTORY + "a_topics_id_is_that_of_the_topic_in_the_origin",),
    ),
    Mutation(
        "76 outputs do not name the id of their topic",
        HEADERS,
        "*(((TOPIC_ID_HEADER, topic_id),) if topic_id else ()),",
        "",
        ("tests/unit/test_codecs.py::test_outputs_name_the_topics_id_where_it_is_known",),
    ),
    Mutation(
        "77 a log that was cut and has grown between two processes is read on",
        STARTS,
        "for end in (bounds.end, epoch_end) if",
        "for end in (bounds.end,) if",
        (UNIT_HOLDINGS + "a_log_that_was_cut_and_has_grown_between_two_processes_is_found",),
    ),
    Mutation(
        "77 the epoch of the next offset is stored where the map reaches further",
        HOLDINGS,
        "holding.trail.before(reached(progress)),",
        "holding.trail.before(progress.next_offset),",
        (UNIT_HOLDINGS + "a_map_that_reaches_into_another_epoch_is_stored_with_it",),
    ),
    Mutation(
        "77 another leader's messages are handed out unverified",
        POSITIONS,
        "        if holding.trail.fetched(offset, batches):\n",
        "        holding.trail.fetched(offset, batches)\n        if False:\n",
        (UNIT_HOLDINGS + "another_leaders_messages_wait_until_it_is_known_that_nothing_is_cut",),
    ),
    Mutation(
        "77 what an earlier leader wrote is verified and fetched again without end",
        TRAIL,
        "if epoch == last or (known and epoch < last):",
        "if epoch == last:",
        (
            UNIT_EPOCHS + "what_an_earlier_leader_wrote_is_read_again_without_a_doubt",
            UNIT_HOLDINGS + "what_was_fetched_before_a_leader_changed_can_be_fetched_again",
        ),
    ),
    Mutation(
        "77 what a later leader wrote below the map's end is verified up to the fetch alone",
        TRAIL,
        "self.unverified = max(offset, last_begin + 1), last",
        "self.unverified = offset, last",
        (UNIT_EPOCHS + "a_later_leader_below_what_was_read_is_verified_up_to_there",),
    ),
    Mutation(
        "77 a rebalance forgets that another leader's messages are unverified",
        POSITIONS,
        "        if holding.trail.unverified is not None:\n            self.unreadable",
        "        if False:\n            self.unreadable",
        (UNIT_HOLDINGS + "a_rebalance_does_not_forget_what_is_to_be_verified",),
    ),
    Mutation(
        "30 a worker that is fenced in a revoke fences back",
        HOLDINGS,
        "if held is None or not self.restored.is_set():",
        "if held is None:",
        (UNIT_HOLDINGS + "whoever_is_fenced_in_a_revoke_does_not_fence_back",),
    ),
    Mutation(
        "30 a topic in doubt loses a writer for good",
        WRITERS,
        "if context.ledger.doubts(self._partition):",
        "if False:",
        (HAND_OVER + "a_topic_in_doubt_does_not_lose_a_writer",),
    ),
    Mutation(
        "30 a writer that cannot work is not told of",
        TRANSACTIONS,
        "if (why := writer.stuck(STUCK_S)) is not None:",
        "if (why := None) is not None:",
        (HAND_OVER + "a_topic_in_doubt_does_not_lose_a_writer",),
    ),
    Mutation(
        "30 a partition that was fenced is not told of",
        MEMBER,
        "            self.restore.taken_by_another,\n",
        "",
        (HAND_OVER + "a_partition_that_is_held_nowhere_is_told_of",),
    ),
    Mutation(
        "30 a partition that was fenced during the restore of another is forgotten",
        RESTORE,
        "self._holdings.unrestored = given if left else None",
        "self._holdings.unrestored = given if held_out else None",
        (HAND_OVER + "a_partition_fenced_during_the_restore_of_another_is_restored",),
    ),
    Mutation(
        "30 a partition that was fenced behind the read counts as read",
        RESTORE,
        "        bounds = await self._offsets.bounds(given.partitions)\n",
        "        bounds = await self._offsets.bounds(given.partitions)\n"
        "        fresh = given.partitions - kept.keys() - self.held.keys()\n",
        (HAND_OVER + "a_partition_fenced_behind_the_read_is_not_taken_for_read",),
    ),
    Mutation(
        "30 an offset that is read too early cancels running calls",
        READING,
        "if clock.now_s() < stale_until_s and any(",
        "if False and any(",
        (
            HAND_OVER + "an_earlier_offset_of_our_own_is_read_again",
            HAND_OVER + "none_is_earlier_than_the_first_mark",
        ),
    ),
    Mutation(
        "30 a restore goes on from before a commit that cannot be read yet",
        READING,
        "stable = await self._stable(fresh)",
        "stable = {each: stored[each] for each in fresh}",
        (HAND_OVER + "a_commit_that_cannot_be_read_yet_is_waited_for_behind_the_fence",),
    ),
    Mutation(
        "30 a writer takes for not committed what cannot be read yet",
        HOLDINGS,
        "return (await self._offsets.stable_of({partition}))[partition]",
        "return (await self._offsets.stored_of({partition}))[partition]",
        (HAND_OVER + "a_writer_waits_until_its_last_commit_can_be_read",),
    ),
    Mutation(
        "30 an offset that Kafka has forgotten is waited for without end",
        READING,
        "if clock.now_s() < stale_until_s and any(",
        "if any(",
        (HAND_OVER + "an_offset_that_stays_earlier_is_the_truth",),
    ),
    Mutation(
        "30 a restore that was overtaken fences the new owner",
        READING,
        "if self._holdings.unrestored is not given or self._membership.reassigning:",
        "if False:",
        (HAND_OVER + "a_restore_that_is_overtaken_while_it_reads_fences_nobody",),
    ),
    Mutation(
        "30 fences that wait for their turn outlive a revoke",
        TRANSACTIONS,
        "        self.drop(list(self._fencing))\n",
        "",
        (HAND_OVER + "a_revoke_ends_the_fences_that_wait",),
    ),
    Mutation(
        "30 the writer of a mark fences the new owner",
        MEMBER,
        "        self.holdings.marking.clear()\n",
        "",
        (HAND_OVER + "a_mark_that_failed_opens_no_producer_after_a_revoke",),
    ),
    Mutation(
        "30 a writer asks the ledger of a client that is gone",
        TRANSACTIONS,
        " and writer.ledger is self._ledger",
        "",
        (HAND_OVER + "an_epoch_without_use_is_not_taken_over_from_another_client",),
    ),
    Mutation(
        "30 a replacement cancels a revoke that is under way",
        MEMBER,
        "        async with self._letting_go:\n            held,",
        "        if True:\n            held,",
        (HAND_OVER + "a_replacement_waits_for_a_revoke",),
    ),
    Mutation(
        "30 a client that is given up gathers while a rebalance waits for it",
        MEMBER,
        "                    self._transactions.hurry(on=True)\n                if held:",
        "                    pass\n                if held:",
        (HAND_OVER + "a_replacement_gathers_no_longer",),
    ),
    Mutation(
        "30 a revoke lets the group go on before a replaced client has committed",
        MEMBER,
        "        async with self._letting_go:\n            self._overtake()",
        "        if True:\n            self._overtake()",
        (HAND_OVER + "a_revoke_waits_for_a_replacement",),
    ),
    Mutation(
        "31 a reader that is not asked counts as silent",
        WATCHDOG,
        "elif partition in asked:",
        "else:",
        (UNIT_WATCHDOG + "what_is_not_asked_for_is_no_silence",),
    ),
    Mutation(
        "31 a process that was stopped counts as silent",
        WATCHDOG,
        "min(elapsed_s, 2 * every_s)",
        "elapsed_s",
        (UNIT_WATCHDOG + "a_process_that_was_stopped_did_not_wait",),
    ),
    Mutation(
        "31 a client is replaced again and again without help",
        WATCHDOG,
        "if len(self._at_s) == REPLACED_MAX and",
        "if False and",
        (UNIT_WATCHDOG + "the_third_replacement_within_ten_minutes_is_refused",),
    ),
    Mutation(
        "32 a topic made again is read on as if it were the old one",
        WATCHDOG,
        "elif seen.id is not None and seen.id != known:",
        "elif False:",
        (UNIT_WATCHDOG + "another_id_ends_it_at_once",),
    ),
    Mutation(
        "32 one broker that does not know a topic ends the process",
        WATCHDOG,
        "now_s - self._gone_since_s[topic] >= GONE_S",
        "True",
        (UNIT_WATCHDOG + "a_topic_that_one_broker_did_not_know_goes_on",),
    ),
    Mutation(
        "32 offsets of a deleted topic are stored for the one made again",
        HOLDINGS,
        "if self.doubts(partition):\n            return None\n",
        "if False:\n            return None\n",
        (SUPERVISION + "a_commit_does_not_wait_for_a_topic_of_the_same_name",),
    ),
    Mutation(
        "types: a text is no date behind a validator of the user's",
        "service/llm/strict_json.py",
        "if not any(map(_needs_it, _nodes(schema))):",
        "if True:",
        (
            "tests/unit/test_strict_json.py",
            EXTRACTOR_TESTS + "a_record_behind_a_validator_is_a_record",
        ),
    ),
    Mutation(
        "types: NaN is published as null",
        "service/llm/record_names.py",
        'if b"null" in text and',
        "if False and",
        (EXTRACTOR_TESTS + "what_json_has_no_number_for_is_asked_again",),
    ),
    Mutation(
        "types: a serialization alias is no name of the record",
        "service/llm/record_names.py",
        "return name if isinstance(name, str) and name != alias else None",
        "return None",
        (EXTRACTOR_TESTS + "each_name_where_it_belongs",),
    ),
    Mutation(
        "types: a generic goes under a name that OpenAI refuses",
        "service/llm/request.py",
        '_NOT_IN_NAMES.sub("_", named["name"])',
        'named["name"]',
        (EXTRACTOR_TESTS + "a_generic_record_goes_under_a_name_that_is_taken",),
    ),
    Mutation(
        "endpoint: a call's path goes behind the address's query",
        "service/llm/endpoint.py",
        "return Endpoint(shown(base_url), key, setting, query,",
        "return Endpoint(base_url, key, setting, {},",
        (EXTRACTOR_TESTS + "an_address_with_a_query_keeps_it_behind_the_path",),
    ),
    Mutation(
        "endpoint: a query is logged by a library",
        "service/telemetry/logs.py",
        "text = _QUERY.sub(",
        "_QUERY.sub(",
        (EXTRACTOR_TESTS + "an_address_with_a_query_keeps_it_behind_the_path",),
    ),
    Mutation(
        "types: a validator is a way around strictness",
        "service/llm/strict_json.py",
        "return alone.validate_json(_json(value), strict=True)",
        "return alone.validate_json(_json(value), strict=False)",
        ("tests/unit/test_strict_json.py",),
    ),
    Mutation(
        "refusals: a text that is repeated chooses what it means",
        SHAPES,
        "self._without_echo(value[:STRING_MAX_CHARS])",
        "value[:STRING_MAX_CHARS]",
        (UNIT_FAILURES + "an_echo_of_the_message_says_nothing",),
    ),
    Mutation(
        "refusals: a whole minute's tokens are waited for by a text that is larger",
        SHAPES,
        "if status == 429 and _never_fits(said.words):",
        "if False:",
        (UNIT_FAILURES + "what_concerns_this_message",),
    ),
    Mutation(
        "refusals: a setting is taken for the message's own fault",
        "service/llm/failures.py",
        "unclear=True, detail=detail)",
        "unclear=False, detail=detail)",
        (EXTRACTOR_TESTS + "what_says_nothing_is_its_own_once_others_are_answered",),
    ),
    Mutation(
        "refusals: an answer from before the refusal is evidence",
        "service/llm/evidence.py",
        "self._answered.get(route, refused_s) > refused_s",
        "route in self._answered",
        (EXTRACTOR_TESTS + "who_was_answered_before_is_no_evidence",),
    ),
    Mutation(
        "refusals: the limit's two names are tried for ever",
        "service/llm/cascade.py",
        "if parameter in self.not_taken or other in self.not_taken:",
        "if False:",
        (EXTRACTOR_TESTS + "an_endpoint_that_takes_neither_name_is_a_setting",),
    ),
    Mutation(
        "refusals: the key stands in a dead letter",
        "service/llm/endpoint.py",
        "            if len(secret) >= SECRET_MIN_BYTES and secret in content:",
        "            if False:",
        (EXTRACTOR_TESTS + "the_key_is_in_no_dead_letter",),
    ),
    Mutation(
        "asking a probe is told in pieces and read as a whole: it always fails",
        "service/llm/extractor.py",
        "publish = _to_nobody if self._extraction.streaming else None",
        "publish = None",
        (STREAMED_TESTS + "a_probe_asks_as_messages_do",),
    ),
    Mutation(
        "asking a call that is read as a whole asks for a stream",
        "service/llm/exchange.py",
        "if publish is not None else step.asked(talk).whole()",
        "",
        (STREAMED_TESTS + "a_call_that_is_read_as_a_whole_asks_for_no_stream",),
    ),
    Mutation(
        "asking a model's own parameters are left out",
        "service/llm/request.py",
        " | extraction.model_parameters.get(model, {})",
        "",
        (ASKING_TESTS + "parameters_go_into_the_body_as_they_are",),
    ),
    Mutation(
        "asking a parameter may be what is ours",
        "service/settings/sections.py",
        "        if name in _OURS:",
        "        if False:",
        (ASKING_TESTS + "what_is_ours_is_refused_by_name",),
    ),
    Mutation(
        "asking another model's endpoint gets the main one's key",
        "service/llm/models.py",
        "connection = self._connections.get(model, self._connection_main)",
        "connection = self._connection_main",
        (ASKING_TESTS + "a_models_own_endpoint_gets_nothing_of_the_main_one",),
    ),
    Mutation(
        "asking a refused key is not read anew",
        "service/llm/connection.py",
        "            if not await self.renewed(refused=sent):",
        "            if True:",
        (ASKING_TESTS + "a_key_is_read_anew_when_it_is_refused",),
    ),
    Mutation(
        "asking a refused form is not left",
        "service/llm/adapting.py",
        "        return _another_form(step, asked.form)",
        "        return False",
        (ASKING_TESTS + "auto_finds_what_the_endpoint_takes",),
    ),
    Mutation(
        "asking a form that another call has left is left again",
        "service/llm/adapting.py",
        "    if step.request.form != refused:",
        "    if False:",
        (ASKING_TESTS + "auto_finds_what_the_endpoint_takes",),
    ),
    Mutation(
        "asking the first of several models is asked",
        "service/llm/endpoint.py",
        "    if names is not None and len(names) == 1:",
        "    if names:",
        (ASKING_TESTS + "among_several_models_a_person_chooses",),
    ),
    Mutation(
        "asking a null that stands for a default stays",
        "service/llm/records.py",
        "strict_json(self.answer)(self.strict.without_nulls(text))",
        "strict_json(self.answer)(text)",
        (ASKING_TESTS + "a_null_that_stands_for_a_default_is_the_default",),
    ),
    Mutation(
        "asking how fast an answer is made is part of the prompt",
        "service/llm/request.py",
        "if name not in _DECIDES_NOTHING}",
        "if True}",
        ("tests/unit/test_cache.py::test_waits_are_not_in_the_identity",),
    ),
    Mutation(
        "asking a tag stands in the text",
        "service/llm/prompt.py",
        "    while digits[:chars] in text:  # ends: no text holds its own hash",
        "    while False:",
        ("tests/unit/test_prompt.py::test_a_tag_is_the_shortest_that_the_text_does_not_hold",),
    ),
    Mutation(
        "asking a limit of dollars without a price stops nothing",
        "service/llm/models.py",
        "if model and cost is None and self._settings.limits.spend_usd_per_hour is not None:",
        "if False:",
        (ASKING_TESTS + "a_limit_of_dollars_needs_a_price",),
    ),
    Mutation(
        "asking an odd usage is more than the whole",
        "service/llm/prices.py",
        "written = min(tokens.cache_write, tokens.input - cached)",
        "written = tokens.cache_write",
        ("tests/unit/test_prices.py::test_no_usage_is_too_odd_for_a_bill",),
    ),
    Mutation(
        "asking flex costs what is usual",
        "service/llm/prices.py",
        'context = None if tier is None else {"service_tier": tier}',
        "context = None",
        ("tests/unit/test_prices.py::test_the_tier_that_answered_is_priced",),
    ),
    Mutation(
        "asking a call is corrected by another estimate than it was charged with",
        "service/llm/extractor.py",
        "            estimate = self._charges.estimate(step, talk)\n        else:",
        "            estimate = self._charges.estimate(step, talk)\n"
        "            self._charges.remember(text, estimate)\n"
        "            size_bytes = step.request.size_bytes + len(text.encode())\n"
        "            return self._charges._estimator.estimate(step.model, size_bytes)\n"
        "        else:",
        ("tests/contract/test_budget_of_tokens.py::test_the_budget_is_not_overdrawn",),
    ),
    Mutation(
        "strict: a field's null that is no default is taken for one",
        "service/llm/strictness.py",
        'if one.get("default", name) is not None:',
        "if False:",
        ("tests/unit/test_strictness.py::test_what_would_be_lost_is_said",),
    ),
    Mutation(
        "strict: null means two things",
        "service/llm/strictness.py",
        "if at != other and (both := optional & others):",
        "if (both := set()):",
        ("tests/unit/test_strictness.py::test_what_has_no_strict_meaning_is_lost",),
    ),
    Mutation(
        "answers: one of two objects is chosen",
        ANSWER_TEXT,
        "            return AnswerText(problem=TWO_OBJECTS, shown=text)\n",
        "            return AnswerText((text[slice(*objects[0])],), shown=text)\n",
        (UNIT_ANSWER_TEXT + "two_objects_are_none",),
    ),
    Mutation(
        "answers: the second call of a tool is lost without a word",
        ANSWER_TEXT,
        "if len(calls) > 1 and not many:",
        "calls = calls[:1]\n    if False:",
        (UNIT_ANSWER_TEXT + "several_calls",),
    ),
    Mutation(
        "answers: an object within a broken one is taken",
        ANSWER_TEXT,
        "            at = _end_of(text, found.start())\n            objects.append(",
        "            at = found.end()\n            objects = [(found.start(), len(text))]; (",
        (UNIT_ANSWER_TEXT + "a_part_of_something_broken_is_never_taken",),
    ),
    Mutation(
        "answers: a body is read without a bound",
        LEAN,
        "        if size > max_bytes:",
        "        if False:",
        (LEAN_TESTS + "an_answer_is_not_read_beyond_its_bound",),
    ),
    Mutation(
        "answers: a bomb is decoded at once",
        "service/llm/bounded.py",
        "self._inflate.decompress(piece, PIECE_BYTES)",
        "self._inflate.decompress(piece)",
        ("tests/unit/test_bounded.py::test_a_bomb_stays_small",),
    ),
    Mutation(
        "answers: a count of tokens that is no number ends the process",
        "service/llm/answers.py",
        "0 < count <= TOKENS_MAX",
        "0 < count",
        (UNIT_ANSWER_TEXT + "a_count_that_no_model_can_have_is_none",),
    ),
    Mutation(
        "the demo's model is started without the OpenMP runtime that a minimal Debian lacks",
        "service/demo/model.py",
        'os.execve(sys.executable, arguments, {**os.environ, "LD_LIBRARY_PATH": searched})',
        "assert searched and arguments",
        ("tests/unit/test_demo.py::test_a_missing_openmp_comes_from_its_wheel",),
    ),
    Mutation(
        "settings: a bound that the value must stay below is not said",
        "service/settings/wording.py",
        '    if "exclusiveMaximum" in node:',
        "    if False:",
        ("tests/unit/test_settings.py::test_wrong_value",),
    ),
    Mutation(
        "the demo's records vanish with its screen",
        "service/demo/app.py",
        "for row in farewell(self._board):",
        "for row in ():",
        ("tests/unit/test_demo.py::test_the_newest_rows_outlive_the_screen",),
    ),
    Mutation(
        "sentences: 1 records",
        "service/core/words.py",
        'noun}" if number == 1 else',
        'noun}" if False else',
        ("tests/unit/test_words.py",),
    ),
    Mutation(
        "the demo hides why it ends behind what fails at its end",
        "service/demo/app.py",
        "        if stops is None:\n            raise",
        "        if True:\n            raise",
        ("tests/unit/test_demo.py::test_why_the_demo_ends_is_told_alone",),
    ),
    Mutation(
        "bounded: a settings file of aliases of aliases fills the memory",
        BOUNDED,
        "            if values + len(below) > VALUES_MAX:\n",
        "            if False:\n",
        (UNIT_SETTINGS + "hostile_files[aliases of aliases]",),
    ),
    Mutation(
        "bounded: a settings file that nests too deep ends in a traceback",
        BOUNDED,
        "    for _ in range(LEVELS_MAX):\n",
        "    for _ in range(99_999):\n",
        (UNIT_SETTINGS + "hostile_files",),
    ),
    Mutation(
        "bounded: a number of 6,000 digits ends in a traceback",
        BOUNDED,
        'kind == "int" and len',
        'kind == "" and len',
        (UNIT_SETTINGS + "hostile_files",),
    ),
    Mutation(
        "bounded: a value that PyYAML cannot take ends in a traceback",
        BOUNDED,
        "except (ArithmeticError, AttributeError, LookupError, ValueError):",
        "except ArithmeticError:",
        (UNIT_SETTINGS + "a_value_of_another_kind_names_its_line",),
    ),
    Mutation(
        "bounded: a pipe as settings file hangs the start",
        BOUNDED,
        "if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):",
        "if False:",
        (UNIT_SETTINGS + "a_file_that_never_ends",),
    ),
    Mutation(
        "bounded: an address of brokers is repeated with its password",
        SECTIONS,
        'if "@" in value:',
        "if False:",
        (UNIT_SETTINGS + "credentials_in_an_address_are_not_repeated",),
    ),
    Mutation(
        "bounded: a forged reason steers the terminal",
        "service/commands/dead_letters.py",
        'f"{number} {one_line(reason)}"',
        'f"{number} {reason}"',
        ("tests/unit/test_letters.py::test_no_part_of_the_list_steers_a_terminal",),
    ),
    Mutation(
        "bounded: JSON of a letter steers the terminal",
        "service/commands/dead_letters.py",
        "        each if each.isprintable() else json.dumps(each)[1:-1]\n",
        "        each\n",
        ("tests/unit/test_letters.py::test_no_part_of_the_list_steers_a_terminal",),
    ),
    Mutation(
        "bounded: a reader that has left is a failure",
        "service/commands/output.py",
        "        raise SystemExit(0) from None\n",
        "        raise\n",
        ("tests/unit/test_cli.py::test_a_reader_that_has_left_is_no_error",),
    ),
    Mutation(
        "bounded: a connection gets the number of a closed stream",
        "service/commands/output.py",
        "    for number in (0, 1, 2):\n",
        "    for number in ():\n",
        ("tests/unit/test_cli.py::test_closed_streams_are_no_error",),
    ),
    Mutation(
        "bounded: a plan of no latency ends in a traceback",
        "service/commands/cli.py",
        "typer.Option(min=0.001, max=1e6,",
        "typer.Option(min=0, max=1e6,",
        ("tests/unit/test_cli.py::test_a_plan_of_impossible_numbers_is_a_sentence",),
    ),
    Mutation(
        "bounded: the demo spends a key that happens to be in the shell",
        "service/demo/app.py",
        "        if self._own_endpoint:\n",
        "        if any(map(os.environ.get, ENDPOINT_VARIABLES)):\n",
        ("tests/unit/test_demo.py::test_the_local_model_is_the_default",),
    ),
    Mutation(
        "bounded: the demo's service sees a key that happens to be in the shell",
        "service/demo/app.py",
        'if own_endpoint else ("SLUICE_", "OPENAI_")',
        "if True else ()",
        ("tests/unit/test_demo.py::test_a_key_of_the_shell_is_not_used_unasked",),
    ),
    Mutation(
        "bounded: the demo waits without a word",
        "service/demo/download.py",
        "        if silent_s >= SILENT_S and not said:\n",
        "        if False:\n",
        ("tests/unit/test_demo.py::test_what_is_waited_for_is_told_once",),
    ),
    Mutation(
        "bounded: the second SIGHUP of a terminal cuts calls off",
        "service/signals.py",
        "        if number is signal.SIGHUP and hung_up:\n",
        "        if False:\n",
        ("tests/unit/test_signals.py::test_a_terminal_that_closes_says_so_twice",),
    ),
    Mutation(
        "bounded: nohup is forgotten",
        "service/signals.py",
        "    return number is signal.SIGHUP and signal",
        "    return False and signal",
        ("tests/unit/test_signals.py::test_nohup_is_kept",),
    ),
    Mutation(
        "bounded: a stopped catch-up counts as done",
        "service/workers.py",
        "        if self._stopped_by is not None:\n            return FAILED\n",
        "",
        ("tests/unit/test_workers.py::test_the_exit_code_of_a_stop",),
    ),
    Mutation(
        "bounded: one worker's rejects are taken for everybody's",
        "service/workers.py",
        "0 < asked == sum(each.rejected for each in told)",
        "any(each.asked for each in told)",
        ("tests/unit/test_workers.py::test_every_message_rejected_by_all_of_them",),
    ),
    Mutation(
        "bounded: a wait is told every second",
        "service/telemetry/changes.py",
        '    return re.sub(r"\\d+", "#", cause)\n',
        "    return cause\n",
        ("tests/unit/test_changes.py::test_a_wait_is_told_once",),
    ),
    Mutation(
        "bounded: each message of a slow topic is two lines",
        "service/telemetry/changes.py",
        "or now_s - self._since_s < STEADY_S:",
        "or False:",
        ("tests/unit/test_changes.py::test_what_passes_is_not_told",),
    ),
    Mutation(
        "bounded: half-open connections take all descriptors",
        "service/telemetry/connections.py",
        "        if len(self) >= CONNECTIONS_MAX:\n",
        "        if False:\n",
        (
            "tests/unit/test_probes.py::test_half_open_connections_are_bounded_and_probes_are_answered",
        ),
    ),
    Mutation(
        "bounded: a connection may say nothing for ever",
        "service/telemetry/connections.py",
        "            self._rest(transport, HEADERS_S)\n",
        "            pass\n",
        ("tests/unit/test_probes.py::test_a_connection_without_a_request_is_closed",),
    ),
    Mutation(
        "bounded: scrapes without number hold up the loop",
        "service/telemetry/probes.py",
        "        if self._scrapes_waiting >= SCRAPES_WAITING_MAX:\n",
        "        if False:\n",
        ("tests/unit/test_probes.py::test_scrapes_do_not_hold_up_probes",),
    ),
    Mutation(
        "bounded: lines that nobody reads fill the memory",
        "service/telemetry/line_queue.py",
        "            if self._chars + len(line) > QUEUED_MAX_CHARS:\n",
        "            if False:\n",
        ("tests/unit/test_line_queue.py::test_logging_goes_by_the_queue",),
    ),
    Mutation(
        "bounded: a full stderr freezes whoever logs",
        "service/telemetry/logs.py",
        "        if self._queue is not None and sys.stderr is self._stderr:\n",
        "        if False:\n",
        ("tests/unit/test_line_queue.py::test_logging_goes_by_the_queue",),
    ),
    Mutation(
        "bounded: the end waits for a reader that never comes",
        "service/telemetry/line_queue.py",
        "        self._writer.join(CLOSE_S)\n",
        "        self._writer.join()\n",
        ("tests/unit/test_line_queue.py::test_the_end_waits_a_bounded_time",),
    ),
)

WALKED = {
    "73 whoever sees a cut reads on once the log has grown again": 0,
    "25 behind one held message every finished one is remembered": 0,
    "25 exactly once: what the map cannot hold goes into a transaction all the same": 0,
    "21 what stands behind a failed message in another partition goes first": 1,
    "11 a slot is lost with a call that was called off before its first step": 1,
    "30 a fenced partition that is then held out keeps its messages in the window": 7,
    "30 a partition is kept behind the fence that has dropped its commit in doubt": 13,
    "30 a topic in doubt loses a writer for good": 1,
    "30 a partition that was fenced during the restore of another is forgotten": 1,
    "16 a drain with an open circuit asks without end": 0,
    "14 a Retry-After of a day is waited for a day": 0,
    "14 a second call's answer is dropped where the first found no room": 0,
    "14 a call that was cut off is no attempt": 0,
    "14 a message that takes too long does not wait in the retry topic": 0,
    "14 a set whose call is cut off is not closed": 0,
}
"""What the random walk (tests/walk) finds too, and the chunk of its seeds that does: another
draw of plans moves them."""

MUTATIONS = TAKEN_AWAY + tuple(
    replace(
        each,
        defect=f"walk: {each.defect}",
        tests=(f"tests/walk/test_walk.py::test_walk[{WALKED[each.defect]}]",),
    )
    for each in TAKEN_AWAY
    if each.defect in WALKED
)


def main(words: list[str]) -> int:
    """The exit code: 1 where a guard is missed by its tests."""
    chosen = [each for each in MUTATIONS if not words or set(words) & set(each.defect.split())]
    if not chosen:
        print(f"No row has any of these words or numbers: {' '.join(words)}")
        return 1
    with _real_kafka(), tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        for name in ("service", "tests"):
            shutil.copytree(ROOT / name, checkout / name)
        shutil.copy(ROOT / "pyproject.toml", checkout)
        tests = sorted({test for each in chosen for test in each.tests})
        if not _all_pass(checkout, tests):
            print("With every guard in its place a test fails: nothing can be told.")
            return 1
        caught = [_is_caught(checkout, each) for each in chosen]
    print(f"{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


def _is_caught(checkout: Path, mutation: Mutation) -> bool:
    file, started_s = checkout / mutation.file, time.monotonic()
    source = file.read_text()
    found = source.count(mutation.old)
    caught = False
    if found == 1:
        file.write_text(source.replace(mutation.old, mutation.new))
        caught = not _all_pass(checkout, mutation.tests)
        file.write_text(source)
    verdict = "caught" if caught else "MISSED"
    why = "" if found == 1 else f" (its text stands {found} times in {mutation.file})"
    print(f"{verdict} {time.monotonic() - started_s:5.1f} s  {mutation.defect}{why}", flush=True)
    return caught


def _all_pass(checkout: Path, tests: list[str] | tuple[str, ...]) -> bool:
    """Whether they do; raises where they cannot be run."""
    pytest_ = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        # By a thread: an event loop that never rests would catch what a signal raises in it.
        [*pytest_, f"--timeout={TEST_S}", "--timeout-method=thread", *tests],
        cwd=checkout,
        # Byte code is told from newer text by whole seconds and the size.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TEST_KAFKA": "required"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"{tests} cannot be run:\n{ended.stdout}{ended.stderr}")
    return ended.returncode == pytest.ExitCode.OK


@contextmanager
def _real_kafka() -> Iterator[None]:
    """One for all rows; they find it in the environment."""
    with a_kafka() as servers:
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = servers
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
