"""From a Kafka record to the text that the model is asked about: pure functions.

Nothing here quotes a message: a detail says what is wrong and where, never what stood there.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from pydantic_core import from_json

from service.core.messages import (
    Message,
    Passed,
    Reason,
    Rejected,
    Skipped,
)
from service.settings import InputSettings

Decoded: TypeAlias = str | Rejected | Passed | Skipped
Decoder: TypeAlias = Callable[[Message], Decoded]


def decoder(settings: InputSettings) -> Decoder:
    """What turns a message into its text, or into the outcome that it has without a call.

    An empty text (white space alone is one too) is rejected: no record can stand in it, a call
    would cost money for nothing, and skipping it would lose it without a word.
    """
    tombstone = Passed() if settings.tombstones == "pass" else Skipped()
    if settings.format == "text":
        text_of: Callable[[bytes], str | Rejected] = _utf8
    else:
        text_of = _field_reader(settings.text_field)
    size_max = settings.text_max_bytes
    whole_value = settings.format == "text"

    def decode(message: Message) -> Decoded:
        value = message.value
        if value is None:
            return tombstone
        if whole_value and len(value) > size_max:  # before any work on it
            return _too_long(len(value), size_max)
        text = text_of(value)
        return text if isinstance(text, Rejected) else _bounded(text, size_max)

    return decode


def _bounded(text: str, size_max: int) -> str | Rejected:
    if not text or text.isspace():
        return _undecodable("the text is empty")
    # A character takes four bytes at most: most texts need no second encoding to be measured.
    if len(text) * 4 > size_max and (size := len(text.encode())) > size_max:
        return _too_long(size, size_max)
    return text


def _utf8(value: bytes) -> str | Rejected:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return _undecodable(f"the value is not UTF-8: invalid byte at position {error.start}")


def _field_reader(path: str) -> Callable[[bytes], str | Rejected]:
    names = path.split(".")

    def read(value: bytes) -> str | Rejected:
        try:
            # Lone surrogates and invalid UTF-8 are errors here, unlike in the standard library.
            found: Any = from_json(value, cache_strings="keys")
        except ValueError as error:
            return _undecodable(f"the value is not JSON: {error}")
        for name in names:
            if not isinstance(found, dict) or name not in found:
                return _undecodable(f"the value has no field {path!r}")
            found = found[name]
        return found if isinstance(found, str) else _undecodable(f"field {path!r} is no text")

    return read


def _undecodable(detail: str) -> Rejected:
    return Rejected(Reason.UNDECODABLE, detail)


def _too_long(size: int, size_max: int) -> Rejected:
    return Rejected(
        Reason.TOO_LONG, f"the text has {size} bytes, input.text_max_bytes is {size_max}"
    )
