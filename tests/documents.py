"""Writes the generated blocks of the documents: `python -m tests.documents` after a change.

A block stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` on a page of docs/. A test
fails where a block is stale (tests/unit/test_documents.py), so that a page can't drift from the
code that it describes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from service.commands.plan import CPU_MS, CPU_SHARE_MAX, Demand, plan
from service.settings.wording import table as table_of_settings
from tests.unit.test_failure_table import table as table_of_failures

ROOT = Path(__file__).parent.parent
DOCS, SERVICE = ROOT / "docs", ROOT / "service"
GOLDEN_METRICS = ROOT / "tests" / "data" / "metrics.txt"

MODELS_TODAY = ("gpt-6-luna",)
"""Hosted models that README, documents and the chart's examples may name: they age, and a test
fails where one is named that does not stand here."""

FIRST_SETTINGS = (
    "kafka.bootstrap_servers",
    "kafka.group_id",
    "kafka.security.protocol",
    "input.topics",
    "input.start",
    "input.format",
    "input.text_field",
    "output.topic",
    "output.key_field",
    "dead_letters.topic",
    "extraction.record",
    "extraction.instructions",
    "extraction.cardinality",
    "extraction.model",
    "extraction.mode",
    "extraction.output_tokens_max",
    "extraction.call_timeout_s",
    "limits.concurrency",
    "limits.spend_usd_per_hour",
    "delivery.mode",
    "delivery.ordering",
)
"""What most people touch; the page of settings begins with them."""

LOADS = ((10, 2.0), (50, 2.0), (200, 2.0), (200, 0.5), (1000, 0.5), (1000, 5.0))
"""Messages a second, and the seconds that half of the calls take, for the table of sizes."""

WORDS = (
    (
        "message",
        "one record of an input topic: text, key, headers, timestamp, coordinates",
        "Message",
    ),
    ("coordinates", "topic, partition and offset of a message", "Coordinates"),
    ("record", "a validated value that the model filled; never a Kafka record", "Record"),
    ("call", "one request to the model", "OpenAIExtractor"),
    ("route", "one endpoint, model and parameters, with its own limits and failures", "Route"),
    (
        "re-ask",
        "a further call that tells the model why its answer did not validate",
        "Conversation",
    ),
    ("retry", "a further call after a transient failure", "Backoff"),
    ("hedge", "a second call beside one that is slow", "Hedges"),
    ("probe", "a fixed tiny call that looks whether a route answers again", "Probing"),
    ("slot", "the right to have one call in flight", "Slots"),
    ("in flight", "a call for the message is running", "Stage"),
    ("window", "all messages that are taken and not finished", "Window"),
    ("lane", "messages whose outcomes keep their order: of one key, or of one partition", "Lane"),
    (
        "outcome",
        "what became of a message: extracted, rejected, passed on, skipped, postponed",
        "Extracted",
    ),
    ("finished", "Kafka has acknowledged the outcome", "PartitionTracker"),
    ("next offset", "the smallest offset that is not finished; a commit stores it", "Progress"),
    ("completed map", "offsets beyond the next one that are finished too", "core/completed.py"),
    ("admission", "whether one more call may start now: the smallest of all limits", "Admission"),
    ("pace", "calls a second that a route with a hidden limit was found to accept", "Pace"),
    ("budget", "requests, tokens or dollars that may be used in a time", "Budget"),
    ("share", "the part of the budgets that belongs to one worker", "core/admission/shares.py"),
    ("circuit", "open while everything on a route fails; then only probes go out", "Circuit"),
    ("guard", "stops intake when too much is rejected", "Guard"),
    ("drain", "take nothing more and finish what is in flight, under a deadline", "Pipeline"),
    ("epoch", "the number of the assignment under which a partition is held", "Given"),
    ("holding", "a partition under one epoch, with its tracker, lanes and messages", "Holding"),
    (
        "held partition",
        "a partition that the group has given to this member: what Kafka stores of it",
        "HeldPartition",
    ),
    (
        "restore",
        "reading a partition's offset and map before its first message is taken",
        "Restore",
    ),
    ("fence", "ending an older owner's transactions by a new epoch of its id", "Transactions"),
    ("account", "what was spent on a partition in the last hour; it moves with it", "Purse"),
    ("mark", "who wrote a commit's metadata, when and about which topic", "Mark"),
    ("suspect", "a message at which the process may have died; it runs alone", "Holding"),
    ("suspicion", "what speaks against a message that fails while others succeed", "Suspicion"),
    ("dead letter", "a rejected message with the reason, in a topic of its own", "Letter"),
    ("redrive", "sending dead letters to the input again", "Redrive"),
)
"""Each word of the design, its one meaning, and the class (or file) that is its home."""

Table = list[tuple[str, ...]]


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table, whose first row is its head."""
    head, *others = rows
    lines = [head, ("---",) * len(head), *others]
    return "".join(f"{'| ' + ' | '.join(cells) + ' |'}\n" for cells in lines)


def first_settings() -> str:
    """The rows of the table of settings that most people need, in this order."""
    head, line, *rows = table_of_settings().splitlines(keepends=True)
    by_name = {row.split("`")[1]: row for row in rows}
    return head + line + "".join(by_name[name] for name in FIRST_SETTINGS)


def metrics() -> str:
    """Every metric of the golden list, under the name that Prometheus stores."""
    rows: Table = [("metric", "type", "labels", "meaning")]
    for line in GOLDEN_METRICS.read_text().splitlines():
        if not line.startswith("#"):
            name, kind, labels, meaning = line.split(" | ", 3)
            end = "_total" if kind == "counter" else ""
            named = "" if labels == "-" else labels.replace(",", ", ")
            rows.append((f"`{name}{end}`", kind, named, meaning))
    return markdown(rows)


def words() -> str:
    """The glossary, each word with a link to its home."""
    rows: Table = [("word", "meaning", "home")]
    for word, meaning, home in WORDS:
        file = SERVICE / home if home.endswith(".py") else home_of(home)
        link = f"[`{file.name}`](../{file.relative_to(ROOT).as_posix()})"
        rows.append((word, meaning, link if home.endswith(".py") else f"`{home}` in {link}"))
    return markdown(rows)


def home_of(name: str) -> Path:
    """The file of service/ that defines this class; fails where there is none, or more than one."""
    found = [
        file
        for file in sorted(SERVICE.rglob("*.py"))
        if f"\nclass {name}" in (text := file.read_text())
        and any(
            isinstance(node, ast.ClassDef) and node.name == name for node in ast.parse(text).body
        )
    ]
    if len(found) != 1:
        raise ValueError(f"{name} is defined in {len(found)} files: correct WORDS")
    return found[0]


def files() -> str:
    """What each file of service/ is: the first paragraph of its docstring, folder by folder."""
    return "\n".join(_folder(one) for one in _folders(SERVICE))


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    for below in sorted(folder.iterdir()):
        if (below / "__init__.py").is_file():
            yield from _folders(below)


def _folder(folder: Path) -> str:
    name = folder.relative_to(ROOT).as_posix()
    rows: Table = [("file", "what it is")]
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            link = f"[`{file.name}`](../{file.relative_to(ROOT).as_posix()})"
            rows.append((link, claim(file).replace("|", "\\|")))
    return f"### `{name}/`\n\n{claim(folder / '__init__.py')}\n\n{markdown(rows)}"


def claim(file: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(said.split("\n\n")[0].split())


def sizes() -> str:
    """What `sluice plan` answers to some loads."""
    head = ("messages/s", "half of the calls take", "workers", "`limits.concurrency` of each")
    rows: Table = [(*head, "partitions", "cores busy")]
    for rate, latency_s in LOADS:
        found = plan(Demand(messages_per_s=rate, latency_median_s=latency_s))
        slots, cores = f"{found.slots_per_worker:,}", f"{found.cores:.2g}"
        numbers = (f"{found.workers}", slots, f"{found.partitions}", cores)
        rows.append((f"{rate:,}", f"{latency_s:g} s", *numbers))
    most = 1000 * CPU_SHARE_MAX / CPU_MS
    return markdown(rows) + (
        f"\nA worker is planned with {CPU_MS:g} ms of CPU a call and at most {CPU_SHARE_MAX:.0%} "
        f"of its core: {most:,.0f} calls a second.\n"
    )


BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "failures.md": {"failures": table_of_failures},
    "how-it-works.md": {"words": words, "files": files},
    "metrics.md": {"metrics": metrics},
    "operations.md": {"sizes": sizes},
    "settings.md": {"first-settings": first_settings, "settings": table_of_settings},
}
"""Pages of docs/, the names of their blocks, and what belongs into each."""


def written(page: str) -> str:
    """The page with its blocks as they should be."""
    text = (DOCS / page).read_text()
    for name, content in BLOCKS[page].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"docs/{page} has no block {name!r}")
        text = before + begin + content() + end + rest.partition(end)[2]
    return text


def main() -> None:
    for page in BLOCKS:
        text = written(page)
        if (DOCS / page).read_text() != text:
            (DOCS / page).write_text(text)
            print(f"docs/{page}")


if __name__ == "__main__":
    main()
