"""Every verdict of the checker can fail: made-up evidence in which one thing is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest

from tests.chaos.checker import DEAF_S, Limits, Report, examine
from tests.chaos.evidence import (
    TOPIC_ID,
    Call,
    Evidence,
    Letter,
    Origin,
    Published,
    Sent,
    Stored,
    Struck,
)
from tests.chaos.faults import FAULTS, schedule
from tests.chaos.reader import first_complete_sets
from tests.chaos.rounds import PLANS

LIMITS = Limits(window=2, commit_interval_s=1.0, commit_s=0.5)
MESSAGES = 6


def message(offset: int, partition: int = 0) -> Sent:
    """Sent at its offset's second; two records."""
    name = f"{partition}x{offset}"
    text = f"Person{name} is 30 and Friend{name} is 40"
    return Sent(Origin(partition, offset), b"key", text, float(offset))


def records(of: Sent, at_s: float, answer: str = "a", place: int = 0) -> list[Published]:
    """Both records of a message as they stand in the output; `place` is the first one's offset."""
    return [
        Published(
            partition=0,
            offset=place + index,
            key=of.key,
            value=json.dumps({"name": name, "age": age}).encode(),
            header={
                "sluice.id": f"in:{of.origin.partition}:{of.origin.offset}:{index}",
                "sluice.answer.id": f"{of.origin}{answer}",
                "sluice.record.index": str(index),
                "sluice.record.count": str(len(of.records)),
            },
            at_s=at_s,
        )
        for index, (name, age) in enumerate(of.records)
    ]


def call(of: Sent, began_s: float, worker: str = "w1", how: str = "200") -> Call:
    return Call(of.text, worker, began_s, began_s + 0.5, how)


def good() -> Evidence:
    """Six messages of one key, each called once and published within a second."""
    sent = [message(offset) for offset in range(MESSAGES)]
    return Evidence(
        sent=sent,
        published=[r for each in sent for r in records(each, each.at_s + 0.9)],
        calls=[call(each, each.at_s + 0.1) for each in sent],
    )


def judged(evidence: Evidence) -> Report:
    evidence.calls.sort(key=lambda each: each.began_s)
    return examine(evidence, LIMITS)


def test_nothing_wrong() -> None:
    """A round without a fault has nothing to report."""
    report = judged(good())
    assert report == Report(messages=MESSAGES, stall_s=report.stall_s, stalled=report.stalled)
    assert report.stall_s == pytest.approx(0.9)


def test_a_lost_message() -> None:
    """A message without any outcome is lost."""
    evidence = good()
    del evidence.published[6:8]
    assert judged(evidence).lost == [Origin(0, 3)]


def test_half_a_set_is_lost() -> None:
    """A message of whose answers none is whole is lost, however many records there are of it."""
    evidence = good()
    del evidence.published[7]
    evidence.published.append(records(evidence.sent[3], 9.0, "b")[0])
    assert judged(evidence).lost == [Origin(0, 3)]


def test_a_topic_made_again_repeats_offsets_and_no_message() -> None:
    """The topic's id belongs to a reader's key: two messages under one `sluice.id` are two."""
    first = records(message(0), 1.0)
    second = [
        replace(each, header={**each.header, "sluice.answer.id": "b", TOPIC_ID: "B"})
        for each in first
    ]
    assert [*first_complete_sets([*first, *second, *second])] == [first, second]
    evidence = good()
    evidence.published += second
    report = judged(evidence)
    assert (report.raw_duplicates, report.out_of_order) == (0, [])


def test_a_dead_letter_is_an_outcome() -> None:
    """A message with a dead letter alone is not lost; its reason is told."""
    evidence = good()
    del evidence.published[6:8]
    evidence.letters.append(Letter(Origin(0, 3), "refused", 4.0))
    report = judged(evidence)
    assert report.lost == []
    assert report.letters == {"refused": 1}


def test_a_repeated_set() -> None:
    """A message that was published again counts as raw duplicates; the reader keeps one set."""
    evidence = good()
    evidence.published += records(evidence.sent[2], 7.0, "b")
    report = judged(evidence)
    assert (report.raw_duplicates, report.duplicates) == (2, 0)


def test_a_repeated_dead_letter() -> None:
    """A dead letter that came twice is a raw duplicate; the reader keeps the first."""
    evidence = good()
    del evidence.published[6:8]
    evidence.letters += [Letter(Origin(0, 3), "refused", at_s) for at_s in (4.0, 5.0)]
    report = judged(evidence)
    assert (report.raw_duplicates, report.duplicates) == (1, 0)


def test_two_different_outcomes() -> None:
    """Records and a dead letter of one message are a duplicate for the reader too."""
    evidence = good()
    evidence.letters.append(Letter(Origin(0, 3), "invalid", 9.0))
    assert judged(evidence).duplicates == 1


def test_an_outcome_of_no_message() -> None:
    """Records of a message that is not in the input are foreign."""
    evidence = good()
    del evidence.sent[5]
    assert judged(evidence).foreign == [str(Origin(0, 5))]


def test_an_inversion() -> None:
    """A message that first appears after a later one of its key is out of order."""
    evidence = good()
    evidence.published[4:8] = evidence.published[6:8] + evidence.published[4:6]
    assert set(judged(evidence).out_of_order) == {"in:0:2:0", "in:0:2:1"}


def test_an_inversion_within_a_message() -> None:
    """Records of one message come in the order of their index."""
    evidence = good()
    evidence.published[4:6] = reversed(evidence.published[4:6])
    assert judged(evidence).out_of_order == ["in:0:2:0"]


def test_a_repeat_is_no_inversion() -> None:
    """A set that comes again, after later ones, is no inversion: it appeared before."""
    evidence = good()
    evidence.published += records(evidence.sent[1], 8.0, "b")
    assert judged(evidence).out_of_order == []


def test_sets_out_of_order() -> None:
    """Where only half of a set came in time and the whole of it after a later message's, the
    reader's sets are out of order, although first appearances are not."""
    evidence = good()
    half, rest = evidence.published[:3], evidence.published[4:]
    evidence.published = half + rest + records(evidence.sent[1], 8.0, "b")
    assert "in:0:1:0" in judged(evidence).out_of_order


def test_keys_and_partitions_have_no_order_between_them() -> None:
    """Other keys, and other partitions of the input, may come in any order."""
    evidence = good()
    other_key = replace(message(6), key=b"other")
    elsewhere = message(7, partition=1)
    evidence.sent += [other_key, elsewhere]
    evidence.published = [
        *records(elsewhere, 7.0),
        *records(other_key, 6.5),
        *evidence.published,
    ]
    assert judged(evidence).out_of_order == []


def test_another_messages_record() -> None:
    """A record that is not what its message's text holds is mixed up; so is another key."""
    evidence = good()
    first, second = evidence.published[:2]
    evidence.published[0] = replace(first, value=evidence.published[4].value)
    evidence.published[1] = replace(second, key=b"other")
    assert judged(evidence).mixed_up == ["in:0:0:0", "in:0:0:1"]


@pytest.mark.parametrize("how", ["200", "gone"])
def test_a_repeated_call(how: str) -> None:
    """A second call after one that was answered, or left by the client, is a repeat."""
    evidence = good()
    evidence.calls[2] = replace(evidence.calls[2], how=how)
    evidence.calls += [call(evidence.sent[2], at_s) for at_s in (4.0, 5.0)]
    report = judged(evidence)
    assert (report.repeated_messages, report.repeated_calls) == (1, 2)


@pytest.mark.parametrize("how", ["429", "500", "cut"])
def test_a_retry_is_no_repeat(how: str) -> None:
    """A call after one that the provider failed is a retry, counted apart."""
    evidence = good()
    evidence.calls[2] = replace(evidence.calls[2], how=how)
    evidence.calls.append(call(evidence.sent[2], 4.0))
    report = judged(evidence)
    assert (report.repeated_messages, report.repeated_calls, report.retries) == (0, 0, 1)


def test_called_though_stored() -> None:
    """A call for a message that was stored as finished is outside of what may be repeated."""
    evidence = good()
    evidence.stored.append(Stored(4.0, {0: (3, "")}))
    evidence.calls += [call(evidence.sent[2], 4.5), call(evidence.sent[3], 4.5)]
    assert judged(evidence).outside == [Origin(0, 2)]


def test_the_stored_map_counts() -> None:
    """What the metadata says is finished beyond the next offset must not be called again."""
    evidence = good()
    evidence.stored.append(Stored(5.5, {0: (1, "2-4")}))
    evidence.calls += [call(evidence.sent[n], 5.6) for n in (1, 3)]

    def decode(next_offset: int, metadata: str) -> Iterable[range]:
        low, high = metadata.split("-")
        return [range(next_offset + int(low) - 1, next_offset + int(high) - 1)]

    assert examine(evidence, LIMITS, decode).outside == [Origin(0, 3)]


def deaf_evidence(woken_s: float) -> Evidence:
    """w1 is stopped at 3; message 4 is finished by another and stored; w1 calls it, at `woken_s`
    plus one."""
    evidence = good()
    evidence.stored.append(Stored(6.0, {0: (5, "")}))
    evidence.struck.append(Struck("woken", 3.0, 8.0, "w1", deaf=True))
    evidence.calls.append(call(evidence.sent[4], woken_s + 1))
    return evidence


def test_a_zombie_may_go_on_for_a_moment() -> None:
    """Who was stopped may call what was finished by others while it could not hear of it."""
    assert judged(deaf_evidence(8.0)).outside == []


def test_a_zombie_may_not_go_on_for_ever() -> None:
    """A while after it can hear again, a call for what is stored is outside."""
    assert judged(deaf_evidence(8.0 + DEAF_S)).outside == [Origin(0, 4)]


def test_a_zombie_has_no_licence_for_what_was_stored_before() -> None:
    """What was stored before it was stopped must not be called by it either."""
    evidence = deaf_evidence(8.0)
    evidence.stored.insert(0, Stored(2.9, {0: (5, "")}))
    assert judged(evidence).outside == [Origin(0, 3), Origin(0, 4)]


def test_a_zombie_excuses_nobody_else() -> None:
    """Other workers were not deaf."""
    evidence = deaf_evidence(8.0)
    evidence.calls[-1] = replace(evidence.calls[-1], worker="w2")
    assert judged(evidence).outside == [Origin(0, 4)]


def test_a_stored_offset_that_goes_back() -> None:
    """A stored next offset never falls."""
    evidence = good()
    evidence.stored += [Stored(1.0, {0: (3, "")}), Stored(2.0, {0: (2, "")})]
    assert judged(evidence).rewound == ["partition 0: 3 -> 2"]


def killed(repeated: int) -> Evidence:
    """w1 is killed at 5.5, w2 calls the last `repeated` messages again."""
    evidence = good()
    evidence.struck.append(Struck("kill", 5.5, 5.5, "w1"))
    evidence.calls += [call(each, 6.0, "w2") for each in evidence.sent[MESSAGES - repeated :]]
    return evidence


def test_the_bound_of_a_kill() -> None:
    """window + rate x (commit interval + one commit): 2 + 6 calls in 5.4 s x 1.5 s = 3.67."""
    (death,) = judged(killed(3)).deaths
    assert death.bound == pytest.approx(2 + 6 / 5.4 * 1.5)
    assert death.repeated == 3
    assert judged(killed(3)).over_the_bound == []
    assert judged(killed(4)).over_the_bound != []


def test_only_what_the_dead_one_called_counts_for_its_death() -> None:
    """Repeats of another worker's calls, and repeats from before, are not the kill's."""
    evidence = killed(2)
    evidence.calls += [call(evidence.sent[0], 4.0, "w2"), call(evidence.sent[0], 6.5, "w1")]
    report = judged(evidence)
    assert report.deaths[0].repeated == 2
    assert report.repeated_messages == 3
    assert report.repeated_after == {"none": 1, "kill": 3}


def test_recovery_of_a_kill() -> None:
    """From the kill to the first outcome of a call that began after it, in the slowest of the
    dead worker's partitions; what was under way does not count."""
    evidence = good()
    evidence.struck.append(Struck("kill", 3.5, 3.5, "w1"))
    # Message 3 was called before the kill and is published after it: not a sign of life.
    assert judged(evidence).recovery_s == pytest.approx(4.9 - 3.5)


def test_no_recovery() -> None:
    """Where a dead worker's partition never has an outcome again, recovery is infinite."""
    evidence = good()
    del evidence.published[8:], evidence.calls[4:]
    evidence.struck.append(Struck("kill", 4.5, 4.5, "w1"))
    assert math.isinf(judged(evidence).recovery_s)


def test_recovery_looks_at_every_partition() -> None:
    """A partition of the dead worker that comes back later than the others decides; one that was
    another worker's does not."""
    evidence = good()
    for partition, worker, at_s in ((1, "w1", 9.0), (2, "w2", 20.0)):
        before, after = message(2, partition), message(3, partition)
        evidence.sent += [before, after]
        evidence.calls += [call(before, 2.2, worker), call(after, at_s, "w3")]
        evidence.published += [*records(before, 2.5), *records(after, at_s + 1)]
    evidence.struck.append(Struck("kill", 3.5, 3.5, "w1"))
    assert judged(evidence).recovery_s == pytest.approx(10.0 - 3.5)


def test_a_stall() -> None:
    """The longest time without an outcome while a message was waiting."""
    evidence = good()
    late = evidence.sent[5]
    evidence.published[10:] = records(late, 40.0)
    report = judged(evidence)
    assert (report.stall_s, report.stalled) == (pytest.approx(35.0), (0, pytest.approx(5.0)))


def test_without_backlog_there_is_no_stall() -> None:
    """Time in which nothing was waiting does not count."""
    evidence = good()
    late = replace(message(6), at_s=50.0)
    evidence.sent.append(late)
    evidence.published += records(late, 51.0)
    assert judged(evidence).stall_s == pytest.approx(1.0)


def test_a_stall_that_never_ended() -> None:
    """A partition that stops for good stalls until its last message came."""
    evidence = good()
    late = replace(message(6), at_s=50.0)
    evidence.sent.append(late)
    assert judged(evidence).stall_s == pytest.approx(50.0 - 5.9)


def test_the_reader_keeps_the_first_complete_set() -> None:
    """Of two answers with different records the first one that is whole is kept, whole."""
    first, second = records(message(0), 1.0, "a"), records(message(0), 2.0, "b")
    shorter = replace(second[0], header={**second[0].header, "sluice.record.count": "1"})
    assert [[shorter]] == list(first_complete_sets([first[0], shorter]))
    assert [first] == list(first_complete_sets([first[1], first[0], *second]))
    assert [second] == list(first_complete_sets([first[0], *second, first[1]]))


def test_a_seed_replays() -> None:
    """The same seed gives the same schedule, another one another; all kinds come equally often."""
    kinds = ("kill", "zombie", "cut")
    again = [schedule(kinds, 30, seed, (1.0, 2.0)) for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0] != again[2]
    assert all(sum(f.kind == kind for f in again[0]) == 10 for kind in kinds)


def every_kind() -> Iterator[Sequence[str]]:
    return (plan.kinds for plan in PLANS.values())


def test_every_fault_is_in_a_round() -> None:
    """No fault is written and never done; no round names one that does not exist."""
    assert {kind for kinds in every_kind() for kind in kinds} == FAULTS.keys()
