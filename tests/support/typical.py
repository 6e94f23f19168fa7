"""Twenty-five record types as people write them, each with answers of the model."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AnyUrl, BaseModel, ConfigDict, Field


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=80)
    age: int = Field(ge=0, le=130)


class Contact(BaseModel):
    name: str
    email: str | None = None
    phone: str | None = None


class Invoice(BaseModel):
    number: str = Field(pattern=r"^[A-Z]{2}-\d+$")
    total: Decimal
    currency: str = "EUR"
    due: date | None = None


class Line(BaseModel):
    sku: str
    quantity: int = 1
    note: str | None = None


class Order(BaseModel):
    id: str
    lines: list[Line] = Field(min_length=1)
    gift: bool = False


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Review(BaseModel):
    mood: Mood
    stars: int = Field(ge=1, le=5)
    topics: list[str] = Field(default_factory=list, max_length=5)


class Ticket(BaseModel):
    kind: Literal["refund", "repair", "advice"]
    urgent: bool = False
    summary: str = Field(default="", description="In one sentence")


class Address(BaseModel):
    street: str
    city: str
    country: str = Field(default="DE", min_length=2, max_length=2)


class Customer(BaseModel):
    name: str
    home: Address
    work: Address | None = None


class Meeting(BaseModel):
    title: str
    start: datetime
    people: list[str] = []
    place: str | None = Field(default=None, examples=["Room 3"])


class Product(BaseModel):
    name: str
    price: float | None = None
    url: AnyUrl | None = None


class Shipment(BaseModel):
    id: UUID
    weight_kg: Annotated[float, Field(gt=0)]
    fragile: bool = False


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str] = []


class Pet(BaseModel):
    animal: Annotated[Cat | Dog, Field(discriminator="kind")]


class Comment(BaseModel):
    text: str
    replies: list[Comment] = []


class Thread(BaseModel):
    first: Comment


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    code: str
    count: int = 0


class Sets(BaseModel):
    tags: set[str] = set()
    label: str = Field(default="none", alias="theLabel")


class Span(BaseModel):
    low: int
    high: int | None = None
    unit: Literal["m", "km"] = "m"


class Maybe(BaseModel):
    value: int | str | None = None


class Bytes(BaseModel):
    name: str
    raw: bytes = b""


# Something would be lost in these.


class Attributes(BaseModel):
    name: str
    attributes: dict[str, str]


class Anything(BaseModel):
    name: str
    extra: Any = None


class Pair(BaseModel):
    pair: tuple[float, float]


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Tree(BaseModel):
    name: str
    below: list[Tree] = []


class Known(BaseModel):
    """Null means that the text says so; left out means that it says nothing."""

    price: float | None = 1.0


ADDRESS = '{"street": "A 1", "city": "B", "country": null}'
TYPICAL: dict[type[BaseModel], tuple[str, ...]] = {
    Person: ('{"name": "Ada", "age": 36}',),
    Contact: ('{"name": "Ada", "email": null, "phone": "1"}',),
    Invoice: (
        '{"number": "AB-1", "total": 12.10, "currency": null, "due": null}',
        '{"number": "AB-1", "total": "0.30000000000000000001", "currency": "USD", "due": '
        '"2026-01-31"}',
    ),
    Order: (
        '{"id": "1", "lines": [{"sku": "a", "quantity": null, "note": null}, {"sku": "b", '
        '"quantity": 3, "note": "null"}], "gift": null}',
    ),
    Review: ('{"mood": "good", "stars": 5, "topics": null}',),
    Ticket: ('{"kind": "refund", "urgent": true, "summary": null}',),
    Customer: (
        f'{{"name": "A", "home": {ADDRESS}, "work": null}}',
        f'{{"name": "A", "home": {ADDRESS}, "work": {ADDRESS}}}',
    ),
    Meeting: ('{"title": "x", "start": "2026-01-31T08:00:00Z", "people": null, "place": null}',),
    Product: ('{"name": "x", "price": null, "url": "https://example.org/a"}',),
    Shipment: (
        '{"id": "12345678-1234-5678-1234-567812345678", "weight_kg": 1.50, "fragile": null}',
    ),
    Pet: (
        '{"animal": {"kind": "cat", "lives": null}}',
        '{"animal": {"kind": "dog", "tricks": null}}',
    ),
    Thread: (
        '{"first": {"text": "a", "replies": [{"text": "null", "replies": null}, '
        '{"text": "{\\"replies\\": null}", "replies": []}]}}',
    ),
    Closed: ('{"code": "a", "count": null}',),
    Sets: ('{"tags": ["a", "b"], "theLabel": null}',),
    Span: ('{"low": 1, "high": null, "unit": null}',),
    Maybe: ('{"value": null}', '{"value": "null"}', '{"value": 3}'),
    Bytes: ('{"name": "a", "raw": null}',),
    Address: (ADDRESS,),
    Line: ('{"sku": "a", "quantity": null, "note": null}',),
}
"""Types of which a strict schema can be derived, with answers under it."""

LOSING: dict[type[BaseModel], str] = {
    Attributes: "attributes is a mapping",
    Anything: "extra may be anything",
    Pair: "pair is a tuple",
    Open: "open to further fields",
    Tree: "its root refers to itself",
    Known: "null is not the default of price",
}
"""Types that are sent as they are, and why."""
