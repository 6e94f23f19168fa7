"""From settings to a Kafka client: its options, and deadlines around its calls.

Everything that talks to a broker is built from `client_options`.
"""

from __future__ import annotations

from typing import Any

from aiokafka import errors

from service.kafka.client.credentials import sasl_options, ssl_context
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import stop_for
from service.kafka.client.private import hosts_of, knock
from service.settings import KafkaSettings

REACH_S = 12.0
"""All bootstrap addresses together have this long before we say that no broker answers."""

RETRY_BACKOFF_MS = 100
"""The client waits this long between two tries of a request."""

METADATA_MAX_AGE_MS = 60_000
"""New partitions are noticed within this time. The answer names a few topics only, so that asking
is cheap."""

CONNECTIONS_MAX_IDLE_MS = 540_000
"""We close an idle connection before brokers do, which is after ten minutes."""


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
        "ssl_context": ssl_context(kafka.security),
        **sasl_options(kafka.security),
    }


# --- is anybody there ----------------------------------------------------------------------------


async def reach(kafka: KafkaSettings) -> None:
    """Returns once a broker has let us in; raises `Stop` with why none did, within `REACH_S`.

    The client's own start logs the reasons and raises only that it failed: refused credentials
    and a wrong address would look alike.
    """
    options = client_options(kafka)
    hosts = hosts_of(kafka.bootstrap_servers)
    failure: Exception = errors.KafkaConnectionError()
    for host, port in hosts:
        try:
            await within(REACH_S / len(hosts), knock(host, port, options))
        except (errors.KafkaError, OSError, TimeoutError) as error:
            failure = error
        else:
            return
    raise stop_for(failure, kafka) from failure
