"""Probes: what liveness and readiness follow, and the server around them."""

import asyncio
import socket
from contextlib import suppress
from dataclasses import replace

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from service.core.errors import CannotRun
from service.core.events import Called
from service.core.status import GroupStatus, State, Status
from service.settings import Settings
from service.telemetry import connections
from service.telemetry.connections import CONNECTIONS_MAX
from service.telemetry.gauges import StatusGauges
from service.telemetry.metrics import Metrics
from service.telemetry.probes import (
    SCRAPES_WAITING_MAX,
    OwnAnswers,
    Patience,
    Probes,
    not_alive,
)

PATIENCE = Patience(poll_turn_s=90, call_overdue_s=60, unsettled_s=110, look_s=120)

WELL = Status(
    state=State.RUNNING,
    slots=4,
    slots_busy=4,
    window=16,
    window_messages=10,
    window_full=False,
    window_bytes=100,
    queued=6,
    retrying=0,
    waiting_in_lane=0,
    publishing=0,
    poll_turn_age_s=0.2,
    call_overdue_s=0.0,
    not_ready=(),
    group=GroupStatus(settled=True, broker_answers=True),
)

OF_NONE = OwnAnswers(CollectorRegistry(), lambda: WELL, PATIENCE)


# --- liveness ---


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (replace(WELL, poll_turn_age_s=91), "the poll loop has not turned for 91 s"),
        (replace(WELL, call_overdue_s=61), "a call exceeds its deadline by 61 s"),
        (
            replace(WELL, group=GroupStatus(unsettled_s=111, broker_answers=True)),
            "the group has not settled for 111 s although a broker answers",
        ),
        (
            replace(WELL, group=GroupStatus(settled=True, look_age_s=121)),
            "the watchdog has not looked for 121 s",
        ),
    ],
)
def test_what_a_restart_would_help(status: Status, said: str) -> None:
    """Each of the four clocks beyond its bound is one reason."""
    assert not_alive(status, PATIENCE) == (said,)


@pytest.mark.parametrize(
    "status",
    [
        WELL,
        replace(WELL, poll_turn_age_s=90, call_overdue_s=60),
        replace(WELL, group=GroupStatus(unsettled_s=110, broker_answers=True, look_age_s=120)),
        replace(WELL, group=GroupStatus(unsettled_s=9999, broker_answers=False)),
        replace(WELL, group=GroupStatus(settled=True, unsettled_s=9999, broker_answers=True)),
    ],
)
def test_what_a_restart_would_not_help(status: Status) -> None:
    """At the bounds, and with a broker that is away however long, it is alive."""
    assert not_alive(status, PATIENCE) == ()


@pytest.mark.parametrize("state", list(State))
def test_neighbours_never_fail_it(state: State) -> None:
    """In every state, with the provider and all brokers down for a day and nothing ready, our own
    clocks alone decide."""
    status = replace(
        WELL,
        state=state,
        retrying=16,
        not_ready=("the provider refuses the credentials",),
        group=GroupStatus(unsettled_s=86_400, broker_answers=False, problem="no broker answers"),
    )
    assert not_alive(status, PATIENCE) == ()


def test_bounds_lie_above_the_groups_own() -> None:
    """A rebalance that takes all the time it may, and a dead member's session, are no reason."""
    settings = Settings.model_validate(
        {
            "kafka": {"session_timeout_s": 45, "request_timeout_s": 30},
            "delivery": {"rebalance_drain_s": 20},
        }
    )
    bounds = Patience.of(settings)
    assert settings.rebalance_timeout_s == 45
    assert bounds.unsettled_s > settings.rebalance_timeout_s + 45
    assert bounds.poll_turn_s > 30


# --- the server ---


class Served:
    """A status that a test can change, and metrics beside it."""

    def __init__(self) -> None:
        self.status = WELL
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, models=("small",))
        self.registry.register(StatusGauges(lambda: self.status))
        answers = OwnAnswers(self.registry, lambda: self.status, PATIENCE)
        self.probes = Probes("127.0.0.1", 0, answers)

    async def get(self, path: str, accept: str = "*/*") -> tuple[int, str, str]:
        """Status, content type and body."""
        url = f"http://127.0.0.1:{self.probes.port}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, headers={"Accept": accept}) as answer,
        ):
            return answer.status, answer.headers["Content-Type"], await answer.text()


@pytest.fixture
def served() -> Served:
    return Served()


async def test_alive_and_ready(served: Served) -> None:
    """A process that is well answers 200 to both."""
    async with served.probes:
        assert (await served.get("/livez"))[0] == 200
        assert (await served.get("/readyz"))[::2] == (
            200,
            '{"ready": true, "state": "running", "reasons": []}',
        )


async def test_not_ready_says_why(served: Served) -> None:
    """503 with the reasons as JSON; liveness does not follow."""
    served.status = replace(
        WELL, state=State.WAITING_FOR_PROVIDER, not_ready=("the credentials are refused",)
    )
    async with served.probes:
        code, content_type, body = await served.get("/readyz")
        assert (await served.get("/livez"))[0] == 200
    assert code == 503
    assert content_type.startswith("application/json")
    assert body == (
        '{"ready": false, "state": "waiting_for_provider", '
        '"reasons": ["the credentials are refused"]}'
    )


async def test_not_alive_says_why(served: Served) -> None:
    """503 with the clock that ran out."""
    served.status = replace(WELL, call_overdue_s=100)
    async with served.probes:
        code, _, body = await served.get("/livez")
    assert code == 503
    assert body == '{"alive": false, "reasons": ["a call exceeds its deadline by 100 s"]}'


async def test_metrics_as_text(served: Served) -> None:
    """Without a wish, the classic text format, gauges as they are now."""
    served.metrics.observe(Called("small", "validated", 0.5))
    async with served.probes:
        code, content_type, body = await served.get("/metrics")
        served.status = replace(WELL, slots_busy=1)
        later = (await served.get("/metrics"))[2]
    assert code == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    assert any(f.name == "sluice_calls" for f in text_string_to_metric_families(body))
    assert "\nsluice_slots_busy 4.0\n" in body
    assert "\nsluice_slots_busy 1.0\n" in later
    assert "_created" not in body


async def test_metrics_as_openmetrics(served: Served) -> None:
    """What Prometheus asks for first: valid OpenMetrics, to its strict parser too."""
    async with served.probes:
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1"
        _, content_type, body = await served.get("/metrics", accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith("# EOF\n")
    assert any(family.name == "sluice_calls" for family in openmetrics_families(body))


async def test_label_values_cannot_break_the_format(served: Served) -> None:
    """A model's name with quotes and line breaks arrives as it is."""
    name = 'a "b"\nc\\d'
    served.metrics.observe(Called(name, "validated", 0.5))
    async with served.probes:
        _, _, body = await served.get("/metrics")
    labels = [s.labels for f in text_string_to_metric_families(body) for s in f.samples]
    assert any(one.get("model") == name for one in labels)


async def test_unknown_path(served: Served) -> None:
    """Nothing else is served."""
    async with served.probes:
        assert (await served.get("/"))[0] == 404


async def test_closing_leaves_nothing(served: Served) -> None:
    """Afterwards the port is free again and no task is left."""
    before = asyncio.all_tasks()
    async with served.probes:
        await served.get("/livez")
        port = served.probes.port
    assert asyncio.all_tasks() == before
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_closing_does_not_wait_for_idle_clients(served: Served) -> None:
    """A client that keeps its connection open does not hold up the end."""
    async with asyncio.timeout(5):
        async with served.probes:
            _, writer = await asyncio.open_connection("127.0.0.1", served.probes.port)
        writer.close()


async def test_taken_port() -> None:
    """A port that is taken is a sentence that names the setting, and leaves nothing open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        probes = Probes("127.0.0.1", port, OF_NONE)
        with pytest.raises(CannotRun, match=rf"^127.0.0.1 port {port} .* is taken; set telemetry"):
            await probes.__aenter__()
        assert probes._runner.server is None


async def test_address_of_another_machine() -> None:
    """An address that is not ours is a sentence too."""
    probes = Probes("192.0.2.1", 0, OF_NONE)
    with pytest.raises(CannotRun, match=r"set telemetry\.host to an address of this machine"):
        await probes.__aenter__()


async def test_port_of_the_settings_is_kept() -> None:
    """A port that is given is the one that is served; 0 becomes the free one that was found."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with Probes("127.0.0.1", port, OF_NONE) as probes:
        assert probes.port == port
    async with Probes("127.0.0.1", 0, OF_NONE) as probes:
        assert probes.port > 0


# --- connections ---


async def silent(port: int, count: int) -> list[asyncio.StreamWriter]:
    """Connections that are opened and say nothing, or half a request."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    for number, (_, writer) in enumerate(opened):
        if number % 2:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x")
    return [writer for _, writer in opened]


async def test_half_open_connections_are_bounded_and_probes_are_answered(served: Served) -> None:
    """However many are opened, a bounded number is held, and each probe is answered."""
    async with served.probes:
        writers = []
        for _ in range(4):
            writers += await silent(served.probes.port, CONNECTIONS_MAX)
            assert (await served.get("/livez"))[0] == 200
            assert (await served.get("/readyz"))[0] == 200
            assert len(served.probes._connections) <= CONNECTIONS_MAX
        for writer in writers:
            writer.close()


async def test_a_connection_without_a_request_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, half a header, or silence after an answer: each has its time, then it is closed."""
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)
    monkeypatch.setattr(connections, "IDLE_S", 0.05)
    async with served.probes, asyncio.timeout(10):
        half = b"GET /livez HTTP/1.1\r\nHost: x"
        for said in (b"", half, half + b"\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.probes.port)
            writer.write(said)
            with suppress(ConnectionError):
                while await reader.read(4096):
                    pass
            writer.close()
        assert len(served.probes._connections) == 0


class Slow(OwnAnswers):
    """Metrics that take until they are let go."""

    go = asyncio.Event()

    async def metrics(self) -> CollectorRegistry:
        await self.go.wait()
        return self.registry


async def test_scrapes_do_not_hold_up_probes() -> None:
    """Few scrapes wait, more are refused at once, and a probe passes them all."""
    answers = Slow(CollectorRegistry(), lambda: WELL, PATIENCE)
    Slow.go = asyncio.Event()
    async with Probes("127.0.0.1", 0, answers) as probes, aiohttp.ClientSession() as session:

        async def status(path: str) -> int:
            async with session.get(f"http://127.0.0.1:{probes.port}{path}") as answer:
                return answer.status

        async with asyncio.TaskGroup() as tasks:
            scrapes = [
                tasks.create_task(status("/metrics")) for _ in range(SCRAPES_WAITING_MAX + 3)
            ]
            await asyncio.wait(scrapes, return_when=asyncio.FIRST_COMPLETED)
            assert await status("/livez") == 200
            Slow.go.set()
    assert sorted(each.result() for each in scrapes) == [200] * SCRAPES_WAITING_MAX + [503] * 3


@pytest.mark.parametrize(("host", "said"), [("0.0.0.0", True), ("127.0.0.1", False)])
async def test_what_is_open_to_everybody_says_so(
    host: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, with the setting that closes it."""
    with caplog.at_level("INFO"):
        async with Probes(host, 0, OF_NONE):
            pass
    assert ("telemetry.host 127.0.0.1" in caplog.text) is said
