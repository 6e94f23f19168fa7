"""Log lines: their shape, and that no text of a message or an answer gets into them."""

import asyncio
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime

import pydantic
import pytest

from service.core.errors import CannotRun, PublishFailed
from service.settings import TelemetrySettings
from service.telemetry.logs import CHAIN_MAX, configured, named, shown

CANARY = "canary-5c1f"

ours = logging.getLogger("service.kafka.source")


class Age(pydantic.BaseModel):
    age: int


def leaky() -> Exception:
    """An exception whose text holds what was parsed, as pydantic's do."""
    with pytest.raises(pydantic.ValidationError, match=CANARY) as caught:
        Age.model_validate({"age": CANARY})
    return caught.value


class Lines(io.StringIO):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def objects(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def text() -> Iterator[Lines]:
    lines = Lines()
    with configured(TelemetrySettings(log_level="DEBUG"), lines.counted.append, lines):
        yield lines


@pytest.fixture
def objects() -> Iterator[Lines]:
    lines = Lines()
    settings = TelemetrySettings(log_level="DEBUG", log_format="json")
    with configured(settings, lines.counted.append, lines):
        yield lines


# --- shape ---


def test_line_for_people(text: Lines) -> None:
    """Time in UTC, level, our short name, text and the extra fields, on one line."""
    ours.warning("held %d", 3, extra={"partition": "texts[0]", "offset": 7})
    time, line = text.getvalue().split(" ", 1)
    assert datetime.strptime(time, "%H:%M:%S.%f")
    assert line == "WARNING kafka.source   held 3 partition=texts[0] offset=7\n"


def test_line_for_machines(objects: Lines) -> None:
    """One JSON object with fixed names, the extra fields beside them."""
    ours.info("held %d", 3, extra={"partition": 0, "reason": "täuscht"})
    (line,) = objects.objects()
    assert str(line.pop("ts")).endswith("Z")
    assert line == {
        "level": "info",
        "logger": "service.kafka.source",
        "message": "held 3",
        "partition": 0,
        "reason": "täuscht",
    }


def test_extra_fields_cannot_forge_the_fixed_ones(objects: Lines) -> None:
    """A field named like a fixed one does not replace it."""
    ours.info("true", extra={"level": "forged", "ts": "forged"})
    (line,) = objects.objects()
    assert line["level"] == "info"
    assert line["ts"] != "forged"


@pytest.mark.parametrize("format_", ["text", "json"])
def test_a_line_is_a_line(format_: str) -> None:
    """A line break in the text or a field cannot make a second line."""
    lines = Lines()
    settings = TelemetrySettings.model_validate({"log_format": format_})
    with configured(settings, None, lines):
        ours.warning("one\ntwo", extra={"key": "three\nfour"})
    assert len(lines.getvalue().splitlines()) == 1


@pytest.mark.parametrize("format_", ["text", "json"])
def test_a_line_says_which_worker_it_is_of(format_: str) -> None:
    """Where there are several: of each line, libraries' too. Otherwise nothing of the kind."""
    settings = TelemetrySettings.model_validate({"log_format": format_})
    for worker, said in ((2, {"text": "worker=2", "json": '"worker": 2'}[format_]), (None, None)):
        lines = Lines()
        with configured(settings, None, lines, worker=worker):
            ours.warning("one", extra={"key": "three"})
            logging.getLogger("aiohttp").warning("two")
        for line in lines.getvalue().splitlines():
            assert said in line if said else "worker" not in line


def test_level_is_kept() -> None:
    """Lines below telemetry.log_level are not written."""
    lines = Lines()
    with configured(TelemetrySettings(log_level="WARNING"), None, lines):
        ours.info("quiet")
        ours.warning("loud")
    assert "quiet" not in lines.getvalue()
    assert "loud" in lines.getvalue()


def test_warnings_and_errors_are_counted(text: Lines) -> None:
    """Each warning and error that is written is counted, nothing else is."""
    ours.debug("1")
    ours.info("2")
    ours.warning("3")
    ours.error("4")
    ours.critical("5")
    logging.getLogger("instructor").error("6")
    assert text.counted == ["warning", "error", "error"]


def test_logging_is_as_before_afterwards() -> None:
    """Level, handlers and the display of warnings come back."""
    root = logging.getLogger()
    before = (root.level, root.handlers[:], warnings.showwarning)
    with configured(TelemetrySettings(), None, Lines()):
        assert (root.level, root.handlers[:], warnings.showwarning) != before
    assert (root.level, root.handlers[:], warnings.showwarning) == before


# --- nothing gets out ---


@pytest.mark.parametrize("name", ["instructor", "instructor.v2.retry", "instructor.v2"])
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR, logging.CRITICAL])
def test_instructor_is_silent(text: Lines, name: str, level: int) -> None:
    """It logs answers, at ERROR too: none of its lines is written at any level."""
    logging.getLogger(name).log(level, "answer: %s", CANARY)
    assert text.getvalue() == ""


@pytest.mark.parametrize("name", ["openai._base_client", "httpx2", "httpcore2.http11", "aiokafka"])
def test_bodies_at_debug_stay_inside(text: Lines, name: str) -> None:
    """With our own level at DEBUG libraries still don't get to log their bodies."""
    logging.getLogger(name).debug("Request options: %s", {"text": CANARY})
    ours.debug("our own")
    assert CANARY not in text.getvalue()
    assert "our own" in text.getvalue()


@pytest.mark.parametrize(
    ("name", "level", "written"),
    [
        ("httpx2", "INFO", False),
        ("openai._base_client", "INFO", False),
        ("aiokafka.consumer.group_coordinator", "INFO", False),
        ("aiokafka.consumer.group_coordinator", "DEBUG", True),
        ("of.the.user", "INFO", True),
    ],
)
def test_the_talkative_are_heard_on_request(name: str, level: str, written: bool) -> None:
    """Libraries that log each request or rebalance are heard from WARNING on, others, and with
    DEBUG all of them, from INFO on."""
    lines = Lines()
    with configured(TelemetrySettings.model_validate({"log_level": level}), None, lines):
        logging.getLogger(name).info("a line")
    assert bool(lines.getvalue()) is written


def test_names_that_only_look_alike(text: Lines) -> None:
    """`instructors` is not `instructor`."""
    logging.getLogger("instructors").error("heard")
    assert "heard" in text.getvalue()


@pytest.mark.parametrize("fixture", ["text", "objects"])
def test_traceback_without_its_text(request: pytest.FixtureRequest, fixture: str) -> None:
    """A foreign exception is logged as its type and frames: pydantic's text holds the input."""
    lines: Lines = request.getfixturevalue(fixture)
    try:
        raise RuntimeError(CANARY) from leaky()
    except RuntimeError:
        ours.exception("a validator failed")
    written = lines.getvalue()
    assert "ValidationError" in written
    assert "RuntimeError" in written
    assert "test_logs.py" in written
    assert CANARY not in written


def test_exception_in_json_is_a_field(objects: Lines) -> None:
    """The frames stand in `exception`, so that one event is one line."""
    try:
        raise KeyError(CANARY)
    except KeyError:
        ours.exception("no such")
    (line,) = objects.objects()
    assert str(line["exception"]).endswith("\nKeyError")


@pytest.mark.parametrize("fixture", ["text", "objects"])
def test_exception_as_argument_or_field(request: pytest.FixtureRequest, fixture: str) -> None:
    """An exception that is formatted into a line or hangs on it shows its type alone."""
    lines: Lines = request.getfixturevalue(fixture)
    error = leaky()
    logging.getLogger("aiokafka").error("Unexpected error: %s in %s", error, "topic")
    logging.getLogger("some").error(error)
    ours.error("failed: %r", error, extra={"error": error})
    assert CANARY not in lines.getvalue()
    assert lines.getvalue().count("ValidationError") == 4
    assert "in topic" in lines.getvalue()


def test_our_own_errors_say_what_to_do() -> None:
    """Texts of our errors and of the operating system are safe, and are shown."""
    assert named(CannotRun("Topic texts is missing")).endswith("CannotRun: Topic texts is missing")
    assert (
        named(ConnectionRefusedError(111, CANARY)) == "ConnectionRefusedError: Connection refused"
    )
    assert named(ValueError(CANARY)) == "ValueError"
    assert named(OSError(CANARY)) == "OSError"


def test_every_member_of_a_group_is_shown() -> None:
    """A task group's exceptions are named one by one, without foreign texts."""
    try:
        raise ExceptionGroup(CANARY, [ValueError(CANARY), PublishFailed("not acknowledged")])
    except ExceptionGroup as group:
        text = shown(group)
    assert CANARY not in text
    assert "1 of 2:" in text
    assert "  ValueError" in text
    assert "PublishFailed: not acknowledged" in text


def test_large_groups_end() -> None:
    """A group of thousands shows the first few and says how many there are."""
    text = shown(ExceptionGroup("many", [ValueError() for _ in range(5000)]))
    assert text.count("ValueError") < CHAIN_MAX
    assert " more" in text


def test_circles_end() -> None:
    """An exception that causes itself is shown once."""
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert shown(one).count("ValueError") == 1


def test_asyncio_hides_callbacks_and_tasks(text: Lines) -> None:
    """asyncio puts reprs of tasks, callbacks and exceptions into its text: they are cut off."""
    loop = asyncio.new_event_loop()

    async def fail() -> None:
        raise leaky()

    task = loop.create_task(fail(), name="lost")
    loop.call_soon(lambda argument: [][0], CANARY)
    loop.run_until_complete(asyncio.sleep(0.01))
    del task
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert "Task exception was never retrieved" in text.getvalue()
    assert "Exception in callback" in text.getvalue()
    assert CANARY not in text.getvalue()


def test_python_warnings_without_their_text(text: Lines) -> None:
    """pydantic warns with the value that it is about: only category and place are logged."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning(UserWarning(CANARY), UserWarning, "records.py", 7)
    assert "UserWarning at records.py:7" in text.getvalue()
    assert CANARY not in text.getvalue()


def test_broken_line_does_not_show_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """A line whose arguments don't fit says where it is; logging's own report shows them all."""
    lines = Lines()
    with configured(TelemetrySettings(), None, lines):
        ours.error("%d", CANARY)
    assert "a log line of service.kafka.source:" in lines.getvalue()
    assert CANARY not in lines.getvalue() + "".join(capsys.readouterr())


def test_a_library_repeats_itself_once(text: Lines) -> None:
    """A line that comes many times a second is written once, then with how many were kept back."""
    library = logging.getLogger("aiokafka")
    for port in range(100):
        library.error("Unable connect to %s", port)
    assert len(text.getvalue().splitlines()) == 1
    later = logging.makeLogRecord(
        {"name": "aiokafka", "levelno": 40, "levelname": "ERROR", "msg": "Unable connect to %s"}
    )
    later.created += 11
    library.handle(later)
    assert text.getvalue().splitlines()[-1].endswith("kept_back=99")


def test_our_own_lines_are_never_kept_back(text: Lines) -> None:
    """What we say twice is written twice."""
    ours.error("same")
    ours.error("same")
    assert text.getvalue().count("same") == 2


def test_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines go to stderr: stdout belongs to what a command prints."""
    with configured(TelemetrySettings()):
        ours.warning("there")
    out, err = capsys.readouterr()
    assert out == ""
    assert "there" in err
    assert sys.stderr
