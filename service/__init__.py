"""Sluice: text messages in, validated records out, on Kafka.

What a user's own record types may import stands here.
"""


class NextModel(Exception):
    """Raised by a validator of a record: ask the next, stronger model of `extraction.model`.

    It is no `ValueError`, which would tell the same model what was wrong. After the last model the
    message is rejected as `invalid`, with this text in its dead letter.
    """
