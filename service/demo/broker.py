"""A Kafka inside this process: librdkafka's mock cluster, for the demo and for tests.

It comes with the confluent-kafka wheel, starts at once and keeps everything in memory. Groups and
commits work. Transactions are accepted but their offsets are not applied, so exactly-once cannot be
shown with it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.core.errors import CannotRun

_PRODUCER = 0
_ERROR_TEXT_BYTES = 512

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_conf_new": (ctypes.c_void_p, []),
    "rd_kafka_conf_set": (ctypes.c_int, [ctypes.c_void_p, *[ctypes.c_char_p] * 3, ctypes.c_size_t]),
    "rd_kafka_new": (
        ctypes.c_void_p,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t],
    ),
    "rd_kafka_destroy": (None, [ctypes.c_void_p]),
    "rd_kafka_err2str": (ctypes.c_char_p, [ctypes.c_int]),
    "rd_kafka_handle_mock_cluster": (ctypes.c_void_p, [ctypes.c_void_p]),
    "rd_kafka_mock_cluster_bootstraps": (ctypes.c_char_p, [ctypes.c_void_p]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [ctypes.c_void_p, ctypes.c_int32]),
    "rd_kafka_mock_topic_create": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    ),
}
"""The functions of librdkafka that are called: name -> (result, arguments), from rdkafka_mock.h.

They are called directly because the wheel's Python classes can start a mock cluster, but can
neither create a topic with a given number of partitions nor shorten the three seconds before a
group's first assignment.
"""


class EmbeddedBroker:
    """A broker that runs from `__enter__` to `__exit__`; its topics are gone afterwards.

    A topic that was not created gets 4 partitions at its first use. Raises `CannotRun` where the
    demo extra is not installed.
    """

    def __init__(self, brokers: int = 1) -> None:
        self._brokers = brokers
        self._library: Any = None
        self._handle: int | None = None
        self._cluster: int | None = None

    @property
    def bootstrap_servers(self) -> str:
        """host:port of every broker, comma-separated."""
        text: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return text.decode("ascii")

    def create_topic(self, name: str, partitions: int) -> None:
        """Creates a topic; raises `CannotRun` where it exists already."""
        error = self._library.rd_kafka_mock_topic_create(
            self._cluster, name.encode("ascii"), partitions, self._brokers
        )
        if error:
            why = self._library.rd_kafka_err2str(error).decode()
            raise CannotRun(f"The embedded broker cannot create topic {name}: {why}.")

    def start(self) -> None:
        """Starts the brokers on free ports of 127.0.0.1."""
        assert self._handle is None
        self._library = _load_librdkafka()
        error = ctypes.create_string_buffer(_ERROR_TEXT_BYTES)
        conf = self._conf(error)
        self._handle = self._library.rd_kafka_new(_PRODUCER, conf, error, len(error))
        if self._handle is None:
            raise CannotRun(f"The embedded broker does not start: {error.value.decode()}.")
        self._cluster = self._library.rd_kafka_handle_mock_cluster(self._handle)
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    def stop(self) -> None:
        """Stops the brokers and closes their ports; a second call does nothing."""
        if self._handle is not None:
            self._library.rd_kafka_destroy(self._handle)
            self._handle = self._cluster = None

    def _conf(self, error: ctypes.Array[ctypes.c_char]) -> int:
        conf: int = self._library.rd_kafka_conf_new()
        options = {
            b"test.mock.num.brokers": str(self._brokers).encode(),
            b"bootstrap.servers": b"",
            # Its log lines would go to stderr, into the middle of the demo's view.
            b"log_level": b"0",
        }
        for name, value in options.items():
            if self._library.rd_kafka_conf_set(conf, name, value, error, len(error)):
                raise CannotRun(f"The embedded broker does not start: {error.value.decode()}.")
        return conf

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _load_librdkafka() -> Any:
    """Load librdkafka from the confluent-kafka wheel."""
    try:
        from confluent_kafka import cimpl
    except ImportError as error:
        raise CannotRun(
            "The embedded broker needs the demo extra: pip install 'kafka-sluice[demo]'."
        ) from error
    extension = Path(cimpl.__file__)
    # The extension is linked against the bundled library, so a look-up in the extension finds the
    # library's functions too. On Windows it does not, so there the library itself is opened.
    bundled = sorted((extension.parent.parent / "confluent_kafka.libs").glob("librdkafka*.dll"))
    library = ctypes.CDLL(str(bundled[0] if bundled else extension))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
