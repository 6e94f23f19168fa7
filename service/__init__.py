"""Sluice: text messages in, validated records out, on Kafka.

Users' own record types may import the names in this file.
"""


class NextModel(Exception):
    """Raised by a validator of a record: ask the next, stronger model of `extraction.model`.

    A `ValueError` would ask the same model again and tell it what was wrong. After the last model
    the message is rejected as `invalid`, with this exception's text in its dead letter.
    """
