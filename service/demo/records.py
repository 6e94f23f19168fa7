"""The records of the demo: `Person`, the default of `extraction.record`, and a support ticket."""

from typing import Literal

from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person who is mentioned in the text."""

    name: str = Field(min_length=1, max_length=80, description="The person's name")
    age: int = Field(ge=0, le=130, description="The person's age in years")


class Ticket(BaseModel):
    """What a customer wants, about which order."""

    customer: str = Field(min_length=1, max_length=60, description="The customer's name")
    city: str = Field(min_length=1, max_length=40, description="Where the customer lives")
    order: int = Field(ge=10_000, le=99_999, description="The order's number, five digits")
    product: str = Field(min_length=1, max_length=40, description="What the text is about")
    wish: Literal["refund", "replacement", "repair", "advice"] = Field(
        description="What the customer asks for"
    )
