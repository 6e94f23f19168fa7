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
    WithJsonSchema,
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


def _off(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


def _redis_url(value: SecretStr | None) -> SecretStr | None:
    """Not repeated where it is wrong: it may hold a password."""
    schemes = ("redis://", "rediss://", "unix://")
    if value is not None and not value.get_secret_value().startswith(schemes):
        raise ValueError("it must start with redis://, rediss:// (TLS) or unix://")
    return value


def _names(value: Any) -> Any:
    """One name or several, separated by commas."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def _distinct(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"no {what} is named")
    if len(set(names)) != len(names):
        raise ValueError(f"a {what} is named twice")
    return names


OrNull = BeforeValidator(lambda value: None if value == "null" else value)
"""In the environment an empty variable counts as not set, so that the word has to say it."""

ONE_OR_SEVERAL = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
)
"""What a list of names may be written as: one of them, or a list."""

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
    that leaves for good holds them until then, so not together with autoscaling. With
    limits.workers above 1 each has its number behind it: name-1, name-2."""
    client_id: str = Field(default="sluice", min_length=1)
    """What brokers call us in their logs and quotas."""
    session_timeout_s: float = Field(default=10.0, ge=1, le=300)
    """Seconds without a heartbeat after which a dead worker's partitions move; shorter is quicker
    and more nervous. The broker's own limits are 6 s to 1800 s by default."""
    request_timeout_s: float = Field(default=30.0, ge=1, le=300)
    """Seconds for one request to a broker, and the longest a send waits for its acknowledgement."""
    security: SecuritySettings = Field(default_factory=SecuritySettings)


class InputSettings(Section):
    topics: Annotated[tuple[Topic, ...], NoDecode, ONE_OR_SEVERAL] = ("messages",)
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
        return _names(value)

    @field_validator("topics")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "topic")


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


class GuardSettings(Section):
    share_max: Annotated[float | None, OrNull] = Field(default=0.5, gt=0, lt=1)
    """Intake stops when more than this share of the last outcomes are rejections: then it is
    hardly the messages' fault. null: it never stops for this."""
    window: int = Field(default=200, ge=1, le=100_000)
    """Outcomes of which the share is taken."""
    outcomes_min: int = Field(default=50, ge=1, le=100_000)
    """Below so many outcomes a share says nothing."""
    in_a_row_max: Annotated[int | None, OrNull] = Field(default=100, ge=1, le=1_000_000)
    """Intake stops after so many rejections without anything else between. null: never for this."""


class DeadLetterSettings(Section):
    topic: Topic = "dead-letters"
    """Where messages go that fail for good."""
    connect_headers: bool = False
    """Write the headers of Kafka Connect's dead letter queues (`__connect.errors.…`) besides, for
    tools that know those."""
    redacted: bool = False
    """Leave out what can repeat a text in other words: the model's answer, and the detail of the
    reason. Key, value and headers of the message itself stay as they are."""
    guard: GuardSettings = Field(default_factory=GuardSettings)


class Example(Section):
    """A text and the records it should give; shown to the model before the message."""

    text: str
    records: Any
    """With cardinality one: the record (an object); with many: a list of them."""


class ConfidenceSettings(Section):
    field: str | None = Field(default=None, min_length=1)
    """A field of the record, a number, in which the model says how sure it is; below `least` the
    next model of `extraction.model` is asked. The last one's answer is taken as it is."""
    least: float = Field(default=0.5, allow_inf_nan=False)
    """The smallest value that is sure enough."""


class Price(Section):
    """US dollars for a million tokens."""

    input: float = Field(ge=0, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the input, what the provider read from its own cache; without it as `input`."""
    output: float = Field(ge=0, allow_inf_nan=False)


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
    model: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NoDecode, ONE_OR_SEVERAL] = (
        "gpt-4o-mini",
    )
    """The model's name at the endpoint, or several (in the environment comma-separated): the next,
    stronger one is asked only when the one before refuses, is cut off at its limit or cannot be
    validated, or when a validator or `confidence` asks for it. Mode and limits are the same for
    all."""
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
    truncated: Literal["reject", "retry"] = "reject"
    """An answer that reaches output_tokens_max: reject the message, or ask once more with twice as
    many (a further call, paid for like any other)."""
    too_long: Literal["reject", "cut_head", "cut_tail"] = "reject"
    """A text over text_tokens_max or the model's context: reject it, or drop its beginning or its
    end; the header `sluice.text.cut` says how much was kept."""
    text_tokens_max: int | None = Field(default=None, ge=1, le=100_000_000)
    """Tokens of a text that are sent at most, by an estimate (4 bytes each); without it only the
    endpoint's refusal says that a text is too long, and then half is kept until it fits."""
    confidence: ConfidenceSettings = Field(default_factory=ConfidenceSettings)
    streaming: bool = False
    """With cardinality many: publish each record as soon as the model has written it. Readers have
    to drop sets that are never completed; only with at_least_once and ordering none."""

    @field_validator("model", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        return _names(value)

    @field_validator("model")
    @classmethod
    def _distinct_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "model")

    @property
    def calls_max(self) -> int:
        """Calls that one message can take one after the other, each up to call_timeout_s; refusals
        of its length, which come at once, are not counted."""
        return len(self.model) * (1 + self.reasks_max + (self.truncated == "retry"))

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
    workers: int = Field(default=1, ge=1, le=64)
    """Processes of this one command, for more than one core: each is a member of the group with
    its own concurrency, window and memory cache. `sluice run --workers` overrides it."""

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
    (1 + reasks_max) x call_timeout_s for each model (one call more with `truncated: retry`) and
    10 s for publishing."""
    rebalance_drain_s: float = Field(default=10.0, ge=0, le=20)
    """Seconds a rebalance waits for what is in flight: the whole group waits with it."""


class CacheSettings(Section):
    mode: Annotated[Literal["off", "memory", "redis"], BeforeValidator(_off)] = "off"
    """Where answers are kept, so that a repeated text costs nothing: nowhere, in this process, or
    in a Redis or Valkey that all workers share and that outlives them (a replay after a crash
    then costs nothing). Values hold records in clear; keys are hashes."""
    ttl_s: float = Field(default=86_400.0, ge=1, le=31_536_000)
    """Seconds for which an answer is given again; it bounds how long personal data stays there."""
    memory_max_bytes: int = Field(default=67_108_864, ge=4096)
    """With `memory`: bytes; the least recently used answers go first. A Redis has a bound of its
    own (maxmemory, with maxmemory-policy allkeys-lru)."""
    redis_url: Annotated[SecretStr | None, AfterValidator(_redis_url)] = None
    """With `redis`: redis://user:password@host:6379/0, rediss:// with TLS, or unix://; from the
    environment only, never from the YAML file."""
    redis_url_file: Path | None = None
    """A file that holds the URL, instead of `redis_url`."""
    redis_key_prefix: str = Field(default="sluice:", max_length=200)
    """Before every key; another one starts with an empty cache."""
    redis_timeout_s: float = Field(default=0.25, ge=0.01, le=5)
    """Seconds for one look or write, connecting included; what takes longer counts as a miss, and
    after three in a row the store is left alone for five seconds."""

    @property
    def waits_s(self) -> float:
        """What a message may wait for the store beside its calls: a look and a write."""
        return 2 * self.redis_timeout_s if self.mode == "redis" else 0.0


class RetrySettings(Section):
    topic: Topic | None = None
    """Where a message waits that would be rejected as `exhausted`: it is sent there and finished,
    and read again by this group alone once it is due. Only with ordering none. Without it such a
    message is rejected at once."""
    delay_s: float = Field(default=300.0, ge=1, le=604_800)
    """Seconds until it is due; the topic must keep its messages for longer."""
    attempts_max: int = Field(default=5, ge=1, le=1000)
    """So often it goes there; then it is rejected as `exhausted`."""


class TelemetrySettings(Section):
    host: str = Field(default="0.0.0.0", min_length=1)  # probes come from other machines
    """Address of /metrics, /livez and /readyz."""
    port: int = Field(default=9100, ge=0, le=65535)
    """Its port; 0 takes a free one and logs it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe line that is logged; libraries never log below INFO, whatever is set here."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object each for machines."""
    tracing: bool = False
    """Send spans by OTLP over HTTP; where to, and which share of them, as OTEL_* environment
    variables say. Needs the extra `tracing`."""


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
    cache: CacheSettings = Field(default_factory=CacheSettings)
    prices: dict[str, Price] = Field(default_factory=dict)
    """What models cost, by their names: {input, cached, output} in US dollars for a million
    tokens; in the environment as JSON. They win over the prices that are known of public
    endpoints."""
    retries: RetrySettings = Field(default_factory=RetrySettings)

    @property
    def window(self) -> int:
        """Messages taken and not finished, at most."""
        if self.limits.window is not None:
            return self.limits.window
        factor = 16 if self.delivery.ordering == "partition" else 4
        return factor * self.limits.concurrency

    @property
    def topics_read(self) -> tuple[str, ...]:
        """What the group reads: the input, and messages that wait to be tried again."""
        retries = self.retries.topic
        return self.input.topics if retries is None else (*self.input.topics, retries)

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
    needed_s = extraction.calls_max * extraction.call_timeout_s + PUBLISH_MARGIN_S
    if delivery.drain_timeout_s < needed_s:
        found.append(
            f"delivery.drain_timeout_s is {delivery.drain_timeout_s:g}, but a message with its "
            f"re-asks can take {needed_s:g} s: a stop may cut calls off that are paid for again"
        )
    if extraction.confidence.field is not None and len(extraction.model) == 1:
        found.append(
            "extraction.confidence asks for the next model, and extraction.model names one only"
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
    yield from _cache_contradictions(settings.cache)
    if settings.input.tombstones == "pass" and settings.output.key_field is not None:
        yield Contradiction(
            ("input.tombstones", "output.key_field"),
            "tombstones cannot be passed on with a key_field: without a value there is no record "
            "whose field could be the key; set tombstones to skip, or leave key_field out",
        )
    guard = settings.dead_letters.guard
    if guard.share_max is not None and guard.outcomes_min > guard.window:
        yield Contradiction(
            ("dead_letters.guard.outcomes_min", "dead_letters.guard.window"),
            f"{guard.outcomes_min} outcomes never stand in a window of {guard.window}, so that no "
            "share would be taken; the window must be at least as large",
        )
    window = settings.limits.window
    if window is not None and window < settings.limits.concurrency:
        yield Contradiction(
            ("limits.window", "limits.concurrency"),
            f"a window of {window} cannot fill {settings.limits.concurrency} slots; the window "
            "must be at least limits.concurrency (4 times it keeps slots busy)",
        )
    if settings.extraction.streaming:
        yield from _streaming_contradictions(settings)


def _streaming_contradictions(settings: Settings) -> Iterator[Contradiction]:
    if settings.extraction.cardinality != "many":
        yield Contradiction(
            ("extraction.streaming", "extraction.cardinality"),
            "one record is published when its answer has ended: there is nothing to stream; set "
            "cardinality to many, or streaming to false",
        )
    if settings.delivery.mode != "at_least_once":
        yield Contradiction(
            ("extraction.streaming", "delivery.mode"),
            "a transaction is published as a whole, and records that are streamed are not; set "
            "mode to at_least_once, or streaming to false",
        )
    if settings.delivery.ordering != "none":
        yield Contradiction(
            ("extraction.streaming", "delivery.ordering"),
            "records that are streamed don't wait for the messages before theirs; set ordering to "
            "none, or streaming to false",
        )
    if settings.cache.mode != "off":
        yield Contradiction(
            ("extraction.streaming", "cache.mode"),
            "the cache holds whole answers and shares calls that end as a whole; set mode to off, "
            "or streaming to false",
        )
    if settings.extraction.hedge_after_s is not None:
        yield Contradiction(
            ("extraction.streaming", "extraction.hedge_after_s"),
            "of two calls for one message both would publish; leave hedge_after_s out, or set "
            "streaming to false",
        )
    if settings.extraction.confidence.field is not None:
        yield Contradiction(
            ("extraction.streaming", "extraction.confidence.field"),
            "a doubt is about the whole answer, and most of it would be published by then; leave "
            "the field out, or set streaming to false",
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
    yield from _retry_contradictions(settings)
    if output == letters:
        yield Contradiction(
            ("output.topic", "dead_letters.topic"),
            f"{output!r} is output and dead letter topic: readers of records would get dead "
            "letters; give dead letters a topic of their own",
        )


def _retry_contradictions(settings: Settings) -> Iterator[Contradiction]:
    topic = settings.retries.topic
    if topic is None:
        return
    if settings.delivery.ordering != "none":
        yield Contradiction(
            ("retries.topic", "delivery.ordering"),
            "a message that waits in a topic of its own is overtaken by those behind it; set "
            "delivery.ordering to none, or leave retries.topic out",
        )
    others = {
        "output.topic": (settings.output.topic,),
        "dead_letters.topic": (settings.dead_letters.topic,),
        "input.topics": settings.input.topics,
    }
    for name, topics in others.items():
        if topic in topics:
            yield Contradiction(
                ("retries.topic", name),
                f"{topic!r} stands for both: messages that wait would be taken for others, or "
                "others for them; give retries a topic of their own",
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


def _cache_contradictions(cache: CacheSettings) -> Iterator[Contradiction]:
    if cache.redis_url is not None and cache.redis_url_file is not None:
        yield Contradiction(
            ("cache.redis_url", "cache.redis_url_file"), "set redis_url or redis_url_file, not both"
        )
    if cache.mode == "redis" and cache.redis_url is None and cache.redis_url_file is None:
        yield Contradiction(
            ("cache.mode",),
            f"redis needs its address: {PREFIX}CACHE__REDIS_URL or cache.redis_url_file",
        )


def _security(text: str, *names: str) -> Contradiction:
    return Contradiction(tuple(f"kafka.security.{name}" for name in names), text)
