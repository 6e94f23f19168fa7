"""The local model really extracts: sentences that it has not been shown, right answers known."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.core.messages import Extracted, Rejected
from service.demo.examples import PERSON
from service.demo.model import MODEL_NAME, local_model
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.started import local_model_is_here

RIGHT_AT_LEAST = 14

HELD_OUT = (
    ("Dolores Quintanilla is 63 and teaches tango in the town hall.", "Dolores Quintanilla", 63),
    ("The goalkeeper, Emil Sandström, 28, kept the ball as a souvenir.", "Emil Sandström", 28),
    ("At the age of 91, Takumi Hoshino bought his first bicycle.", "Takumi Hoshino", 91),
    (
        "My neighbour Babajide Ogunleye is 42 years old and sings in the stairwell.",
        "Babajide Ogunleye",
        42,
    ),
    ("A 35-year-old baker called Mirela Popescu won the lottery twice.", "Mirela Popescu", 35),
    ("Little Ottilie is 5 and counts everything in ducks.", "Ottilie", 5),
    ("The court heard from Gareth Llewellyn, aged 57, a roofer.", "Gareth Llewellyn", 57),
    ("Shirin Moradi turned 30 on the night train.", "Shirin Moradi", 30),
    (
        "Professor Agnieszka Nowicka, 68, grows tomatoes in the lecture hall.",
        "Agnieszka Nowicka",
        68,
    ),
    ("We hired Kwabena Asante, who is 24, to look after the lighthouse.", "Kwabena Asante", 24),
    ("Juanita Morales has been a firefighter for years and is now 39.", "Juanita Morales", 39),
    ("Mr. Heinrich Oberländer, 84, still answers letters by hand.", "Heinrich Oberländer", 84),
    ("The winner of the spelling contest is Saoirse Keane, 12 years old.", "Saoirse Keane", 12),
    ("Vikram Deshpande (47) found a snake in the photocopier.", "Vikram Deshpande", 47),
    ("His sister Leilani is 18 and builds surfboards.", "Leilani", 18),
    ("Only Mehmet Yildirim, 50, knew how to stop the carousel.", "Mehmet Yildirim", 50),
    ("It is said that Evangelia Stavrou, 74, has never once been late.", "Evangelia Stavrou", 74),
    ("Bongani Dlamini is a 33-year-old tailor who dreams of snow.", "Bongani Dlamini", 33),
    ("For her birthday, Charlotte Duvivier, now 16, asked for a goat.", "Charlotte Duvivier", 16),
    ("The ferry is steered by Nikolai Sokolov, who is 61 and half asleep.", "Nikolai Sokolov", 61),
)
"""Text, name, age; none of them stands in service/."""

TITLES = re.compile(r"^(mr|mrs|ms|dr|professor|little|old|young)\.? ", re.IGNORECASE)
"""Part of the name or not: both are right."""


@pytest.fixture
async def extractor(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenAIExtractor]:
    """The service's own extractor in front of the local model, set as the demo sets it."""
    await local_model_is_here()
    shots = [{"text": text, "records": dict(record)} for text, record in PERSON.shots]
    settings = Settings.model_validate(
        {
            "extraction": {
                "record": PERSON.record,
                "model": MODEL_NAME,
                "temperature": 0,
                "output_tokens_max": 128,
                "examples": shots,
            }
        }
    )
    async with local_model() as base_url:
        monkeypatch.setenv("OPENAI_BASE_URL", base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        extractor = OpenAIExtractor(settings, lambda event: None)
        await extractor.start()
        yield extractor
        await extractor.stop()


def is_right(outcome: Extracted | Rejected, name: str, age: int) -> bool:
    if not isinstance(outcome, Extracted):
        return False
    record = json.loads(outcome.records[0].json)
    return TITLES.sub("", record["name"]) == TITLES.sub("", name) and record["age"] == age


def test_held_out() -> None:
    """None of the sentences, and none of their people, stands anywhere in service/."""
    service = Path(__file__).parents[2] / "service"
    source = "\n".join(file.read_text(encoding="utf-8") for file in service.rglob("*.py"))
    assert [text for text, name, _ in HELD_OUT if text in source or name in source] == []
    assert len(HELD_OUT) == 20


@pytest.mark.real_model
@pytest.mark.timeout(300)
async def test_person_is_right(extractor: OpenAIExtractor) -> None:
    """At least 14 of 20 sentences give the right person, name and age."""
    wrong = []
    # One after the other: batching changes the last bits of the model's arithmetic.
    for text, name, age in HELD_OUT:
        outcome = await extractor.call(text, None)
        if not is_right(outcome, name, age):
            wrong.append((text, outcome))
    assert len(HELD_OUT) - len(wrong) >= RIGHT_AT_LEAST, wrong
