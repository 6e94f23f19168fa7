"""All settings, and which of them contradict each other; built once, frozen, passed in.

They come from a YAML file; an environment variable overrides a single setting. Secrets come only
from the environment or from files named here. A wrong setting is a sentence, never a stack trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.settings.sections import (
    CacheSettings,
    DeadLetterSettings,
    DeliverySettings,
    ExtractionSettings,
    InputSettings,
    KafkaSettings,
    LimitSettings,
    OutputSettings,
    PriceOrGateway,
    RetrySettings,
    SecuritySettings,
    TelemetrySettings,
)

PREFIX = "SLUICE_"
"""All our environment variables start with this prefix."""

PUBLISH_MARGIN_S = 10.0
"""How many seconds a drain needs beyond the calls: to publish their outcomes and commit once."""

REBALANCE_MARGIN_S = 20.0
"""How many seconds a rebalance needs beyond its drain: to commit and to join the group again."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Settings that are valid one by one but contradict each other; `text` says what to do."""

    settings: tuple[str, ...]
    text: str


class Contradictions(ValueError):
    """All contradictions in one exception: a pydantic validator can raise only one."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("; ".join(one.text for one in found))
        self.found = found


class Settings(BaseSettings):
    """All settings. `settings.reading.load` builds them and turns faults into sentences."""

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
    prices: dict[str, PriceOrGateway] = Field(default_factory=dict)
    """Prices by the model's name: {input, cached, cache_write, output} in US dollars for a million
    tokens, or the word `gateway` where each answer tells its cost; in the environment as JSON. They
    replace the known prices of public endpoints."""
    retries: RetrySettings = Field(default_factory=RetrySettings)

    @property
    def window(self) -> int:
        """How many messages may be taken and not finished."""
        if self.limits.window is not None:
            return self.limits.window
        factor = 16 if self.delivery.ordering == "partition" else 4
        return factor * self.limits.concurrency

    @property
    def topics_read(self) -> tuple[str, ...]:
        """The topics that the group reads: the input topics, and the retry topic where one is
        set."""
        retries = self.retries.topic
        return self.input.topics if retries is None else (*self.input.topics, retries)

    @property
    def rebalance_timeout_s(self) -> float:
        """For how many seconds the group waits for a member at a rebalance: its drain, one bounded
        commit and the way to the broker; at least the session timeout."""
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
        """Only arguments count: settings built here never depend on the process's environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = list(_contradictions(self))
        if found:
            raise Contradictions(found)
        return self


def warnings(settings: Settings) -> tuple[str, ...]:
    """Sentences about settings that work, but probably not in the way that was meant."""
    found = []
    extraction, delivery = settings.extraction, settings.delivery
    needed_s = extraction.calls_max * extraction.call_timeout_s + PUBLISH_MARGIN_S
    if delivery.drain_timeout_s < needed_s:
        found.append(
            f"delivery.drain_timeout_s is {delivery.drain_timeout_s:g}, but a message with its "
            f"re-asks can take {needed_s:g} s: a stop may cut calls off, which are paid for again"
        )
    if extraction.confidence.field is not None and len(extraction.model) <= 1:
        found.append(
            "extraction.confidence asks for the next model, but extraction.model names only one"
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
    yield from _parameter_contradictions(settings.extraction)
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
            f"a window of {guard.window} never holds {guard.outcomes_min} outcomes, so the share "
            "would never count; make the window at least as large",
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


def _parameter_contradictions(extraction: ExtractionSettings) -> Iterator[Contradiction]:
    both = {"extraction.parameters": extraction.parameters}
    both |= {
        f"extraction.model_parameters.{name}": parameters
        for name, parameters in extraction.model_parameters.items()
    }
    for place, parameters in both.items():
        if "temperature" in parameters and extraction.temperature is not None:
            yield Contradiction(
                (place, "extraction.temperature"), "temperature is set twice; set one of them"
            )
    by_name: tuple[tuple[str, Iterable[str]], ...] = (
        ("model_parameters", extraction.model_parameters),
        ("endpoints", extraction.endpoints),
    )
    for setting, named in by_name:
        unknown = [name for name in named if extraction.model and name not in extraction.model]
        if unknown:
            yield Contradiction(
                (f"extraction.{setting}", "extraction.model"),
                f"{', '.join(map(repr, unknown))} is no model of extraction.model "
                f"({', '.join(extraction.model)}): correct the name, or leave it out",
            )


def _streaming_contradictions(settings: Settings) -> Iterator[Contradiction]:
    if settings.extraction.cardinality != "many":
        yield Contradiction(
            ("extraction.streaming", "extraction.cardinality"),
            "a single record is published when its answer has ended, so there is nothing to "
            "stream; set cardinality to many, or streaming to false",
        )
    if settings.delivery.mode != "at_least_once":
        yield Contradiction(
            ("extraction.streaming", "delivery.mode"),
            "a transaction publishes all records of an answer together, and streaming publishes "
            "them one by one; set mode to at_least_once, or streaming to false",
        )
    if settings.delivery.ordering != "none":
        yield Contradiction(
            ("extraction.streaming", "delivery.ordering"),
            "streamed records don't wait for earlier messages; set ordering to none, or streaming "
            "to false",
        )
    if settings.cache.mode != "off":
        yield Contradiction(
            ("extraction.streaming", "cache.mode"),
            "the cache stores and shares only whole answers; set mode to off, or streaming to "
            "false",
        )
    if settings.extraction.hedge_after_s is not None:
        yield Contradiction(
            ("extraction.streaming", "extraction.hedge_after_s"),
            "both calls for a message would publish its records; leave hedge_after_s out, or set "
            "streaming to false",
        )
    if settings.extraction.confidence.field is not None:
        yield Contradiction(
            ("extraction.streaming", "extraction.confidence.field"),
            "the confidence is known when the whole answer is, and most of it would be published "
            "by then; leave the field out, or set streaming to false",
        )


def _slow_messages(settings: Settings) -> Iterator[Contradiction]:
    """Times that would never be reached, or that every message would exceed."""
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
    """A topic that is both read and written feeds itself, and each round is paid for."""
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
                f"{topic!r} is named for both: waiting messages could not be told from the others; "
                "give retries a topic of their own",
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
