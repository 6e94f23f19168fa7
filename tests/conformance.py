"""Answers as providers give them, each through the real extractor: `python -m tests.conformance`.

Prints provider, case, what should become of the message, and what does. The answers stand in
tests/data/provider_answers.jsonl and tests/data/more_answers.jsonl, one JSON object a line:
`provider`, `case`, `mode`, `status`, `headers`, `body` (JSON), `text` (raw) or `chunks` (events of
a stream), `cardinality` where it is many, and `right`:

    record, records N          an output, or N of them, after one call
    works: other name          an output, after a call without the parameter that was refused
    told                       an output, and a warning that the text was cut
    filtered, refused, truncated, too_long, bad_request, invalid    a dead letter with that reason
    truncated, says reasoning  likewise, with that word in its detail
    ask again, then invalid    as an answer that does not validate
    service REASON             about everybody; `names mode`: its remedy names extraction.mode
    refresh token              service credentials, and the key is read anew first
    transient, overloaded      tried again
    wait 34 s                  tried again after so long
    A/B                        either
    … after N                  once the provider has answered others and refused it again

    python -m tests.conformance            every answer
    python -m tests.conformance groq mode  those whose provider or case holds one of the words
    python -m tests.conformance --wrong    only what is judged wrong
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.core.errors import ServiceFailure, TransientFailure, Unclear
from service.core.messages import Extracted, Rejected
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.support.endpoint import MODEL, Asked, Endpoint, Step

DATA = Path(__file__).parent / "data"
FILES = ("provider_answers.jsonl", "more_answers.jsonl")
GOOD = "Bo is 5"
LONG = "Ann is 30. " + "She has lived in the town for as long as anybody remembers. " * 400
"""Far over 4,096 tokens: for the answers that a server gives after it has cut the text."""
TRIES_MAX = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One answer, and what should become of the message that gets it."""

    provider: str
    case: str
    right: str
    mode: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    cardinality: str = "one"
    streaming: bool = False

    @property
    def text(self) -> str:
        return LONG if self.right == "told" else "Ann is 30"


@dataclass(slots=True)
class Got:
    """What became of the message."""

    word: str
    detail: str = ""
    calls: int = 0
    records: int = 0
    retry_after_s: float | None = None
    refresh: bool = False
    logged: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wait = f", wait {self.retry_after_s:g} s" if self.retry_after_s else ""
        return f"{self.word}{wait} ({self.calls} calls)"


def cases() -> list[Case]:
    """All answers of both files."""
    lines = [line for name in FILES for line in (DATA / name).read_text().splitlines() if line]
    return [_case(json.loads(line)) for line in lines]


def _case(row: Mapping[str, Any]) -> Case:
    headers = dict(row["headers"])
    if "chunks" in row:
        events = [c if isinstance(c, str) else json.dumps(c) for c in row["chunks"]]
        body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
        headers["content-type"] = "text/event-stream"
    else:
        body = row["text"] if "text" in row else json.dumps(row["body"])
    return Case(
        row["provider"],
        row["case"],
        row["right"],
        row["mode"],
        row["status"],
        headers,
        body.encode(),
        row.get("cardinality", "one"),
        "chunks" in row,
    )


def script(case: Case) -> Any:
    """The case's answer for its text, a good one for every other."""
    given = Step("given", status=case.status, headers=tuple(case.headers.items()), body=case.body)
    parameter = _refused_parameter(case)

    def step(asked: Asked) -> Step:
        if asked.text != case.text or (parameter and parameter not in asked.body):
            return Step()
        return given

    return step


def _refused_parameter(case: Case) -> str | None:
    if not case.right.startswith("works"):
        return None
    said = json.loads(case.body)
    return str((said[0] if isinstance(said, list) else said)["error"]["param"])


async def give(case: Case) -> Got:
    """The case's message through an extractor of its own, on an endpoint of its own."""
    async with Endpoint(script=script(case)) as endpoint:
        os.environ["OPENAI_BASE_URL"] = endpoint.url
        settings = Settings(
            extraction={
                "model": MODEL,
                "mode": case.mode,
                "call_timeout_s": 5,
                "cardinality": case.cardinality,
                "streaming": case.streaming,
            },
            delivery={"ordering": "none"},
        )
        extractor = OpenAIExtractor(settings, lambda _: None)
        await extractor.start()
        try:
            with _logged() as lines:
                got = await _asked(extractor, case)
            got.logged = lines
            got.calls = endpoint.calls[case.text]
            return got
        finally:
            await extractor.stop()


async def _asked(extractor: OpenAIExtractor, case: Case) -> Got:
    """Where only evidence can tell, another message is answered and this one is asked again."""
    progress: object | None = None
    sent: list[object] = []

    async def publish(part: object) -> None:
        sent.append(part)

    for _ in range(TRIES_MAX):
        try:
            if case.streaming:
                outcome = await extractor.stream(case.text, progress, publish)
            else:
                outcome = await extractor.call(case.text, progress)
        except Unclear as failure:
            progress = failure.progress
            await extractor.call(GOOD, None)
        except ServiceFailure as failure:
            refresh = failure.reason == "credentials"
            return Got(f"service {failure.reason}", failure.remedy, refresh=refresh)
        except TransientFailure as failure:
            return Got(f"transient {failure.reason}", retry_after_s=failure.retry_after_s)
        else:
            return _outcome(outcome, len(sent))
    return Got("service unclear")


def _outcome(outcome: Extracted | Rejected, sent: int) -> Got:
    match outcome:
        case Extracted(records=records):
            return Got("record", records=len(records) + sent)
        case Rejected(reason=reason, detail=detail):
            return Got(reason.value, detail)


def is_right(case: Case, got: Got) -> bool:
    """Whether it is what the case says, or one of the two things."""
    right = case.right.partition(" after ")[0]
    return any(_fits(one.strip(), got) for one in right.split("/"))


def _fits(right: str, got: Got) -> bool:
    match right.split():
        case ["record"]:
            return got.word == "record" and got.calls == 1 and not got.logged
        case ["records", number]:
            return got.word == "record" and got.records == int(number) and got.calls == 1
        case ["works:", *_]:
            return got.word == "record" and got.calls == 2
        case ["told"]:
            return got.word == "record" and any("cut" in line for line in got.logged)
        case ["re-ask"]:
            return got.word == "invalid" and got.calls > 1
        case ["ask", "again,", "then", "invalid"]:
            return got.word == "invalid" and got.calls == 3
        case ["service", reason, *rest]:
            named = "mode" not in rest or "extraction.mode" in got.detail
            return got.word == f"service {reason}" and named
        case ["refresh", *_]:
            return got.refresh
        case ["transient"]:
            return got.word.startswith("transient ")
        case ["overloaded"]:
            return got.word == "transient overloaded"
        case ["wait", seconds, "s"]:
            return got.word.startswith("transient ") and got.retry_after_s == float(seconds)
        case [reason, "says", word]:
            return got.word == reason.strip(",") and word in got.detail
        case _:
            return got.word == right


@contextmanager
def _logged() -> Iterator[list[str]]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, logger = Keep(logging.WARNING), logging.getLogger("service")
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


async def table(chosen: Sequence[Case]) -> list[tuple[Case, Got]]:
    """One after the other: each needs the environment for itself."""
    return [(case, await give(case)) for case in chosen]


def _print(rows: Sequence[tuple[Case, Got]], *, only_wrong: bool) -> int:
    wrong = 0
    for case, got in rows:
        right = is_right(case, got)
        wrong += not right
        if not (right and only_wrong):
            mark = "✓" if right else "✗"
            print(f"{mark} {case.provider:12} {case.case[:44]:44} {case.right:28} {got}")
    print(f"{len(rows) - wrong} of {len(rows)} answers are judged right")
    return 1 if wrong else 0


def main(words: Sequence[str]) -> int:
    os.environ.pop("OPENAI_API_KEY", None)
    wanted = [word for word in words if not word.startswith("--")]
    chosen = [
        case
        for case in cases()
        if not wanted or any(word in f"{case.provider} {case.case}" for word in wanted)
    ]
    rows = asyncio.run(table(chosen))
    return _print(rows, only_wrong="--wrong" in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
