"""The commands: exit codes, what goes to stdout and to stderr, and what is not imported."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service import app as application
from service import workers
from service.commands import check as check_command
from service.commands.cli import main
from service.settings import reading
from service.settings.wording import table

CANARY = "canary-5c1f"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sluice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run a command in an empty folder with nothing of ours in the environment; exit code,
    stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("SLUICE_", "OPENAI_")):
            monkeypatch.delenv(name)

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sluice", *arguments])
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    "command",
    [
        *(["run"], ["check"], ["schema"], ["topics", "create"]),
        *(["dead-letters", "list"], ["dead-letters", "show", "0:1"], ["dead-letters", "redrive"]),
    ],
)
def test_wrong_settings_are_sentences(sluice: Run, command: list[str]) -> None:
    """Every command that needs settings ends with 2 and a sentence each on stderr, before it does
    anything."""
    code, out, err = sluice(*command, SLUICE_INPUT__TOPIC="a", SLUICE_LIMITS__CONCURRENCY="many")
    assert code == 2
    assert out == ""
    assert err == (
        "SLUICE_INPUT__TOPIC: there is no such setting; did you mean SLUICE_INPUT__TOPICS?\n"
        "SLUICE_LIMITS__CONCURRENCY: 'many' is not allowed; "
        "allowed: a whole number from 1 up to 10000\n"
    )


def test_settings_file_of_the_option(sluice: Run, tmp_path: Path) -> None:
    """--config names the file that is read."""
    (tmp_path / "mine.yaml").write_text("extraction: {record: 'record.py:Ship'}")
    (tmp_path / "record.py").write_text(
        "import pydantic\n\nclass Ship(pydantic.BaseModel):\n    name: str\n"
    )
    code, out, _ = sluice("schema", "--config", "mine.yaml")
    assert code == 0
    assert json.loads(out)["title"] == "Ship"
    code, _, err = sluice("schema", "--config", "yours.yaml")
    assert code == 2
    assert err.startswith("yours.yaml: cannot be read")


def test_cannot_run_is_a_sentence(sluice: Run) -> None:
    """What the world is not ready for ends with 1 and a sentence, without a stack trace."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = sluice(
            "run",
            SLUICE_TELEMETRY__HOST="127.0.0.1",
            SLUICE_TELEMETRY__PORT=port,
            OPENAI_API_KEY="none",
        )
    assert code == 1
    assert out == ""
    assert f"127.0.0.1 port {port} for metrics and probes is taken" in err
    assert "Traceback" not in err


def test_unexpected_exception_keeps_its_frames(
    sluice: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours shows where it is, but not its text, which could hold a message's."""

    def fail(*_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(reading, "load", fail)
    code, _, err = sluice("run")
    assert code == 1
    assert "Traceback" in err
    assert "in fail" in err
    assert err.endswith("RuntimeError\n")
    assert CANARY not in err


def test_schema_of_the_default_record(sluice: Run) -> None:
    """Without settings it is the seed's Person, as JSON on stdout."""
    code, out, err = sluice("schema")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["properties"]) == {"name", "age"}


def test_table_of_settings(sluice: Run) -> None:
    """`schema --settings` prints docs/settings.md's table, whatever is wrong with the settings."""
    code, out, _ = sluice("schema", "--settings", SLUICE_NONSENSE="x")
    assert (code, out) == (0, table())


@pytest.mark.parametrize("arguments", [["rum"], ["run", "--nonsense"], ["topics"], []])
def test_what_is_no_command(sluice: Run, arguments: list[str]) -> None:
    """A command or option that does not exist ends with 2 (or shows the help), without frames."""
    code, out, err = sluice(*arguments)
    assert code == 2 or "Usage" in out
    assert "Traceback" not in err


@pytest.mark.parametrize("bad", ["0", "-1", "many"])
def test_bounds_of_options(sluice: Run, bad: str) -> None:
    """Numbers that make no sense are refused before anything is started."""
    assert sluice("demo", "--messages", bad)[0] == 2
    assert sluice("topics", "create", "--partitions", bad)[0] == 2
    assert sluice("run", "--workers", bad)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--reason", "bad"], "bad is no reason"),
        (["list", "--since", "yesterday"], "'yesterday' is no time"),
        (["show", "notes"], "'notes' is no PARTITION:OFFSET"),
        (["redrive", "1"], "'1' is no PARTITION:OFFSET"),
        (["redrive", "--attempts-max", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_choices_of_dead_letters(sluice: Run, arguments: list[str], said: str) -> None:
    """What selects nothing that could be there is refused before anything is asked of a broker."""
    code, _, err = sluice("dead-letters", *arguments)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "environ", "started"),
    [
        ([], {}, None),
        ([], {"SLUICE_LIMITS__WORKERS": "3"}, 3),
        (["--workers", "2"], {"SLUICE_LIMITS__WORKERS": "3"}, 2),
        (["--workers", "1"], {"SLUICE_LIMITS__WORKERS": "3"}, None),
    ],
)
def test_how_many_workers(
    sluice: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environ: dict[str, str],
    started: int | None,
) -> None:
    """The option wins over limits.workers; one alone is this very process."""
    runs: list[int | None] = []
    monkeypatch.setattr(workers, "run", lambda _, count, **__: runs.append(count) or 0)
    monkeypatch.setattr(application, "run", lambda _, **__: runs.append(None) or 0)
    assert sluice("run", *arguments, **environ)[0] == 0
    assert runs == [started]


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize(("arguments", "said"), [([], False), (["--start-over"], True)])
def test_start_over_is_handed_on(
    sluice: Run, monkeypatch: pytest.MonkeyPatch, count: str, arguments: list[str], said: bool
) -> None:
    """Whether one process runs or several; and never without the word."""
    told: list[object] = []
    for module in (workers, application):
        monkeypatch.setattr(module, "run", lambda *_, **all_: told.append(all_["start_over"]) or 0)
    assert sluice("run", "--workers", count, *arguments)[0] == 0
    assert told == [said]


def test_check_says_where_settings_come_from(
    sluice: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file by its whole path, and the variables over it by name."""
    told: list[str] = []
    monkeypatch.setattr(check_command, "check", lambda *_, **all_: told.append(all_["origin"]) or 0)
    sluice("check")
    (tmp_path / "sluice.yaml").write_text("kafka: {group_id: x}")
    sluice("check")
    sluice("check", SLUICE_KAFKA__GROUP_ID="y")
    assert told == [
        "defaults alone, no sluice.yaml here",
        f"{tmp_path}/sluice.yaml",
        f"{tmp_path}/sluice.yaml, and over it SLUICE_KAFKA__GROUP_ID",
    ]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--latency", "0", "greater than or equal to 0.001"),
        ("--messages", "nan", "less than or equal to"),
        ("--messages", "inf", "less than or equal to"),
        ("--tokens-input", "1e308", "less than or equal to"),
    ],
)
def test_a_plan_of_impossible_numbers_is_a_sentence(
    sluice: Run, name: str, value: str, said: str
) -> None:
    """No figure that is let in ends in a traceback; the others end with 2 and the option."""
    code, _, err = sluice("plan", "--messages", "1", "--latency", "1", name, value)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())


def command(*arguments: str, **streams: int) -> subprocess.Popen[str]:
    """`sluice` as a process of its own."""
    return subprocess.Popen(
        (sys.executable, "-m", "service", *arguments), stderr=subprocess.PIPE, text=True, **streams
    )


def test_a_reader_that_has_left_is_no_error() -> None:
    """`sluice schema --settings | head -1`: exit code 0, nothing on stderr."""
    reads, writes = os.pipe()
    os.close(reads)
    with command("schema", "--settings", stdout=writes) as process:
        os.close(writes)
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == ("", 0)


def test_a_reader_that_has_left_does_not_hide_a_failure() -> None:
    """The exit code is the command's where it had ended before."""
    reads, writes = os.pipe()
    os.close(reads)
    with command("schema", "--config", "none.yaml", stdout=writes) as process:
        os.close(writes)
        assert process.stderr is not None
        assert (process.stderr.read()[:9], process.wait()) == ("none.yaml", 2)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    """Whatever is closed before the start: exit code 0, and no connection gets its number."""
    inside = "from service.commands.output import printing"
    program = f"{inside}\nwith printing():\n    import os, sys; sys.exit(os.open('/dev/null', 0))"
    line = f'"{sys.executable}" -m service schema --settings {closed}'
    assert subprocess.run(line, shell=True, stdout=subprocess.DEVNULL).returncode == 0
    line = f'"{sys.executable}" -c "{program}" {closed}'
    assert subprocess.run(line, shell=True, stdout=subprocess.DEVNULL).returncode > 2


def test_version(sluice: Run) -> None:
    """--version prints one line."""
    code, out, _ = sluice("--version")
    assert code == 0
    assert len(out.splitlines()) == 1


def test_help_is_quick() -> None:
    """`--help` imports none of the large libraries, which take seconds."""
    program = (
        "import sys\n"
        "sys.argv = ['sluice', '--help']\n"
        "from service.commands.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "large = {'aiokafka', 'openai', 'instructor', 'aiohttp', 'pydantic', 'prometheus_client'}\n"
        "print('imported:', sorted(large & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Commands" in done.stdout
    assert done.stdout.endswith("imported: []\n")


def test_module_is_the_command() -> None:
    """`python -m service` is `sluice`, exit code included."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "run"],
        env={**os.environ, "SLUICE_NONSENSE": "x"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("SLUICE_NONSENSE: there is no such setting")
