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
    """A word or a time. A plain number or a time without an offset is refused as ambiguous."""
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
    """A value that looks like an address with credentials is refused without repeating it."""
    if "@" in value:
        raise ValueError(
            "one holds an @, as in user:password@host; set credentials in kafka.security.username "
            "and kafka.security.password, and only host:port here"
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
    """YAML reads the word off as false: it is turned back."""
    return "off" if value is False else value


def _redis_url(value: SecretStr | None) -> SecretStr | None:
    """A wrong URL is not repeated in the sentence: it may hold a password."""
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
            raise ValueError(f"{name} cannot be set as a parameter: {_OURS[name]}")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("a number unknown to JSON (nan, inf), or half a character") from None
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
    """Raises `ValueError` for a header that HTTP does not allow, or that the client sets itself."""
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
    """Raises `ValueError` for a text that cannot be an endpoint's URL; its sentence does not repeat
    the text, which may hold a secret."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            "it must start with http:// or https:// and name a host, as in http://localhost:8000/v1"
        )
    if url.username is not None or url.password is not None:
        raise ValueError("it must hold no user and no password; keys go into a file or variable")
    return value


Parameters: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_parameters)]
HttpHeaders: TypeAlias = Annotated[dict[str, str], AfterValidator(_headers)]

OrNull = BeforeValidator(lambda value: None if value == "null" else value)
"""Lets the word `null` stand for None: an empty environment variable counts as not set."""

ONE_OR_SEVERAL = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
)
"""The JSON schema of a list of names, which may be written as one name or a list."""

ANY_NUMBER = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
)
"""As `ONE_OR_SEVERAL`, or an empty list."""

Topic: TypeAlias = Annotated[str, AfterValidator(_topic)]
Start: TypeAlias = Annotated[Literal["earliest", "latest"] | datetime, BeforeValidator(_start)]


class Section(BaseModel):
    """One group of settings: frozen; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SecuritySettings(Section):
    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How to connect to the brokers; only the SSL protocols are encrypted."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """How to log in; needed with a SASL protocol, refused without one."""
    username: str | None = Field(default=None, min_length=1)
    """The user's name for PLAIN and SCRAM."""
    password: SecretStr | None = None
    """The password for PLAIN and SCRAM; from the environment only, never from the YAML file."""
    password_file: Path | None = None
    """A file that holds the password, instead of `password`."""
    token_file: Path | None = None
    """A file that holds the token for OAUTHBEARER; it is read anew for each connection."""
    ca_file: Path | None = None
    """The certificates (PEM) of the authority that signed the brokers' certificates; without it,
    the system's."""
    certificate_file: Path | None = None
    """Our own certificate (PEM), where brokers ask for one."""
    key_file: Path | None = None
    """The private key (PEM) of `certificate_file`."""
    key_password_file: Path | None = None
    """A file that holds the private key's password."""
    check_hostname: bool = True
    """Whether a broker's certificate must carry its host name. Set false only where the
    certificates don't: then anyone with a certificate of the same authority can pose as a
    broker."""


class KafkaSettings(Section):
    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "localhost:9092"
    """The brokers to ask first, as host:port, comma-separated; they name the others."""
    group_id: str = Field(default="sluice", min_length=1)
    """The consumer group. Its committed offsets say where to go on: another name starts anew and
    pays for all messages again."""
    group_instance_id: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """A name that only this worker has and keeps over a restart (the pod's name in a StatefulSet).
    A worker that is back within session_timeout_s gets its partitions again without a rebalance.
    One that leaves for good keeps them until that time is over, so do not use it with autoscaling.
    With limits.workers above 1 each worker's number is added: name-1, name-2."""
    client_id: str = Field(default="sluice", min_length=1)
    """The client's name in the brokers' logs and quotas."""
    session_timeout_s: float = Field(default=10.0, ge=1, le=300)
    """Seconds without a heartbeat after which a worker counts as dead and its partitions move. A
    shorter time moves them sooner, but also for short pauses. By default brokers allow 6 s to 1800
    s."""
    request_timeout_s: float = Field(default=30.0, ge=1, le=300)
    """Seconds that one request to a broker may take, and that a send waits for its
    acknowledgement."""
    security: SecuritySettings = Field(default_factory=SecuritySettings)


class InputSettings(Section):
    topics: Annotated[tuple[Topic, ...], NoDecode, ONE_OR_SEVERAL] = ("messages",)
    """The topics to read; in the environment one name or a comma-separated list."""
    start: Start = "earliest"
    """Where a new group starts: `earliest`, `latest`, or a time in ISO 8601 with its offset from
    UTC."""
    format: Literal["text", "json"] = "text"
    """`text`: the value is the text, in UTF-8. `json`: the value is a JSON object with the text in
    `text_field`."""
    text_field: str = Field(default="text", min_length=1)
    """With `json`: the field that holds the text; dots lead into objects (`customer.note`)."""
    text_max_bytes: int = Field(default=262_144, ge=1, le=104_857_600)
    """The largest text, in bytes. A longer one is rejected as `too_long` before any call, which
    bounds what a message can cost."""
    tombstones: Literal["pass", "skip"] = "skip"
    """What happens to a message without a value: `pass` hands it on to the output topic, `skip`
    finishes it without an output."""

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
    """The topic that records are published to."""
    key_field: str | None = Field(default=None, min_length=1)
    """The field of the record that becomes the output's key; without it, the message's key is
    used."""
    timestamp: Literal["input", "now"] = "input"
    """The output's timestamp: `input` is the message's own, `now` the time of publishing."""
    message_max_bytes: int = Field(default=1_048_576, ge=1024, le=104_857_600)
    """The largest request to a broker, in bytes. A value above the topic's own max.message.bytes
    has no effect."""


class GuardSettings(Section):
    share_max: Annotated[float | None, OrNull] = Field(default=0.5, gt=0, lt=1)
    """Intake stops when more than this share of the last outcomes are rejections, since the
    messages are hardly the cause then. null: it never stops for this reason."""
    window: int = Field(default=200, ge=1, le=100_000)
    """How many of the last outcomes `share_max` is computed from."""
    outcomes_min: int = Field(default=50, ge=1, le=100_000)
    """With fewer outcomes than this, `share_max` does not count yet."""
    in_a_row_max: Annotated[int | None, OrNull] = Field(default=100, ge=1, le=1_000_000)
    """Intake stops after this many rejections in a row. null: it never stops for this reason."""


class DeadLetterSettings(Section):
    topic: Topic = "dead-letters"
    """The topic for messages that fail for good."""
    connect_headers: bool = False
    """Whether dead letters also get the headers of Kafka Connect's dead letter queues
    (`__connect.errors.…`), for tools that read those."""
    redacted: bool = False
    """Whether dead letters leave out the model's answer and the detail of the reason, which can
    repeat the text in other words. Key, value and headers of the message stay as they are."""
    guard: GuardSettings = Field(default_factory=GuardSettings)


class Example(Section):
    """A text and the records that it should give. The model is shown it before the message."""

    text: str
    records: Any
    """The record (an object) with cardinality one; a list of records with many."""


class ConfidenceSettings(Section):
    field: str | None = Field(default=None, min_length=1)
    """The record's field, a number, in which the model says how sure it is. Below `least` the next
    model of `extraction.model` is asked; the last model's answer is always taken."""
    least: float = Field(default=0.5, allow_inf_nan=False)
    """The smallest confidence with which an answer is taken."""


class Price(Section):
    """US dollars for a million tokens."""

    input: float = Field(ge=0, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The price of input tokens that the provider read from its own cache; without it, that of
    `input`."""
    cache_write: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The price of input tokens that the provider wrote to its own cache; without it, that of
    `input`."""
    output: float = Field(ge=0, allow_inf_nan=False)


class EndpointSettings(Section):
    """The endpoint of a model that is not at OPENAI_BASE_URL."""

    base_url: Annotated[str, AfterValidator(legal_url)]
    """The endpoint's URL, in the form of OPENAI_BASE_URL."""
    key_file: Path | None = None
    """A file that holds the endpoint's key; it is read anew when it changes. Without it no key is
    sent."""


class ToldPrice(Price):
    """The price of a model whose answers tell their own cost (the word `gateway`)."""

    input: float = 0.0
    output: float = 0.0


def _told(value: Any) -> Any:
    return ToldPrice() if value == "gateway" else value


PriceOrGateway: TypeAlias = Annotated[
    Price, BeforeValidator(_told, json_schema_input_type=Price | Literal["gateway"])
]


class ExtractionSettings(Section):
    record: Annotated[str, AfterValidator(_record)] = "service.demo.records:Person"
    """The type of the records, a pydantic model: package.module:Model or path/to/file.py:Model."""
    instructions: str = "Extract the record from the text."
    """The instructions that the model gets before the message."""
    examples: tuple[Example, ...] = ()
    """Example texts with the records that they should give; in the environment a JSON list of
    objects with `text` and `records`. The tokens of each example are paid for in every call."""
    cardinality: Literal["one", "many"] = "one"
    """How many records a message gives: `one`, or `many`, a list of any length."""
    model: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NoDecode, ANY_NUMBER] = ()
    """The model's name at the endpoint, or several names (comma-separated in the environment). The
    next, stronger model is asked only where the one before refuses, reaches its token limit or
    gives no valid answer, or where a validator or `confidence` asks for it. Without it, the only
    model that the endpoint lists is asked. Mode and limits are the same for all models."""
    mode: Literal["auto", "tools", "json_schema", "json"] = "auto"
    """How the endpoint is told the schema. `auto` tries json_schema; where the endpoint refuses it,
    tools, then json."""
    strict: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    """Whether json_schema asks for OpenAI's strict mode, in which every answer fits the schema.
    `auto`: yes, with a strict schema derived from the record's, unless the derived schema would
    lose something (`check` says what) or the endpoint refuses it."""
    reasks_max: int = Field(default=2, ge=0, le=10)
    """How many further calls may tell the model why its answer did not validate; each is paid
    for."""
    output_tokens_max: int = Field(default=2048, ge=1, le=1_000_000)
    """The most tokens of one answer, reasoning included; it bounds what one call can cost."""
    answer_max_bytes: int = Field(default=2_097_152, ge=4096, le=268_435_456)
    """The most bytes that are read of an answer, encoded or decoded. A larger answer counts as a
    failure and is asked for again. Set it far above what output_tokens_max allows, which is about 6
    bytes a token."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """The temperature for the model; not sent where it is not set, since some models refuse it."""
    parameters: Parameters = Field(default_factory=dict)
    """Further parameters of each request, in the endpoint's own names and types: reasoning_effort,
    seed, top_p, service_tier, chat_template_kwargs, provider, …; in the environment as JSON."""
    model_parameters: dict[str, Parameters] = Field(default_factory=dict)
    """Parameters for single models, by the model's name. They override those in `parameters` of the
    same name."""
    endpoints: dict[str, EndpointSettings] = Field(default_factory=dict)
    """Endpoints of models that are not at OPENAI_BASE_URL, by the model's name: {base_url,
    key_file}. They get neither OPENAI_API_KEY nor `headers`."""
    headers: HttpHeaders = Field(default_factory=dict)
    """Further HTTP headers for OPENAI_BASE_URL, such as a gateway's labels; no secrets."""
    headers_file: Path | None = None
    """A JSON file with further headers in one object, which may be secrets; it is read at the
    start."""
    call_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """Seconds that one call may take, from sending to the last byte of its answer."""
    attempts_max: int = Field(default=8, ge=1, le=1000)
    """How often a message may fail while others succeed; then it is rejected as `exhausted`."""
    truncated: Literal["reject", "retry"] = "reject"
    """What happens when an answer reaches output_tokens_max: `reject` rejects the message, `retry`
    asks once more with twice as many tokens (a further call that is paid for)."""
    too_long: Literal["reject", "cut_head", "cut_tail"] = "reject"
    """What happens to a text above text_tokens_max or the model's context: `reject` rejects it,
    `cut_head` drops its beginning, `cut_tail` its end. The header `sluice.text.cut` says how much
    was kept."""
    text_tokens_max: int | None = Field(default=None, ge=1, le=100_000_000)
    """The most tokens of a text that are sent, by an estimate of 4 bytes a token. Without it a text
    is too long only where the endpoint refuses it; it is then halved until it fits."""
    confidence: ConfidenceSettings = Field(default_factory=ConfidenceSettings)
    streaming: bool = False
    """Whether, with cardinality many, each record is published as soon as the model has written it.
    Readers have to drop sets that are never completed. Only with at_least_once and ordering
    none."""

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
        """How many calls one message can take one after the other, each of up to call_timeout_s.
        Refusals because of its length are not counted: they come at once."""
        return max(1, len(self.model)) * (1 + self.reasks_max + (self.truncated == "retry"))

    message_timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds from a message's first call after which it is cut off, if others succeed meanwhile,
    because it holds up the messages behind it in its lane. It then waits in retries.topic or is
    rejected as `exhausted`, as after attempts_max. Without it a message may take as long as its
    attempts do."""
    hedge_after_s: float | None = Field(default=None, gt=0, le=3600)
    """Seconds after which a slow call gets a second one beside it for the same message. The first
    answer wins; both calls are paid for. At most one call in twenty is such a second one, and only
    where slots and budgets have room. Set it below call_timeout_s and far above the usual call."""


class LimitSettings(Section):
    concurrency: int = Field(default=50, ge=1, le=10_000)
    """The number of slots: how many calls may be in flight at once."""
    window: int | None = Field(default=None, ge=1, le=1_000_000)
    """How many messages may be taken and not finished; at least `concurrency`. Without it 4 times
    `concurrency` (ordering key or none) or 16 times (partition), so that a slow message does not
    leave slots idle."""
    window_bytes: int = Field(default=268_435_456, ge=1024)
    """How many bytes of keys and values the window may hold before intake stops; one poll may
    exceed it."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=100_000_000)
    """How many calls a minute all workers of the group may make together, re-asks included. Without
    it only the provider's own limits count (its headers and its refusals)."""
    tokens_per_minute: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """How many tokens a minute, input and output, all workers of the group may use together. They
    are estimated before a call and corrected after it."""
    spend_usd_per_hour: float | None = Field(default=None, gt=0, le=1_000_000)
    """US dollars that all workers of the group may spend together in a rolling hour. Beyond it no
    call is made until earlier ones are an hour old. What was spent travels with the partitions,
    each of which has an equal part of it. The model needs a price."""
    workers: int = Field(default=1, ge=1, le=64)
    """How many processes one command starts, to use more than one core. Each is a member of the
    group with its own concurrency, window and memory cache. `sluice run --workers` overrides it."""

    @property
    def shared(self) -> bool:
        """Whether workers share a budget, whose parts follow the lags."""
        budgets = (self.requests_per_minute, self.tokens_per_minute, self.spend_usd_per_hour)
        return any(budget is not None for budget in budgets)


class DeliverySettings(Section):
    mode: Literal["at_least_once", "exactly_once"] = "at_least_once"
    """`at_least_once`: outcomes may be repeated, and ids let a reader drop the repeats.
    `exactly_once`: outcome and offset are stored in one Kafka transaction, and a reader with
    isolation.level=read_committed sees each outcome once."""
    ordering: Literal["key", "partition", "none"] = "key"
    """Which outcomes are published in input order: those of the same key, those of the same
    partition, or none. Calls always run concurrently."""
    commit_interval_s: float = Field(default=1.0, ge=0.05, le=300)
    """Seconds between two commits, or for which a transaction gathers outcomes. After a crash about
    as much as finished in this time is repeated."""
    drain_timeout_s: float = Field(default=200.0, ge=0, le=3600)
    """Seconds that a stop waits for what is in flight. It should be enough for a message with its
    re-asks: (1 + reasks_max) x call_timeout_s for each model (one call more with `truncated:
    retry`) and 10 s for publishing."""
    rebalance_drain_s: float = Field(default=10.0, ge=0, le=20)
    """Seconds that a rebalance waits for what is in flight; the whole group waits meanwhile."""


class CacheSettings(Section):
    mode: Annotated[Literal["off", "memory", "redis"], BeforeValidator(_off)] = "off"
    """Where answers are kept so that a repeated text costs nothing. `off`: nowhere. `memory`: in
    this process. `redis`: in a Redis or Valkey that all workers share and that outlives them, so
    that a replay after a crash costs nothing. Values hold records as plain text; keys are
    hashes."""
    ttl_s: float = Field(default=86_400.0, ge=1, le=31_536_000)
    """Seconds for which an answer is kept; it also bounds how long personal data stays there."""
    memory_max_bytes: int = Field(default=67_108_864, ge=4096)
    """With `memory`: how many bytes of answers are kept; the least recently used are removed first.
    A Redis has its own bound (maxmemory, with maxmemory-policy allkeys-lru)."""
    redis_url: Annotated[SecretStr | None, AfterValidator(_redis_url)] = None
    """With `redis`: its address, as redis://user:password@host:6379/0, rediss:// (TLS) or unix://;
    from the environment only, never from the YAML file."""
    redis_url_file: Path | None = None
    """A file that holds the URL, instead of `redis_url`."""
    redis_key_prefix: str = Field(default="sluice:", max_length=200)
    """The text at the start of every key; another prefix starts with an empty cache."""
    redis_timeout_s: float = Field(default=0.25, ge=0.01, le=5)
    """Seconds that one lookup or write may take, connecting included. A lookup that takes longer
    counts as a miss; after three such failures in a row the store is left alone for five
    seconds."""

    @property
    def waits_s(self) -> float:
        """How many seconds a message may wait for the store beside its calls: one lookup and one
        write."""
        return 2 * self.redis_timeout_s if self.mode == "redis" else 0.0


class RetrySettings(Section):
    topic: Topic | None = None
    """The retry topic, for messages that would be rejected as `exhausted`. Such a message is sent
    there and finished, and only this group reads it again once it is due. Only with ordering none.
    Without it the message is rejected at once."""
    delay_s: float = Field(default=300.0, ge=1, le=604_800)
    """Seconds until a message in the retry topic is due; the topic must keep messages for
    longer."""
    attempts_max: int = Field(default=5, ge=1, le=1000)
    """How many times a message may wait in the retry topic before it is rejected as `exhausted`."""


class TelemetrySettings(Section):
    host: str = Field(default="0.0.0.0", min_length=1)  # probes come from other machines
    """Address of /metrics, /livez and /readyz. The default opens them to every machine that reaches
    this one, without a password: they show names of topics and models, figures and reasons, and no
    texts. 127.0.0.1 keeps them to this machine."""
    port: int = Field(default=9100, ge=0, le=65535)
    """The port of /metrics, /livez and /readyz; 0 takes a free one and logs it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe lines that are logged; lines of libraries below INFO never are."""
    log_format: Literal["text", "json"] = "text"
    """`text` logs lines for people, `json` one JSON object a line for machines."""
    tracing: bool = False
    """Whether spans are sent by OTLP over HTTP. OTEL_* environment variables say where to, and
    which share of them. Needs the extra `tracing`."""
