"""The documents: generated blocks are up to date, links lead somewhere, README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings.wording import every_setting
from tests.documents import (
    BLOCKS,
    DOCS,
    FIRST_SETTINGS,
    MODELS_TODAY,
    ROOT,
    SERVICE,
    claim,
    written,
)

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    ROOT / "deploy" / "helm" / "sluice" / "README.md",
]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
INDEX = DOCS / "README.md"

README_LINES_MAX, README_WORDS_MAX = 150, 1200
"""Read in five minutes."""

MEASURED = re.compile(r"\d[\d.,]* ?(?:messages/s|msg/s|ms of CPU|MB of memory|ms\b|% busy)")
"""A figure that somebody measured or computed."""
COMMAND = re.compile(r"`[^`]*(?:python -m (?:tests|service)|sluice )[^`]*`")


def prose(text: str) -> str:
    """The text without blocks of code, whose lines are neither headings nor links."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def without_generated(text: str) -> str:
    return re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page.read_text()), flags=re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return found


def broken(page: Path) -> Iterator[str]:
    """Relative links whose file, or whose heading in it, is not there."""
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", BLOCKS)
def test_generated_blocks_are_up_to_date(page: str) -> None:
    """A page has what the code says; `python -m tests.documents` writes it anew."""
    assert (DOCS / page).read_text() == written(page)


def test_every_file_says_what_it_is() -> None:
    """The map of files takes its sentence from the file itself, which ends like one."""
    for file in SERVICE.rglob("*.py"):
        assert claim(file).endswith((".", "!")), file


def test_the_first_settings_exist() -> None:
    """Twenty or so, each once, each with that name."""
    names = {".".join(place) for place in every_setting()}
    assert len(FIRST_SETTINGS) == len(set(FIRST_SETTINGS)) <= 25
    assert set(FIRST_SETTINGS) <= names


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    """The file is there, and so is the heading."""
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A file or a heading that is missing is told; what stands in code is not looked at."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One `name`, here\n\n[a](page.md#one-name-here) [b](#two) [c](gone.md)\n\n"
        "```\n# three\n[d](gone.md)\n```\n"
    )
    assert list(broken(page)) == ["#two", "gone.md"]
    assert anchors(page) == {"one-name-here"}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_settings_and_metrics_that_are_named_exist(page: Path) -> None:
    """A page that names a setting or a metric that is gone would send its reader astray."""
    places = {place[:end] for place in every_setting() for end in range(1, len(place) + 1)}
    sections = {place[0] for place in every_setting()}
    text = without_generated(prose(page.read_text()))
    names = [tuple(one.split(".")) for one in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text)]
    named = [name for name in names if name[0] in sections and name[-1] != "py"]
    assert [name for name in named if name not in places] == []
    metrics = re.findall(r"^\| `(sluice_\w+)`", (DOCS / "metrics.md").read_text(), flags=re.M)
    ends = re.compile(r"_(bucket|sum|count)$")
    used = re.findall(r"`(sluice_[a-z_]+)[`{]", text)
    assert [name for name in used if ends.sub("", name) not in metrics] == []


def test_readme_is_short() -> None:
    """Five minutes: what it is, whether it fits, a first try, a first topic of one's own."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES_MAX
    assert len(re.findall(r"\w[\w'.-]*", prose(text))) <= README_WORDS_MAX


def test_figures_of_the_readme_were_measured() -> None:
    """Each figure of its promises stands in docs/measured.md too."""
    text = (ROOT / "README.md").read_text()
    promises = text.split("## Promises and limits\n")[1].split("\n## ")[0]
    measured = (DOCS / "measured.md").read_text()
    figures = re.findall(r"\d[\d.,]*\d", promises)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in measured] == []


def test_the_index_names_every_page() -> None:
    """Each page of docs/ is linked from docs/README.md, and each decision from its own index."""
    for folder in (DOCS, DOCS / "decisions"):
        links = set(re.findall(r"\]\(([\w-]+\.md)", (folder / "README.md").read_text()))
        there = {page.name for page in folder.glob("*.md")} - {"README.md"}
        assert links == there
    assert "(decisions/README.md)" in INDEX.read_text()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_figure_names_its_command(page: Path) -> None:
    """A measured figure stands in a generated block, or its section names what measures it; a
    decision, which is not measured again, may say in words how it was measured."""
    how = re.compile(r"[Mm]easured (?:with|by|on)") if page.parent.name == "decisions" else COMMAND
    for section in re.split(r"^(?=#+ )", without_generated(page.read_text()), flags=re.M):
        if MEASURED.search(section):
            assert COMMAND.search(section) or how.search(section), section.splitlines()[0]


def test_words_of_a_figure() -> None:
    """Measured figures are known by their units, and settings' seconds are none of them."""
    assert MEASURED.search("does 1,000 messages/s")
    assert MEASURED.search("costs 0.2 ms of CPU")
    assert not MEASURED.search("waits for 10 s")


HOSTED = re.compile(r"\b(?:gpt|claude|gemini|o[1-9]|mistral|deepseek|grok)-[\w.-]*\w")
"""How hosted models are called."""


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((ROOT / "deploy").rglob("*.yaml"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_hosted_models_are_todays(page: Path) -> None:
    """A model that is named to be copied has not been shut down: they stand in one place."""
    if page.name != "CHANGELOG.md" and "decisions" not in page.parts:  # they tell of the past
        assert set(HOSTED.findall(page.read_text())) <= set(MODELS_TODAY)
