"""Every setting, once: name, unit, bound and reason; built once, frozen, passed in.

They come from a YAML file and from the environment over it. Secrets come only from the
environment or from files named here. A wrong setting is a sentence, never a stack trace.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

Start = Literal["earliest", "latest"] | datetime


class Section(BaseModel):
    """One group of settings: frozen, and a name that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SecuritySettings(Section):
    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the brokers are spoken to."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """Needed with a SASL protocol."""
    username: str | None = None
    """For PLAIN and SCRAM."""
    password: SecretStr | None = None
    """For PLAIN and SCRAM; from the environment only, never from the YAML file."""
    password_file: Path | None = None
    """A file that holds the password, instead of `password`."""
    token_file: Path | None = None
    """For OAUTHBEARER: a file that holds the token, read anew at each connection."""
    ca_file: Path | None = None
    """Certificates that sign the brokers' (PEM); None: the system's."""
    certificate_file: Path | None = None
    """Our own certificate (PEM), where brokers ask for one."""
    key_file: Path | None = None
    """Its private key (PEM)."""
    key_password_file: Path | None = None
    """A file that holds the private key's password."""
    check_hostname: bool = True
    """False only where brokers' certificates don't carry their host names."""


class KafkaSettings(Section):
    bootstrap_servers: str = Field(default="localhost:9092", min_length=1)
    """Brokers to ask first, host:port, comma-separated."""
    group_id: str = Field(default="sluice", min_length=1)
    """The consumer group; its committed offsets say where to go on."""
    client_id: str = Field(default="sluice", min_length=1)
    """What brokers call us in their logs and quotas."""
    session_timeout_s: float = Field(default=10.0, ge=1, le=300)
    """A dead worker's partitions move after this long; shorter is quicker and more nervous."""
    request_timeout_s: float = Field(default=30.0, ge=1, le=300)
    """One request to a broker, and the longest a send waits for its acknowledgement."""
    security: SecuritySettings = SecuritySettings()


class InputSettings(Section):
    topics: Annotated[tuple[str, ...], NoDecode] = Field(default=("messages",), min_length=1)
    """Topics to read; in the environment one name or a comma-separated list."""
    start: Start = "earliest"
    """Where a new group starts; a time is ISO 8601 with its offset."""
    format: Literal["text", "json"] = "text"
    """`text`: the value is UTF-8 text. `json`: the value is a JSON object that holds it."""
    text_field: str = Field(default="text", min_length=1)
    """With `json`: the field that holds the text; dots step into objects."""
    text_max_bytes: int = Field(default=262_144, ge=1, le=104_857_600)
    """Longer texts are rejected as `too_long` before any call: a bound on what one can cost."""
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
    def _legal(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", name):
                raise ValueError(f"{name!r} is no legal topic name")
        if len(set(value)) != len(value):
            raise ValueError("a topic is named twice")
        return value


class OutputSettings(Section):
    topic: str = Field(default="records", pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """Where records go."""
    key_field: str | None = None
    """A field of the record to use as the output's key; None: the input's key."""
    timestamp: Literal["input", "now"] = "input"
    """The output's timestamp: the message's own, or the time of publishing."""
    message_max_bytes: int = Field(default=1_048_576, ge=1024, le=104_857_600)
    """The largest request to a broker; above the topic's own max.message.bytes it has no use."""


class DeadLetterSettings(Section):
    topic: str = Field(default="dead-letters", pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """Where messages go that fail for good."""


class Example(Section):
    """A text and the records it should give; shown to the model before the message."""

    text: str
    records: Any
    """With cardinality one: the record (an object); with many: a list of them."""


class ExtractionSettings(Section):
    record: str = "service.demo.records:Person"
    """The record's type: package.module:Model, path/to/file.py:Model or path/to/schema.json."""
    instructions: str = "Extract the record from the text."
    """What the model is told, before anything of the message."""
    examples: tuple[Example, ...] = ()
    """Few-shot examples."""
    cardinality: Literal["one", "many"] = "one"
    """One record a message, or a list of any length."""
    model: str = Field(default="gpt-4o-mini", min_length=1)
    """The model's name at the endpoint."""
    mode: Literal["tools", "json_schema", "json"] = "json_schema"
    """How the schema is asked for; json_schema works with the most endpoints."""
    reasks_max: int = Field(default=2, ge=0, le=10)
    """Further calls that tell the model why its answer did not validate."""
    output_tokens_max: int = Field(default=1024, ge=1, le=1_000_000)
    """The answer's limit in tokens: what one call can cost."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Passed on where set; some models refuse it."""
    call_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """One call, from sending to the last byte of its answer."""
    attempts_max: int = Field(default=8, ge=1, le=1000)
    """A message that failed this often while others succeeded is rejected as `exhausted`."""


class LimitSettings(Section):
    concurrency: int = Field(default=50, ge=1, le=10_000)
    """Slots: calls in flight at once."""
    window: int | None = Field(default=None, ge=1, le=1_000_000)
    """Messages taken and not finished; None: 4 x the slots (key, none), 16 x (partition)."""
    window_bytes: int = Field(default=268_435_456, ge=1024)
    """Keys and values in the window; intake stops above it (one poll may overshoot)."""


class DeliverySettings(Section):
    mode: Literal["at_least_once"] = "at_least_once"
    """Each message's outcome is published at least once; ids let a reader drop repeats."""
    ordering: Literal["key", "partition", "none"] = "key"
    """Whose outcomes are published in input order. Calls always run concurrently."""
    commit_interval_s: float = Field(default=1.0, ge=0.05, le=300)
    """A crash repeats about what finished since the last commit."""
    drain_timeout_s: float = Field(default=200.0, ge=0, le=3600)
    """A stop waits this long for what is in flight; should cover a message with its re-asks."""
    rebalance_drain_s: float = Field(default=10.0, ge=0, le=20)
    """A rebalance waits this long for what is in flight: the whole group waits with it."""


class TelemetrySettings(Section):
    host: str = "0.0.0.0"  # probes and Prometheus come from other machines
    """Address of /metrics, /livez and /readyz."""
    port: int = Field(default=9100, ge=0, le=65535)
    """Its port; 0 takes a free one and logs it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe line that is logged."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object each for machines."""


class Settings(BaseSettings):
    """All settings. Build it with `load`, which turns what is wrong into sentences."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="SLUICE_",
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
    )

    kafka: KafkaSettings = KafkaSettings()
    input: InputSettings = InputSettings()
    output: OutputSettings = OutputSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    extraction: ExtractionSettings = ExtractionSettings()
    limits: LimitSettings = LimitSettings()
    delivery: DeliverySettings = DeliverySettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def window(self) -> int:
        """Messages taken and not finished, at most."""
        if self.limits.window is not None:
            return self.limits.window
        factor = 16 if self.delivery.ordering == "partition" else 4
        return factor * self.limits.concurrency
