"""Where reading starts, decided from what Kafka stores; pure, so that every case can be tested."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from service.core.completed import finished_ranges, runs_of
from service.core.messages import Partition
from service.core.tracker import Progress
from service.core.words import how_many
from service.kafka.client.instances import Bearer, has_lived_on
from service.kafka.client.stored import NO_OTHERS, Others, Stored, reached, read


@dataclass(frozen=True, slots=True)
class LogRange:
    """The offsets a partition can be read from: `begin` up to, not including, `end`."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Don't read: only a person can say from where. The text says what it means and what to do.

    `cut_at` is where the log ended when it was shortest, where it was found to have been cut.
    """

    problem: str
    cut_at: int | None = None


def is_new(stored: Mapping[Partition, Stored | None], generation: int) -> bool:
    """Whether the group starts in this very generation.

    It does when nothing is stored; and when what is stored was written by members that found it
    new in this generation: they are faster than we by a moment.
    """
    known = [each for each in stored.values() if each is not None]
    began = {found[1].began for each in known if (found := read(each)) is not None}
    return not known or generation in began


def taken_over(
    offset: int, stored: Stored | None, nonce: str, own: Bearer | None = None
) -> Progress:
    """The progress with which the process of this nonce reads a partition on from `offset`.

    Its own end counts as unclean until it has finished something or come to a clean end. What it
    has stored itself has that in it: it lives, and has only taken the partition over again. So has
    what a worker of the same name has stored that was put out by it (`own`) and did not die; and
    the message that ran alone in that one is no cause of anything.
    """
    found = None if stored is None else read(stored)
    if found is None or found[0].next_offset != offset:
        spent = () if found is None else found[0].spent  # true whatever is read next
        return Progress(offset, unclean_ends=1, spent=spent)
    progress, mark = found
    lived_on = has_lived_on(mark.bearer, own)
    if lived_on:
        progress = replace(progress, alone=None)
    counted = (mark.nonce == nonce or lived_on) and progress.unclean_ends > 0
    return progress if counted else replace(progress, unclean_ends=progress.unclean_ends + 1)


def others_to_keep(offset: int, stored: Stored | None) -> Others:
    """What a newer version has stored besides, for whoever reads on from `offset`."""
    found = None if stored is None else read(stored)
    same = found is not None and found[0].next_offset == offset
    return found[1].others if found is not None and same else NO_OTHERS


def leader_epochs(
    partitions: AbstractSet[Partition], stored: Mapping[Partition, Stored | None]
) -> dict[Partition, int]:
    """Under which leader the last finished message of each was written, where that is stored."""
    found = {each: read(at) for each in partitions if (at := stored[each]) is not None}
    epochs = {each: it[1].leader_epoch for each, it in found.items() if it is not None}
    return {each: epoch for each, epoch in epochs.items() if epoch is not None}


def starts(
    fresh: AbstractSet[Partition],
    stored: Mapping[Partition, Stored | None],
    bounds: Mapping[Partition, LogRange],
    chosen: Mapping[Partition, int],
    topic_ids: Mapping[str, str],
    epoch_ends: Mapping[Partition, int],
) -> dict[Partition, int | HeldOut]:
    """Where each of `fresh` is read from; `stored` has all partitions of the topics.

    `epoch_ends` says where the `leader_epochs` end in the logs of now, as far as brokers tell.

    Of a topic that was made again nothing is started, not even a partition without an offset;
    until somebody has started it over and stored an offset under its new id.
    """
    another = _made_again(stored, topic_ids)
    found: dict[Partition, int | HeldOut] = {}
    for partition in fresh:
        at, topic_id = stored[partition], topic_ids.get(partition.topic)
        if at is None and partition.topic in another:
            found[partition] = HeldOut(made_again(partition, None, bounds[partition].end))
        else:
            found[partition] = where_to_start(
                partition,
                at,
                bounds[partition],
                chosen.get(partition),
                topic_id,
                epoch_ends.get(partition),
            )
    return found


def _made_again(
    stored: Mapping[Partition, Stored | None], topic_ids: Mapping[str, str]
) -> frozenset[str]:
    """Topics of which offsets are stored for another of that name, and none for this one."""
    ids: dict[str, set[str]] = defaultdict(set)
    for partition, at in stored.items():
        if at is not None and (found := read(at)) is not None and found[1].topic_id is not None:
            ids[partition.topic].add(found[1].topic_id)
    return frozenset(
        topic for topic, then in ids.items() if topic in topic_ids and topic_ids[topic] not in then
    )


def where_to_start(
    partition: Partition,
    stored: Stored | None,
    bounds: LogRange,
    chosen: int | None,
    topic_id: str | None = None,
    epoch_end: int | None = None,
) -> int | HeldOut:
    """The offset to read from; `chosen` by the settings where the group is new, else None.

    Below the log's begin it stays what is stored: that something is missing is for others to say.
    `topic_id` is the topic's now, None where brokers don't tell. A log that was cut is held out
    for good, also when new messages have made it as long as it was: they have taken the offsets
    of those that are gone, and some of them would be passed over.
    """
    if stored is None:
        return bounds.begin if chosen is None else chosen
    found = read(stored)
    progress, mark = (Progress(stored.offset), None) if found is None else found
    then = None if mark is None else mark.topic_id
    if then is not None and topic_id is not None and then != topic_id:
        return HeldOut(made_again(partition, stored.offset, bounds.end))
    finished = reached(progress)
    ends = [] if mark is None or mark.cut_at is None else [mark.cut_at]
    ends += [end for end in (bounds.end, epoch_end) if end is not None and end < finished]
    if ends:
        return HeldOut(log_was_cut(partition, finished, min(ends), bounds.end), min(ends))
    return stored.offset


def started_over(stored: Stored | None, held_out: HeldOut, chosen: int) -> Progress:
    """From where a partition that is held out goes on once a person has said so.

    Where its log was cut: from there, or from before where something is unfinished there; what
    stands behind the cut is new, whatever was finished under its offsets. Else as in a new group.
    """
    if held_out.cut_at is None or stored is None:
        return Progress(chosen)
    found = read(stored)
    progress = Progress(stored.offset) if found is None else found[0]
    cut_at = held_out.cut_at
    if progress.next_offset > cut_at:
        return Progress(cut_at)
    finished = (
        range(each.start, min(each.stop, cut_at))
        for each in finished_ranges(progress.next_offset, progress.runs)
        if each.start < cut_at
    )
    return Progress(progress.next_offset, runs_of(progress.next_offset, finished))


_SAY_SO = (
    "Nothing of it is read until somebody says so: stop every worker and start them with "
    "`sluice run --start-over`, which reads it {whence}; or set the group's offsets with "
    "kafka-consumer-groups --reset-offsets, or use a new kafka.group_id."
)


def log_was_cut(partition: Partition, reached: int, cut_at: int, end: int) -> str:
    """The log is shorter than what was read of it, or was when somebody looked."""
    since = "" if end <= cut_at else ", and has grown since"
    lost = f"What stands under the offsets from {cut_at} on is not what was read there. "
    return (
        f"{partition} has been read up to offset {reached}, but the log ends at {cut_at}{since}: "
        "it was cut (an unclean leader election, a disk that lost its end), or the topic was made "
        f"again. {lost if since else ''}" + _SAY_SO.format(whence=f"from {cut_at}")
    )


def made_again(partition: Partition, offset: int | None, end: int) -> str:
    """What is stored was read from another topic of this name."""
    which = f"next offset of {partition}, {offset}, was"
    if offset is None:
        which = f"offsets of topic {partition.topic} were"
    return (
        f"The group's {which} stored for a topic of this name that has been deleted since, and "
        f"nothing is known of {partition} as it is now. Starting over would read, and pay for, "
        f"its {how_many(end, 'offset')}. "
        + _SAY_SO.format(whence="as a new group would (input.start)")
    )


def without_offsets(group_id: str, where: str, whence: str, messages: int) -> str:
    """What is told before the first call where no offset says how far the group was."""
    return (
        f"The group {group_id} has no offsets for {where}: it starts at {whence}, with "
        f"{how_many(messages, 'message')} before the present end. Where it has read them before "
        "(brokers forget offsets of a group that is away for a week), they are paid for again."
    )


def all_gone(topics: tuple[str, ...], group_id: str) -> str:
    """This process has read under the group's offsets, and now there are none."""
    return (
        f"Kafka has lost all offsets of the group {group_id} for {', '.join(topics)}: they were "
        "deleted, or the topics were made again. Starting over would read, and pay for, messages "
        "a second time. To start over as a new group does, restart every worker; to go on "
        "elsewhere, stop them and set offsets with kafka-consumer-groups --reset-offsets."
    )
