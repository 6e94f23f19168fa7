"""What the client's errors mean for a person, in one table: those that waiting does not mend."""

from __future__ import annotations

import ssl

from aiokafka import errors

from service.core.errors import CannotRun, Stop
from service.settings import KafkaSettings

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
"""Each error that waiting does not mend has a sentence. Subclasses stand before their parents."""

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
