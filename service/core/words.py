"""Numbers in sentences: one record, two records.

Rules of this file: pure. It makes text for people; nothing reads that text back.
"""

from __future__ import annotations


def how_many(number: int, noun: str, form: str = "") -> str:
    """The number and its noun, which takes an s unless there is exactly one; `form` is the number's
    format, such as `,`."""
    return f"{number:{form}} {noun}" if number == 1 else f"{number:{form}} {noun}s"
