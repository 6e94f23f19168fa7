"""Every setting, once: name, unit, bound and reason; built once, frozen, passed in.

They come from a YAML file and from the environment over it, setting by setting. Secrets come only
from the environment or from files named here. A wrong setting is a sentence, never a stack trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX = "SLUICE_"
"""Every environment variable of ours starts with it."""

PUBLISH_MARGIN_S = 10.0
"""What a drain needs beyond the calls: publishing their outcomes and one commit."""

REBALANCE_MARGIN_S = 20.0
"""What a rebalance needs beyond its drain: commits and joining again."""


def _topic(name: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", name) or name in {".", ".."}:
        raise ValueError(
            f"{name!r} is no legal topic name: letters, digits, dots, underscores and hyphens, "
            "at most 249 of them"
        )
    return name


def _start(value: Any) -> Any:
    """A word or a time; a bare number or a time without an offset could mean too many things."""
    if value in ("earliest", "latest"):
        return value
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(
            f"{value!r} is neither earliest, latest nor a time such as 2026-01-31T08:00:00+00:00"
        ) from None
    if time.tzinfo is None:
        raise ValueError(f"{value} needs its offset from UTC, as in {time.isoformat()}+00:00")
    return time


def _servers(value: str) -> str:
    for server in value.split(","):
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+)(:\d{1,5})?", server.strip()):
            raise ValueError(f"{server.strip()!r} is no host:port; several are separated by commas")
    return value


def _record(value: str) -> str:
    if not re.fullmatch(r".+:[A-Za-z_][\w.]*", value):
        raise ValueError(
            f"{value!r} is neither package.module:Model nor path/to/file.py:Model, with a pydantic "
            "model (a JSON schema is not taken yet)"
        )
    return value


Topic: TypeAlias = Annotated[str, AfterValidator(_topic)]
Start: TypeAlias = Annotated[Literal["earliest", "latest"] | datetime, BeforeValidator(_start)]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Settings that are right one by one and cannot stand together; `text` says what to do."""

    settings: tuple[str, ...]
    text: str


class Contradictions(ValueError):
    """Several at once, through pydantic's single exception a validator."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("; ".join(one.text for one in found))
        self.found = found


class Section(BaseModel):
    """One group of settings: frozen, and a name that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SecuritySettings(Section):
    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the brokers are spoken to; only the SSL ones are encrypted."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """How we say who we are; needed with a SASL protocol, refused without."""
    username: str | None = Field(default=None, min_length=1)
    """For PLAIN and SCRAM."""
    password: SecretStr | None = None
    """For PLAIN and SCRAM; from the environment only, never from the YAML file."""
    password_file: Path | None = None
    """A file that holds the password, instead of `password`."""
    token_file: Path | None = None
    """For OAUTHBEARER: a file that holds the token, read anew at each connection."""
    ca_file: Path | None = None
    """Certificates that sign the brokers' (PEM); without it, the system's."""
    certificate_file: Path | None = None
    """Our own certificate (PEM), where brokers ask for one."""
    key_file: Path | None = None
    """Its private key (PEM)."""
    key_password_file: Path | None = None
    """A file that holds the private key's password."""
    check_hostname: bool = True
    """False only where brokers' certificates don't carry their host names: it lets an impostor in
    that holds any certificate of the same authority."""


class KafkaSettings(Section):
    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "localhost:9092"
    """Brokers to ask first, host:port, comma-separated; they name the others."""
    group_id: str = Field(default="sluice", min_length=1)
    """The consumer group; its committed offsets say where to go on, so that another name starts
    anew and pays anew."""
    group_instance_id: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """A name of this worker alone, that it keeps over a restart (the pod's name in a StatefulSet):
    one that is back within session_timeout_s gets its partitions again and disturbs nobody. One
    that leaves for good holds them until then, so not together with autoscaling."""
    client_id: str = Field(default="sluice", min_length=1)
    """What brokers call us in their logs and quotas."""
    session_timeout_s: float = Field(default=10.0, ge=1, le=300)
    """Seconds without a heartbeat after which a dead worker's partitions move; shorter is quicker
    and more nervous. The broker's own limits are 6 s to 1800 s by default."""
    request_timeout_s: float = Field(default=30.0, ge=1, le=300)
    """Seconds for one request to a broker, and the longest a send waits for its acknowledgement."""
    security: SecuritySettings = Field(default_factory=SecuritySettings)


class InputSettings(Section):
    topics: Annotated[tuple[Topic, ...], NoDecode] = ("messages",)
    """Topics to read; in the environment one name or a comma-separated list."""
    start: Start = "earliest"
    """Where a new group starts: a word, or a time in ISO 8601 with its offset."""
    format: Literal["text", "json"] = "text"
    """`text`: the value is UTF-8 text. `json`: the value is a JSON object that holds it."""
    text_field: str = Field(default="text", min_length=1)
    """With `json`: the field that holds the text; dots step into objects."""
    text_max_bytes: int = Field(default=262_144, ge=1, le=104_857_600)
    """Bytes; longer texts are rejected as `too_long` before any call: a bound on what one can
    cost."""
    tombstones: Literal["pass", "skip"] = "skip"
    """A message without a value: hand it on to the output, or finish it without one."""

    @field_validator("topics", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("topics")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("no topic is named")
        if len(set(value)) != len(value):
            raise ValueError("a topic is named twice")
        return value


class OutputSettings(Section):
    topic: Topic = "records"
    """Where records go."""
    key_field: str | None = Field(default=None, min_length=1)
    """A field of the record to use as the output's key; without it, the input's key."""
    timestamp: Literal["input", "now"] = "input"
    """The output's timestamp: the message's own, or the time of publishing."""
    message_max_bytes: int = Field(default=1_048_576, ge=1024, le=104_857_600)
    """Bytes of the largest request to a broker; above the topic's own max.message.bytes it has no
    use."""


class DeadLetterSettings(Section):
    topic: Topic = "dead-letters"
    """Where messages go that fail for good."""


class Example(Section):
    """A text and the records it should give; shown to the model before the message."""

    text: str
    records: Any
    """With cardinality one: the record (an object); with many: a list of them."""


class ExtractionSettings(Section):
    record: Annotated[str, AfterValidator(_record)] = "service.demo.records:Person"
    """The record's type, a pydantic model: package.module:Model or path/to/file.py:Model."""
    instructions: str = "Extract the record from the text."
    """What the model is told, before anything of the message."""
    examples: tuple[Example, ...] = ()
    """Texts with the records they should give; in the environment a JSON list of objects with
    `text` and `records`. Each costs its tokens in every call."""
    cardinality: Literal["one", "many"] = "one"
    """One record a message, or a list of any length."""
    model: str = Field(default="gpt-4o-mini", min_length=1)
    """The model's name at the endpoint."""
    mode: Literal["tools", "json_schema", "json"] = "json_schema"
    """How the schema is asked for; json_schema works with the most endpoints."""
    reasks_max: int = Field(default=2, ge=0, le=10)
    """Further calls that tell the model why its answer did not validate; each is paid for."""
    output_tokens_max: int = Field(default=1024, ge=1, le=1_000_000)
    """The answer's limit in tokens: what one call can cost."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Passed on where set; some models refuse it."""
    call_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """Seconds for one call, from sending to the last byte of its answer."""
    attempts_max: int = Field(default=8, ge=1, le=1000)
    """A message that failed this often while others succeeded is rejected as `exhausted`."""
    message_timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds from a message's first call after which it is cut off and rejected as `exhausted`,
    if others succeed meanwhile: it holds up what stands behind it in its lane. Without it a message
    may take as long as its attempts do."""
    hedge_after_s: float | None = Field(default=None, gt=0, le=3600)
    """Seconds of a call after which a second one is made beside it for the same message; the first
    answer wins, both are paid for. At most one call in twenty is such a second one, and only where
    slots and budgets have room. Shorter than call_timeout_s, and far above the usual call."""


class LimitSettings(Section):
    concurrency: int = Field(default=50, ge=1, le=10_000)
    """Slots: calls in flight at once."""
    window: int | None = Field(default=None, ge=1, le=1_000_000)
    """Messages taken and not finished, at least the slots; without it 4 x the slots (ordering key,
    none) or 16 x (partition), so that a slow message does not leave slots idle."""
    window_bytes: int = Field(default=268_435_456, ge=1024)
    """Bytes of keys and values in the window; intake stops above it (one poll may overshoot)."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=100_000_000)
    """Calls a minute of all workers of the group together, re-asks included; without it only what
    the provider allows counts (its headers, and its refusals)."""
    tokens_per_minute: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Tokens a minute, read and written, of all workers of the group together; estimated before a
    call and corrected after it."""
    spend_usd_per_hour: float | None = Field(default=None, gt=0, le=1_000_000)
    """US dollars that the calls of a rolling hour may cost, of all workers of the group together:
    then nothing is called until they are an hour old. A worker that starts knows of none before;
    needs a price for the model."""

    @property
    def shared(self) -> bool:
        """Whether workers have a budget together, whose parts follow the lags."""
        budgets = (self.requests_per_minute, self.tokens_per_minute, self.spend_usd_per_hour)
        return any(budget is not None for budget in budgets)


class DeliverySettings(Section):
    mode: Literal["at_least_once", "exactly_once"] = "at_least_once"
    """at_least_once: ids let a reader drop repeats. exactly_once: outcome and offset in one Kafka
    transaction; a reader with isolation.level=read_committed sees each outcome once."""
    ordering: Literal["key", "partition", "none"] = "key"
    """Whose outcomes are published in input order. Calls always run concurrently."""
    commit_interval_s: float = Field(default=1.0, ge=0.05, le=300)
    """Seconds between commits, or that a transaction gathers; a crash repeats about what finished
    since the last one."""
    drain_timeout_s: float = Field(default=200.0, ge=0, le=3600)
    """Seconds a stop waits for what is in flight; should cover a message with its re-asks:
    (1 + reasks_max) x call_timeout_s and 10 s for publishing."""
    rebalance_drain_s: float = Field(default=10.0, ge=0, le=20)
    """Seconds a rebalance waits for what is in flight: the whole group waits with it."""


class TelemetrySettings(Section):
    host: str = Field(default="0.0.0.0", min_length=1)  # probes come from other machines
    """Address of /metrics, /livez and /readyz."""
    port: int = Field(default=9100, ge=0, le=65535)
    """Its port; 0 takes a free one and logs it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe line that is logged; libraries never log below INFO, whatever is set here."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object each for machines."""


class Settings(BaseSettings):
    """All settings. `service.reading.load` builds them, and says what is wrong in sentences."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
    )

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    input: InputSettings = Field(default_factory=InputSettings)
    output: OutputSettings = Field(default_factory=OutputSettings)
    dead_letters: DeadLetterSettings = Field(default_factory=DeadLetterSettings)
    extraction: ExtractionSettings = Field(default_factory=ExtractionSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    delivery: DeliverySettings = Field(default_factory=DeliverySettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    @property
    def window(self) -> int:
        """Messages taken and not finished, at most."""
        if self.limits.window is not None:
            return self.limits.window
        factor = 16 if self.delivery.ordering == "partition" else 4
        return factor * self.limits.concurrency

    @property
    def rebalance_timeout_s(self) -> float:
        """How long the group waits for a member at a rebalance: the drain, one bounded commit and
        the way to the broker, and at least the session."""
        return max(
            self.kafka.session_timeout_s, self.delivery.rebalance_drain_s + REBALANCE_MARGIN_S
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: a value built here never depends on the process's environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = list(_contradictions(self))
        if found:
            raise Contradictions(found)
        return self


def warnings(settings: Settings) -> tuple[str, ...]:
    """Sentences about settings that work, but probably not as meant."""
    found = []
    extraction, delivery = settings.extraction, settings.delivery
    needed_s = (1 + extraction.reasks_max) * extraction.call_timeout_s + PUBLISH_MARGIN_S
    if delivery.drain_timeout_s < needed_s:
        found.append(
            f"delivery.drain_timeout_s is {delivery.drain_timeout_s:g}, but a message with its "
            f"re-asks can take {needed_s:g} s: a stop may cut calls off that are paid for again"
        )
    security = settings.kafka.security
    if (security.protocol, security.sasl_mechanism) == ("SASL_PLAINTEXT", "PLAIN"):
        found.append(
            "kafka.security.protocol SASL_PLAINTEXT with PLAIN sends the password in clear; "
            "SASL_SSL encrypts it"
        )
    return tuple(found)


# --- what cannot stand together ---------------------------------------------------------------


def _contradictions(settings: Settings) -> Iterator[Contradiction]:
    yield from _loops(settings)
    yield from _slow_messages(settings)
    yield from _sasl_contradictions(settings.kafka.security)
    yield from _credential_contradictions(settings.kafka.security)
    yield from _tls_contradictions(settings.kafka.security)
    if settings.input.tombstones == "pass" and settings.output.key_field is not None:
        yield Contradiction(
            ("input.tombstones", "output.key_field"),
            "tombstones cannot be passed on with a key_field: without a value there is no record "
            "whose field could be the key; set tombstones to skip, or leave key_field out",
        )
    window = settings.limits.window
    if window is not None and window < settings.limits.concurrency:
        yield Contradiction(
            ("limits.window", "limits.concurrency"),
            f"a window of {window} cannot fill {settings.limits.concurrency} slots; the window "
            "must be at least limits.concurrency (4 times it keeps slots busy)",
        )


def _slow_messages(settings: Settings) -> Iterator[Contradiction]:
    """What would never happen, or happen to every message."""
    extraction = settings.extraction
    hedge_s, timeout_s = extraction.hedge_after_s, extraction.message_timeout_s
    if hedge_s is not None and hedge_s >= extraction.call_timeout_s:
        yield Contradiction(
            ("extraction.hedge_after_s", "extraction.call_timeout_s"),
            f"a second call after {hedge_s:g} s would never be made: the first one is given up "
            f"after call_timeout_s, {extraction.call_timeout_s:g} s; make hedge_after_s shorter",
        )
    if timeout_s is not None and timeout_s < extraction.call_timeout_s:
        yield Contradiction(
            ("extraction.message_timeout_s", "extraction.call_timeout_s"),
            f"a message would be rejected after {timeout_s:g} s, before its first call may end "
            f"(call_timeout_s is {extraction.call_timeout_s:g}); make message_timeout_s at least "
            "as long, or call_timeout_s shorter",
        )
    if timeout_s is not None and hedge_s is not None and hedge_s >= timeout_s:
        yield Contradiction(
            ("extraction.hedge_after_s", "extraction.message_timeout_s"),
            f"a second call after {hedge_s:g} s would never be made: the message is rejected after "
            f"message_timeout_s, {timeout_s:g} s; make hedge_after_s shorter",
        )


def _loops(settings: Settings) -> Iterator[Contradiction]:
    """A topic that is read and written feeds itself, and each round is paid for."""
    topics = settings.input.topics
    output, letters = settings.output.topic, settings.dead_letters.topic
    if output in topics:
        yield Contradiction(
            ("input.topics", "output.topic"),
            f"{output!r} is input and output: each record would be read again and paid for "
            "again, without end; give the output a topic of its own",
        )
    if letters in topics:
        yield Contradiction(
            ("input.topics", "dead_letters.topic"),
            f"{letters!r} is input and dead letter topic: each dead letter would be read again "
            "and paid for again, without end; give dead letters a topic of their own",
        )
    if output == letters:
        yield Contradiction(
            ("output.topic", "dead_letters.topic"),
            f"{output!r} is output and dead letter topic: readers of records would get dead "
            "letters; give dead letters a topic of their own",
        )


def _sasl_contradictions(security: SecuritySettings) -> Iterator[Contradiction]:
    sasl = security.protocol.startswith("SASL")
    if sasl and security.sasl_mechanism is None:
        yield _security(
            f"protocol {security.protocol} needs a sasl_mechanism: PLAIN, SCRAM-SHA-256, "
            "SCRAM-SHA-512 or OAUTHBEARER",
            "protocol",
        )
    if not sasl and security.sasl_mechanism is not None:
        yield _security(
            f"sasl_mechanism {security.sasl_mechanism} needs protocol SASL_SSL (or "
            f"SASL_PLAINTEXT), not {security.protocol}",
            "sasl_mechanism",
        )
    unused = [name for name in _CREDENTIALS if getattr(security, name) is not None]
    if not sasl and unused:
        yield _security(
            f"{' and '.join(unused)} would not be used: protocol {security.protocol} does not "
            "log in; set SASL_SSL (or SASL_PLAINTEXT) and a sasl_mechanism",
            *unused,
        )


_CREDENTIALS = ("username", "password", "password_file", "token_file")


def _credential_contradictions(security: SecuritySettings) -> Iterator[Contradiction]:
    mechanism = security.sasl_mechanism
    if security.password is not None and security.password_file is not None:
        yield _security("set password or password_file, not both", "password", "password_file")
    if mechanism == "OAUTHBEARER" and security.token_file is None:
        yield _security("OAUTHBEARER needs token_file", "sasl_mechanism")
    if mechanism in (None, "OAUTHBEARER"):
        return
    if security.username is None:
        yield _security(f"{mechanism} needs a username", "sasl_mechanism")
    if security.password is None and security.password_file is None:
        yield _security(
            f"{mechanism} needs a password: {PREFIX}KAFKA__SECURITY__PASSWORD or password_file",
            "sasl_mechanism",
        )


def _tls_contradictions(security: SecuritySettings) -> Iterator[Contradiction]:
    if (security.certificate_file is None) != (security.key_file is None):
        yield _security(
            "certificate_file and key_file belong together: set both or neither",
            "certificate_file",
            "key_file",
        )
    if security.key_password_file is not None and security.key_file is None:
        yield _security("key_password_file needs a key_file", "key_password_file")
    files = ("ca_file", "certificate_file", "key_file")
    unused = [name for name in files if getattr(security, name) is not None]
    if unused and not security.protocol.endswith("SSL"):
        yield _security(
            f"{' and '.join(unused)} would not be used: protocol {security.protocol} does not "
            "encrypt; set SSL or SASL_SSL",
            *unused,
        )


def _security(text: str, *names: str) -> Contradiction:
    return Contradiction(tuple(f"kafka.security.{name}" for name in names), text)
