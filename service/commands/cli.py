"""The tree of commands, their options, and the exit codes: 0 done, 1 failed, 2 wrong settings.

A fault that a person can mend is a sentence on stderr; any other error is printed with its frames
and without texts that could hold a message's. Each command imports the parts that it needs, so that
`--help` does not wait for Kafka's and OpenAI's clients.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from service.commands.output import OutputClosed, printing
from service.core.errors import FAILED, WRONG, Stop, WrongSettings

if TYPE_CHECKING:
    from service.kafka.letters.reader import Selection
    from service.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file; without it sluice.yaml is read, where it exists."),
]

app = typer.Typer(
    help="Text messages in, validated records out, on Kafka.",
    epilog="Settings come from a YAML file and from the environment over it: SLUICE_KAFKA__GROUP_ID"
    " is kafka.group_id. `sluice schema --settings` lists them all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would show local variables, which may hold messages
    context_settings={"help_option_names": ["-h", "--help"]},
)
dead_letters = typer.Typer(help="Messages that failed for good.", no_args_is_help=True)
app.add_typer(dead_letters, name="dead-letters")
topics = typer.Typer(help="The input, output and dead letter topics.", no_args_is_help=True)
app.add_typer(topics, name="topics")


def main() -> None:
    """The entry point of `sluice` and `python -m service`; always raises `SystemExit`."""
    with printing():
        _main()


def _main() -> NoReturn:
    try:
        app()
    except OutputClosed:
        raise
    except WrongSettings as error:
        _fail(str(error), WRONG)
    except Stop as error:
        _fail(str(error), FAILED)
    except Exception as error:  # the boundary of the process: any other error is a fault of ours
        from service.telemetry.logs import shown

        _fail(shown(error), FAILED)
    sys.exit(0)


def _fail(text: str, code: int) -> NoReturn:
    from service.telemetry.logs import last_words

    last_words(text)
    sys.exit(code)


def _settings(config: Path | None) -> Settings:
    from service.settings.reading import load

    return load(config, os.environ)


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        try:
            print(version("kafka-sluice"))
        except PackageNotFoundError:
            print("unknown (run from a checkout)")
        raise typer.Exit


@app.command()
def run(
    config: Config = None,
    until_caught_up: Annotated[
        bool,
        typer.Option("--until-caught-up", help="Stop at the end offsets seen at the start."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="How many processes; without it limits.workers."),
    ] = None,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over",
            help="Also read partitions that wait for your decision: a log that was cut is read "
            "from the cut, a topic that was made again is read as by a new group.",
        ),
    ] = False,
) -> None:
    """Read, extract, publish, until SIGTERM or Ctrl-C (a second one does not wait)."""
    settings = _settings(config)
    count = workers or settings.limits.workers
    if count > 1:
        from service.workers import run as run_workers

        raise typer.Exit(
            run_workers(settings, count, until_caught_up=until_caught_up, start_over=start_over)
        )
    from service.app import run as run_app

    raise typer.Exit(run_app(settings, until_caught_up=until_caught_up, start_over=start_over))


@app.command()
def demo(
    messages: Annotated[
        int | None, typer.Option(min=1, help="End after this many messages.")
    ] = None,
    example: Annotated[
        Literal["person", "ticket"], typer.Option(help="The records to extract from the texts.")
    ] = "person",
    endpoint: Annotated[
        bool,
        typer.Option(
            "--endpoint",
            help="Ask the model at OPENAI_BASE_URL with the key of the environment; it may cost.",
        ),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(hidden=True, help="Keep the last screen as an SVG file.")
    ] = None,
) -> None:
    """Show the service at work with an embedded Kafka and a small language model on this
    machine."""
    from service.demo.app import demo as run_demo

    raise typer.Exit(run_demo(messages, example, picture, endpoint=endpoint))


@app.command()
def check(
    config: Config = None,
    call: Annotated[
        bool, typer.Option("--call", help="Make one real call to the model (it costs a little).")
    ] = False,
) -> None:
    """Check settings, broker, topics, permissions, group and model: ✓, or what to do."""
    settings = _settings(config)
    _quiet()
    from service.commands.check import check as run_check
    from service.settings.reading import origin

    raise typer.Exit(run_check(settings, call=call, origin=origin(config, os.environ)))


@app.command()
def schema(
    config: Config = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the table of all settings (Markdown).")
    ] = False,
) -> None:
    """Print the JSON schema of the record that extraction.record names."""
    if settings:
        from service.settings.wording import table

        print(table(), end="")
        return
    _print_schema(_settings(config))


def _print_schema(settings: Settings) -> None:
    import json

    from service.llm.records import load_record_type

    extraction = settings.extraction
    record = load_record_type(extraction.record, extraction.cardinality, settings.output.key_field)
    print(json.dumps(record.schema, indent=2, ensure_ascii=False))


@app.command()
def plan(
    messages: Annotated[float, typer.Option(min=0, max=1e9, help="Messages a second.")],
    latency: Annotated[
        float,
        typer.Option(min=0.001, max=1e6, help="Seconds that half of the calls take."),
    ],
    sigma: Annotated[
        float, typer.Option(min=0, max=3, help="Spread of the latency (lognormal); 0: none.")
    ] = 1.0,
    calls: Annotated[
        float,
        typer.Option(min=1, max=1e6, help="Calls for a message, re-asks and retries included."),
    ] = 1.0,
    tokens_input: Annotated[
        float, typer.Option(min=0, max=1e9, help="Input tokens of one call.")
    ] = 0.0,
    tokens_output: Annotated[
        float, typer.Option(min=0, max=1e9, help="Output tokens of one call.")
    ] = 0.0,
    price_input: Annotated[
        float, typer.Option(min=0, max=1e9, help="USD for a million input tokens.")
    ] = 0.0,
    price_output: Annotated[
        float, typer.Option(min=0, max=1e9, help="USD for a million output tokens.")
    ] = 0.0,
    requests_per_minute: Annotated[
        float,
        typer.Option(min=0, max=1e9, help="The provider's limit of requests a minute; 0: none."),
    ] = 0.0,
    tokens_per_minute: Annotated[
        float,
        typer.Option(min=0, max=1e9, help="The provider's limit of tokens a minute; 0: none."),
    ] = 0.0,
    load: Annotated[
        float, typer.Option(min=0.05, max=1, help="The share of the slots that may be busy.")
    ] = 0.8,
) -> None:
    """Compute how many slots, workers and partitions, and how much money, a rate of messages
    needs."""
    from service.commands.plan import Demand, sentences
    from service.commands.plan import plan as plan_for

    demand = Demand(
        messages_per_s=messages,
        latency_median_s=latency,
        latency_sigma=sigma,
        calls_per_message=calls,
        tokens_input=tokens_input,
        tokens_output=tokens_output,
        usd_per_million_input=price_input,
        usd_per_million_output=price_output,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        load_max=load,
    )
    for sentence in sentences(demand, plan_for(demand)):
        print(sentence)


@topics.command("create")
def create(
    config: Config = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many partitions a topic gets; without it 6 for the input, and as many for "
            "the others.",
        ),
    ] = None,
    replication: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many replicas; without it the brokers' default, or the input's."
        ),
    ] = None,
) -> None:
    """Create the input, output and dead letter topics where they are missing."""
    settings = _settings(config)
    _quiet()
    import asyncio

    asyncio.run(_create(settings, partitions, replication))


async def _create(settings: Settings, partitions: int | None, replication: int | None) -> None:
    from service.kafka.provisioning import create_topics

    async for line in create_topics(settings, partitions, replication):
        print(line)


# --- dead letters ------------------------------------------------------------------------------

Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", help="Only those rejected for this; may be given several times."),
]
Since = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Only those written at or after this (ISO 8601, UTC by default)."
    ),
]
Until = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Only those written before this (ISO 8601, UTC by default)."),
]
PartitionOfOrigin = Annotated[
    int | None,
    typer.Option("--partition", min=0, help="Only those first read from this partition."),
]
TopicOfOrigin = Annotated[
    str | None, typer.Option("--topic", help="Only those first read from this topic.")
]
TextInValue = Annotated[
    str | None, typer.Option("--text", help="Only those whose value holds exactly this text.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for scripts.")]


@dead_letters.command("list")
def list_(
    config: Config = None,
    reason: Reasons = None,
    since: Since = None,
    until: Until = None,
    partition: PartitionOfOrigin = None,
    topic: TopicOfOrigin = None,
    text: TextInValue = None,
    limit: Limit = None,
    count: Annotated[bool, typer.Option("--count", help="Print only the counts.")] = False,
    as_json: AsJson = False,
) -> None:
    """List dead letters, why each was rejected and whether it was sent again; count by reason."""
    settings = _settings(config)
    _quiet()
    selection = _selection((), reason, since, until, partition, topic, text)
    from service.commands.dead_letters import list_letters

    raise typer.Exit(list_letters(settings, selection, limit, count=count, as_json=as_json))


@dead_letters.command("show")
def show_(
    letter: Annotated[str, typer.Argument(help="PARTITION:OFFSET, as in the list.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter: the message, why it was rejected, the model's answer, the cost."""
    settings = _settings(config)
    _quiet()
    from service.commands.dead_letters import show_letter

    raise typer.Exit(show_letter(settings, _place(letter), as_json=as_json))


@dead_letters.command("redrive")
def redrive_(
    letters: Annotated[
        list[str] | None, typer.Argument(help="PARTITION:OFFSET, as in the list; none: all.")
    ] = None,
    config: Config = None,
    reason: Reasons = None,
    since: Since = None,
    until: Until = None,
    partition: PartitionOfOrigin = None,
    topic: TopicOfOrigin = None,
    text: TextInValue = None,
    limit: Limit = None,
    attempts_max: Annotated[
        int, typer.Option(min=1, help="Leave out messages that were sent again this often.")
    ] = 3,
    again: Annotated[
        bool, typer.Option("--again", help="Also send letters that were sent again before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be sent.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Send messages to the input again, byte for byte, each once."""
    settings = _settings(config)
    _quiet()
    selection = _selection(letters or (), reason, since, until, partition, topic, text)
    from service.commands.dead_letters import redrive_letters
    from service.kafka.letters.redrive import RedriveRequest

    request = RedriveRequest(selection, again, attempts_max, limit)
    raise typer.Exit(redrive_letters(settings, request, dry_run=dry_run, yes=yes))


def _selection(
    letters: Iterable[str],
    reasons: Iterable[str] | None,
    since: str | None,
    until: str | None,
    partition: int | None,
    topic: str | None,
    text: str | None,
) -> Selection:
    from service.core.messages import Reason
    from service.kafka.letters.reader import Selection

    unknown = set(reasons or ()) - {each.value for each in Reason}
    if unknown:
        known = ", ".join(each.value for each in Reason)
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is no reason; there are {known}")
    return Selection(
        at=frozenset(map(_place, letters)),
        reasons=frozenset(reasons or ()),
        since_ms=_epoch_ms(since),
        until_ms=_epoch_ms(until),
        partition=partition,
        topic=topic,
        text=text,
    )


def _place(letter: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,10}):(\d{1,19})", letter)
    if found is None:
        raise typer.BadParameter(f"{letter!r} is no PARTITION:OFFSET, such as 0:41")
    return int(found[1]), int(found[2])


def _epoch_ms(text: str | None) -> int | None:
    """A time in epoch milliseconds; without an offset it is in UTC, as in the list."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time such as 2026-01-31 or 2026-01-31T08:00:00+00:00"
        ) from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def _quiet() -> None:
    """Drop the log lines of the clients: the command itself says better what happened."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
