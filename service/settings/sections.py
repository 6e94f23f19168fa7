"""The sections of the settings: every setting once, with its unit, its bound and its reason."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    WithJsonSchema,
    field_validator,
)
from pydantic_settings import NoDecode


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
    """Nothing is repeated of what looks like an address with credentials in it."""
    if "@" in value:
        raise ValueError(
            "one holds an @, as in user:password@host; credentials are kafka.security.username and "
            "kafka.security.password, and here is host:port alone"
        )
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


_OURS = {
    "model": "extraction.model says which one is asked",
    "messages": "they are made of extraction.instructions, extraction.examples and the text",
    "response_format": "extraction.record and extraction.mode say how the schema is asked for",
    **dict.fromkeys(
        ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
        "extraction.record and extraction.mode say how the schema is asked for",
    ),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens"), "extraction.output_tokens_max is this limit"
    ),
    **dict.fromkeys(("stream", "stream_options"), "extraction.streaming says whether it streams"),
    "n": "one answer is read for each call",
}
"""Parts of a request that are not `parameters`, and which setting decides them instead."""


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in _OURS:
            raise ValueError(f"{name} is no parameter of yours to set: {_OURS[name]}")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("a number that JSON has not (nan, inf), or half a character") from None
    return value


_SECRET_HEADERS = re.compile(
    r"authorization|proxy-authorization|cookie|.*(api|access|subscription|auth)[-_]?(key|token).*"
    r"|x-auth.*|.*secret.*|.*password.*",
    re.IGNORECASE,
)
_OUR_HEADERS = frozenset(
    {
        *("accept", "accept-encoding", "connection", "content-encoding", "content-length"),
        *("content-type", "host", "transfer-encoding"),
    }
)


def legal_headers(value: dict[str, str]) -> dict[str, str]:
    """Raises `ValueError` for a header that HTTP does not allow, or that the client makes."""
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError(f"{name!r} is no name of a header")
        if name.lower() in _OUR_HEADERS:
            raise ValueError(f"{name} is made for each request and cannot be set")
        if not text.isascii() or not text.isprintable():
            raise ValueError(f"the value of {name} must be printable ASCII on one line")
    return value


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name in legal_headers(value):
        if _SECRET_HEADERS.fullmatch(name):
            raise ValueError(
                f"{name} looks like a secret, which settings don't hold: put it into the file that "
                "extraction.headers_file names, or set OPENAI_API_KEY or OPENAI_API_KEY_FILE"
            )
    return value


def legal_url(value: str) -> str:
    """Raises `ValueError` for what cannot be an endpoint's URL; it is not repeated there."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            "it must start with http:// or https:// and name a host, as in http://localhost:8000/v1"
        )
    if url.username is not None or url.password is not None:
        raise ValueError("it must hold no user and no password; keys go into a file or variable")
    return value


Parameters: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_parameters)]
Headers: TypeAlias = Annotated[dict[str, str], AfterValidator(_headers)]

OrNull = BeforeValidator(lambda value: None if value == "null" else value)
"""In the environment an empty variable counts as not set, so that the word has to say it."""

ONE_OR_SEVERAL = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
)
"""What a list of names may be written as: one of them, or a list."""

ANY_NUMBER = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
)
"""As `ONE_OR_SEVERAL`, or an empty list."""

Topic: TypeAlias = Annotated[str, AfterValidator(_topic)]
Start: TypeAlias = Annotated[Literal["earliest", "latest"] | datetime, BeforeValidator(_start)]


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
    cache_write: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the input, what the provider wrote to its own cache; without it as `input`."""
    output: float = Field(ge=0, allow_inf_nan=False)


class EndpointSettings(Section):
    """Where a model lives that is not at OPENAI_BASE_URL."""

    base_url: Annotated[str, AfterValidator(legal_url)]
    """As OPENAI_BASE_URL is."""
    key_file: Path | None = None
    """A file that holds the key, read anew when it changes; without it no key is sent."""


class ToldPrice(Price):
    """Each answer tells what it has cost."""

    input: float = 0.0
    output: float = 0.0


def _told(value: Any) -> Any:
    return ToldPrice() if value == "gateway" else value


PriceOrGateway: TypeAlias = Annotated[
    Price, BeforeValidator(_told, json_schema_input_type=Price | Literal["gateway"])
]


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
    model: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NoDecode, ANY_NUMBER] = ()
    """The model's name at the endpoint, or several (in the environment comma-separated): the next,
    stronger one is asked only when the one before refuses, is cut off at its limit or cannot be
    validated, or when a validator or `confidence` asks for it. Without it the only model that the
    endpoint lists. Mode and limits are the same for all."""
    mode: Literal["auto", "tools", "json_schema", "json"] = "auto"
    """How the schema is asked for. `auto`: json_schema, where the endpoint refuses it tools, then
    json."""
    strict: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    """Whether json_schema asks for an answer that keeps to the schema without exception. `auto`:
    by a strict schema derived from the record's, where nothing is lost by that (`check` says what
    would be) and the endpoint takes it."""
    reasks_max: int = Field(default=2, ge=0, le=10)
    """Further calls that tell the model why its answer did not validate; each is paid for."""
    output_tokens_max: int = Field(default=2048, ge=1, le=1_000_000)
    """The answer's limit in tokens, a model's thinking included: what one call can cost."""
    answer_max_bytes: int = Field(default=2_097_152, ge=4096, le=268_435_456)
    """Bytes of an answer that are read at most, encoded or decoded; a larger one is no answer, and
    is asked for again. Far above what output_tokens_max allows: about 6 bytes a token."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Passed on where set; some models refuse it."""
    parameters: Parameters = Field(default_factory=dict)
    """Sent with each request beside what is ours, in the endpoint's own names and types:
    reasoning_effort, seed, top_p, service_tier, chat_template_kwargs, provider, …; in the
    environment as JSON."""
    model_parameters: dict[str, Parameters] = Field(default_factory=dict)
    """By the model's name: over `parameters`, name by name."""
    endpoints: dict[str, EndpointSettings] = Field(default_factory=dict)
    """By the model's name: {base_url, key_file} of a model that is not at OPENAI_BASE_URL. It gets
    neither OPENAI_API_KEY nor `headers`."""
    headers: Headers = Field(default_factory=dict)
    """HTTP headers for OPENAI_BASE_URL, such as a gateway's labels; no secrets."""
    headers_file: Path | None = None
    """A JSON file with one object of further headers, secrets too; read at the start."""
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
        names = _names(value)
        if value and not names:
            raise ValueError("no model is named")
        return names

    @field_validator("model")
    @classmethod
    def _distinct_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "model") if value else value

    @property
    def calls_max(self) -> int:
        """Calls that one message can take one after the other, each up to call_timeout_s; refusals
        of its length, which come at once, are not counted."""
        return max(1, len(self.model)) * (1 + self.reasks_max + (self.truncated == "retry"))

    message_timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds from a message's first call after which it is cut off and, like one whose attempts
    are used up, waits in retries.topic or is rejected as `exhausted`, if others succeed meanwhile:
    it holds up what stands behind it in its lane. Without it a message may take as long as its
    attempts do."""
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
