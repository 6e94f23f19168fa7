"""From settings to a Kafka client: options, credentials, deadlines, and what its errors mean.

Everything that talks to a broker is built from `client_options`. Errors of the client cross into
ours here, in one table.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from aiokafka import errors
from aiokafka.abc import AbstractTokenProvider
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.protocol.metadata import MetadataRequest

from service.core.errors import CannotRun, Stop, WrongSettings
from service.settings import KafkaSettings, SecuritySettings

T = TypeVar("T")

REACH_S = 12.0
"""All bootstrap addresses together, before we say that no broker answers."""

RETRY_BACKOFF_MS = 100
"""The client's own wait between two tries of a request."""

METADATA_MAX_AGE_MS = 60_000
"""New partitions are noticed within a minute; the answer names a few topics only."""

CONNECTIONS_MAX_IDLE_MS = 540_000
"""Below the brokers' ten minutes, so that it is us who close an idle connection."""


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """What consumer, producer and admin client of aiokafka take alike.

    Raises `WrongSettings` where a file cannot be read; that what belongs together is set
    together is the settings' own business.
    """
    return {
        "bootstrap_servers": kafka.bootstrap_servers,
        "client_id": kafka.client_id,
        "request_timeout_ms": int(kafka.request_timeout_s * 1000),
        "retry_backoff_ms": RETRY_BACKOFF_MS,
        "metadata_max_age_ms": METADATA_MAX_AGE_MS,
        "connections_max_idle_ms": CONNECTIONS_MAX_IDLE_MS,
        "security_protocol": kafka.security.protocol,
        "ssl_context": _ssl_context(kafka.security),
        **_sasl_options(kafka.security),
    }


async def within(limit_s: float, work: Awaitable[T]) -> T:
    """The result of `work`; raises `TimeoutError` after `limit_s` seconds, with it cancelled.

    The client's own calls can wait or retry without end. `work` runs in the caller's task.
    """
    async with asyncio.timeout(limit_s):
        return await work


# --- is anybody there ----------------------------------------------------------------------------


async def reach(kafka: KafkaSettings) -> None:
    """Returns once a broker has let us in; raises `Stop` with why none did, within `REACH_S`.

    The client's own start logs the reasons and raises only that it failed: refused credentials
    and a wrong address would look alike.
    """
    options = client_options(kafka)
    hosts = collect_hosts(kafka.bootstrap_servers)
    failure: Exception = errors.KafkaConnectionError()
    for host, port, _ in hosts:
        try:
            await within(REACH_S / len(hosts), _knock(host, port, options))
        except (errors.KafkaError, OSError, TimeoutError) as error:
            failure = error
        else:
            return
    raise stop_for(failure, kafka) from failure


_CONNECTION_OPTIONS = (
    "client_id",
    "request_timeout_ms",
    "ssl_context",
    "security_protocol",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "sasl_oauth_token_provider",
)
"""Of all options those that concern one connection."""


async def _knock(host: str, port: int, options: dict[str, Any]) -> None:
    own = {name: options[name] for name in _CONNECTION_OPTIONS}
    connection = await create_conn(host, port, **own)
    try:
        # A listener that wants credentials answers version requests without them, no others.
        await connection.send(MetadataRequest([]))
    finally:
        connection.close()


async def describe_topics(
    admin: AIOKafkaAdminClient, topics: list[str]
) -> dict[str, dict[str, Any]]:
    """topic -> error_code and partitions, as the brokers' metadata has them; creates nothing."""
    request = MetadataRequest(topics, allow_auto_topic_creation=False)
    answer = await admin._send_request(request)
    return {found["topic"]: found for found in answer.to_object()["topics"]}


# --- what the client's errors mean ---------------------------------------------------------------

_MEANING: tuple[tuple[type[Exception], str], ...] = (
    (
        errors.TopicAuthorizationFailedError,
        "Kafka does not let {who} use topic {what}: give it READ on the input topics, WRITE on "
        "the output and dead letter topics, and DESCRIBE on all.",
    ),
    (
        errors.GroupAuthorizationFailedError,
        "Kafka does not let {who} use the group {group}: give it READ on the group, or set "
        "kafka.group_id to one that it may use.",
    ),
    (
        errors.ClusterAuthorizationFailedError,
        "Kafka does not let {who} write idempotently: give it IDEMPOTENT_WRITE on the cluster.",
    ),
    (
        errors.TransactionalIdAuthorizationFailed,
        "Kafka does not let {who} use transactions: give it WRITE and DESCRIBE on the "
        "transactional ids that begin with sluice-{group}:, or set delivery.mode to "
        "at_least_once.",
    ),
    (
        errors.InvalidTransactionTimeout,
        "Kafka at {servers} does not allow transactions to be open for as long as "
        "kafka.request_timeout_s needs: shorten it, or raise the brokers' "
        "transaction.max.timeout.ms.",
    ),
    (
        errors.SaslAuthenticationFailed,
        "Kafka at {servers} refused the credentials of {who}: check kafka.security.username and "
        "the password or token.",
    ),
    (
        errors.AuthenticationFailedError,
        "Kafka at {servers} refused the credentials of {who}: check kafka.security.username and "
        "the password or token.",
    ),
    (
        errors.UnsupportedSaslMechanismError,
        "Kafka at {servers} does not offer {mechanism}: check kafka.security.sasl_mechanism.",
    ),
    (
        errors.UnknownTopicOrPartitionError,
        "There is no topic {what} at {servers}: make it with `sluice topics create`, or correct "
        "the name.",
    ),
    (
        errors.InvalidTopicError,
        "Kafka takes {what} for no topic's name: correct it in the settings.",
    ),
    (
        errors.InconsistentGroupProtocolError,
        "The group {group} has members that share partitions in another way (not sticky): stop "
        "them, or set kafka.group_id to a group of this service alone.",
    ),
    (
        errors.InvalidSessionTimeoutError,
        "Kafka at {servers} does not allow this kafka.session_timeout_s: the brokers' "
        "group.min.session.timeout.ms and group.max.session.timeout.ms bound it.",
    ),
    (
        errors.InvalidGroupIdError,
        "Kafka takes {group} for no group's name: correct kafka.group_id.",
    ),
    (
        ssl.SSLCertVerificationError,
        "The certificate of Kafka at {servers} is not trusted: set kafka.security.ca_file to the "
        "certificates that sign it.",
    ),
    (
        ssl.SSLError,
        "No TLS connection to Kafka at {servers}: check kafka.security.protocol and the files "
        "under kafka.security.",
    ),
)
"""An error that waiting does not mend -> a sentence. Subclasses stand before their parents."""

_NOBODY = (
    "No Kafka broker answers at {servers}: check that it runs, kafka.bootstrap_servers, and that "
    "kafka.security.protocol ({protocol}) is the one of this listener."
)


def stop_for(error: BaseException, kafka: KafkaSettings, what: str = "") -> Stop:
    """The sentence that ends the process; `what` names a topic where the error does not."""
    sentence = next((text for kind, text in _MEANING if isinstance(error, kind)), _NOBODY)
    security = kafka.security
    return CannotRun(
        sentence.format(
            who=security.username or "this client",
            what=what or _topics_of(error),
            group=kafka.group_id,
            servers=kafka.bootstrap_servers,
            mechanism=security.sasl_mechanism,
            protocol=security.protocol,
        )
    )


def is_lasting(error: BaseException) -> bool:
    """Whether only a person can mend it, so that trying again has no use."""
    return isinstance(error, tuple(kind for kind, _ in _MEANING))


def _topics_of(error: BaseException) -> str:
    """The client puts a topic, or a set of them, into its authorisation errors."""
    named = error.args[0] if error.args else ""
    return ", ".join(sorted(named)) if isinstance(named, set) else str(named)


# --- credentials ---------------------------------------------------------------------------------


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """Hands out the token in a file, read anew at each connection: whoever renews it, writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def token(self) -> str:
        """The token; raises `OSError`, which the client takes for a failed connection."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> str:
        return self._path.read_text(encoding="utf-8").strip()


def _sasl_options(security: SecuritySettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "sasl_mechanism": security.sasl_mechanism or "PLAIN",
        "sasl_plain_username": None,
        "sasl_plain_password": None,
        "sasl_oauth_token_provider": None,
    }
    if security.protocol.startswith("SASL_"):
        if security.sasl_mechanism == "OAUTHBEARER":
            options["sasl_oauth_token_provider"] = _token_provider(security)
        else:
            options["sasl_plain_username"] = security.username
            options["sasl_plain_password"] = _password(security)
    return options


def _token_provider(security: SecuritySettings) -> TokenFile:
    assert security.token_file is not None, "the settings see to it"
    _secret(security.token_file, "kafka.security.token_file")
    return TokenFile(security.token_file)


def _password(security: SecuritySettings) -> str:
    if security.password is not None:
        return security.password.get_secret_value()
    assert security.password_file is not None, "the settings see to it"
    return _secret(security.password_file, "kafka.security.password_file")


def _secret(path: Path, name: str) -> str:
    """A file's text without the line end that editors add; raises `WrongSettings`."""
    try:
        text = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, path, error) from error
    if not text:
        raise WrongSettings(f"{name}: {path} is empty.")
    return text


def _unreadable(name: str, path: Path, error: Exception) -> WrongSettings:
    why = (error.strerror or "no such file") if isinstance(error, OSError) else "it is no text"
    return WrongSettings(f"{name}: {path} cannot be read: {why}.")


def _ssl_context(security: SecuritySettings) -> ssl.SSLContext | None:
    if not security.protocol.endswith("SSL"):
        return None
    context = ssl.create_default_context()
    if security.ca_file is not None:
        context = _trusting(security.ca_file)
    context.check_hostname = security.check_hostname
    if security.certificate_file is not None:
        _present(context, security, security.certificate_file)
    return context


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError as error:
        raise WrongSettings(f"kafka.security.ca_file: {ca_file} holds no certificates.") from error
    except OSError as error:
        raise _unreadable("kafka.security.ca_file", ca_file, error) from error


def _present(context: ssl.SSLContext, security: SecuritySettings, certificate: Path) -> None:
    """Our own certificate, for brokers that ask for one."""
    password = ""
    if security.key_password_file is not None:
        password = _secret(security.key_password_file, "kafka.security.key_password_file")
    try:
        # Without a password to ask for, OpenSSL would ask the terminal.
        context.load_cert_chain(certificate, security.key_file, lambda: password)
    except ssl.SSLError as error:
        raise WrongSettings(
            f"kafka.security.certificate_file: {certificate} and its key do not fit together, "
            "are no PEM, or the key's password (key_password_file) is wrong."
        ) from error
    except OSError as error:
        raise _unreadable("kafka.security.certificate_file or key_file", certificate, error) from (
            error
        )
