"""What the benchmarks' endpoint answers, and what all Python peers validate."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person that the text speaks of."""

    name: str = Field(description="As written in the text")
    age: int = Field(ge=0, description="In years")
    began_us: int = Field(description="When the call began")
    ended_us: int = Field(description="When the call ended")


class People(BaseModel):
    """All persons that the text speaks of."""

    records: list[Person]
