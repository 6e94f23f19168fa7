"""The demo's examples: a record type, texts for it, and an endless stream of messages from them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from service.demo.texts import ABOUT_ORDERS, ABOUT_PEOPLE, PASTED_LOG, UNREADABLE

Shot: TypeAlias = tuple[str, Mapping[str, Any]]
"""A text with its record, which the model is shown before each message."""

BROKEN_EVERY = 12
"""One of this many messages is broken on purpose, so that a rejection can be seen."""
_BROKEN_AT = 7
"""The place of the broken one, from 0: early enough for a demo of ten messages."""
_KEYS = 12


class Upstream(NamedTuple):
    """A message as a program upstream would write it."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class DemoExample:
    """A record type with shots and texts. Shots help a very small model more than instructions."""

    record: str
    shots: tuple[Shot, ...]
    texts: tuple[str, ...]


PERSON = DemoExample(
    record="service.demo.records:Person",
    shots=(
        ("Old Bertram Hale is 87 and lives by the mill.", {"name": "Bertram Hale", "age": 87}),
        ("The prize went to Ines Duarte, 29, a potter.", {"name": "Ines Duarte", "age": 29}),
    ),
    texts=ABOUT_PEOPLE,
)


def _ticket(customer: str, city: str, order: int, product: str, wish: str) -> Mapping[str, Any]:
    return {
        "customer": customer,
        "city": city,
        "order": order,
        "product": product,
        "wish": wish,
    }


TICKET = DemoExample(
    record="service.demo.records:Ticket",
    shots=(
        (
            "Order 40011: the vase came in three pieces, I want a refund. "
            "Sincerely, Ida Holm from Bergen",
            _ticket("Ida Holm", "Bergen", 40011, "vase", "refund"),
        ),
        (
            "This is Ravi Menon, Kochi. The mixer from order 42019 smells of smoke. "
            "Can you repair it?",
            _ticket("Ravi Menon", "Kochi", 42019, "mixer", "repair"),
        ),
        (
            "I would like a replacement for the wall clock, order 41230, it runs backwards. "
            "Elif Kaya, Izmir",
            _ticket("Elif Kaya", "Izmir", 41230, "wall clock", "replacement"),
        ),
        (
            "Hi, Sam Boyd in Leeds needs your advice: how do I clean the curtains of order 40522?",
            _ticket("Sam Boyd", "Leeds", 40522, "curtains", "advice"),
        ),
    ),
    texts=ABOUT_ORDERS,
)

ExampleName: TypeAlias = Literal["person", "ticket"]
EXAMPLES: Mapping[str, DemoExample] = MappingProxyType({"person": PERSON, "ticket": TICKET})


def upstream(example: DemoExample, seed: int) -> Iterator[Upstream]:
    """Endless messages, the same for the same seed: all texts in one order, then in another.

    One in `BROKEN_EVERY` is broken: in turn it is unreadable or far too long.
    """
    chance = random.Random(seed)
    texts = _shuffled_forever(example.texts, chance)
    number = 0
    while True:
        key = f"desk-{chance.randrange(_KEYS) + 1:02}".encode()
        yield Upstream(key, _broken(number) or next(texts).encode())
        number += 1


def _broken(number: int) -> bytes | None:
    turn, place = divmod(number, BROKEN_EVERY)
    if place != _BROKEN_AT:
        return None
    return UNREADABLE if turn % 2 == 0 else PASTED_LOG.encode()


def _shuffled_forever(texts: tuple[str, ...], chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(texts, len(texts))
