"""What lies around the service: image, compose file, Prometheus, Grafana, pinned versions."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from service.demo.download import REQUIREMENT
from service.demo.model import MODEL_NAME, SLOTS
from service.settings import warnings
from service.settings.reading import load
from tests.support.stopping import longest_stop_s

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if "build" in one}


def _interpolated(text: str) -> str:
    """What compose makes of a value where none of its variables is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def _seconds(duration: str) -> float:
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration).groups()  # type: ignore[union-attr]
    return 60 * int(minutes or 0) + int(seconds or 0)


def _environment() -> dict[str, str]:
    return {k: _interpolated(v) for k, v in SERVICES["sluice"]["environment"].items()}


# --- compose ----------------------------------------------------------------------------------


def test_compose_settings_are_settings() -> None:
    """Every SLUICE_ variable of the compose file is a setting with an allowed value."""
    loaded = load(None, _environment())
    assert loaded.kafka.bootstrap_servers == "kafka:19092"
    assert warnings(loaded) == ()


def test_compose_gives_a_stop_the_time_it_takes() -> None:
    """Docker waits longer than a drain, a call's own timeout and closing may take."""
    loaded = load(None, _environment())
    assert _seconds(SERVICES["sluice"]["stop_grace_period"]) >= longest_stop_s(loaded)


def test_images_are_pinned() -> None:
    """An image of others is named by an exact version, so that tomorrow's run is today's."""
    for name, one in SERVICES.items():
        if name not in OURS:
            assert re.search(r":v?\d+\.\d+\.\d+$", one["image"]), one["image"]
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.M)


def test_containers_of_ours_are_locked_down() -> None:
    """They write nowhere but to /tmp, hold no capability and cannot gain one."""
    assert set(OURS) == {"topics", "model", "producer", "sluice"}
    for one in OURS.values():
        assert one["read_only"]
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in one


def test_every_topic_is_made_before_it_is_used() -> None:
    """First Kafka, then its topics, then whoever reads or writes them."""
    name = _environment()["SLUICE_INPUT__TOPICS"]
    assert name == SERVICES["producer"]["environment"]["PRODUCER_TOPIC"]
    assert name == SERVICES["topics"]["environment"]["SLUICE_INPUT__TOPICS"]
    done = {"condition": "service_completed_successfully"}
    assert SERVICES["topics"]["command"] == ["topics", "create"]
    assert SERVICES["topics"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert SERVICES["producer"]["depends_on"]["topics"] == done
    assert SERVICES["sluice"]["depends_on"]["topics"] == done


def test_ports_are_open_on_loopback_only() -> None:
    """Nothing that compose starts can be reached from another machine."""
    ports = [port for one in SERVICES.values() for port in one.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_a_key_alone_leaves_the_local_model_in_place() -> None:
    """Only OPENAI_BASE_URL moves calls elsewhere, so no exported key is spent by surprise."""
    assert _environment()["OPENAI_BASE_URL"] == "http://model:8080/v1"
    assert "OPENAI_API_KEY" not in SERVICES["sluice"]["environment"]["OPENAI_BASE_URL"]


def test_compose_and_image_know_the_local_model() -> None:
    """Sluice asks for the model by its name, and the image holds the one that the demo fetches."""
    assert _environment()["SLUICE_EXTRACTION__MODEL"] == MODEL_NAME
    assert f"--dest /wheels {REQUIREMENT}\n" in DOCKERFILE
    assert int(_environment()["SLUICE_LIMITS__CONCURRENCY"]) == SLOTS


def test_prometheus_scrapes_the_port_that_the_service_opens() -> None:
    """The job for Sluice asks its default port, every five seconds."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (target,) = jobs["sluice"]["dns_sd_configs"]
    assert target["names"] == ["sluice"]
    assert target["port"] == load(None, {}).telemetry.port
    assert config["global"]["scrape_interval"] == "5s"


def test_prometheus_is_given_the_rules() -> None:
    """Each file of rules that its configuration names is mounted beside it."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for name in config["rule_files"]:
        mount = f"./deploy/prometheus/{name}:/etc/prometheus/{name}:ro"
        assert mount in SERVICES["prometheus"]["volumes"]


# --- image ------------------------------------------------------------------------------------


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    """Every image ends as uid 10001: a number, because runAsNonRoot cannot check a name."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    finals = [one for one in stages if re.search(r" AS (service|demo)$", one, re.M)]
    assert [re.findall(r"^USER (.*)$", one, re.M)[-1] for one in finals] == ["10001:10001"] * 2


def test_the_service_is_the_image_that_a_plain_build_gives() -> None:
    """The last stage is the service, started without a shell between it and SIGTERM."""
    assert DOCKERFILE.rindex("FROM runtime AS service") > DOCKERFILE.rindex("FROM runtime AS demo")
    assert 'ENTRYPOINT ["sluice"]\nCMD ["run"]\n' in DOCKERFILE


def test_what_the_image_copies_is_let_through_to_the_builder() -> None:
    """.dockerignore refuses everything but what the Dockerfile copies."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    assert "*" in lines
    assert {name for names in copied for name in names.split()} == allowed


# --- pinned versions --------------------------------------------------------------------------


def test_every_dependency_is_pinned() -> None:
    """constraints.txt holds exact versions, no addresses, and one for each direct dependency."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==([0-9]+!)?[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    pinned = {_normal(pin.split("==")[0]) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    wanted = {_normal(re.split(r"[\[<>=~!; ]", one)[0]) for one in project["dependencies"] + extras}
    assert wanted - {"kafka-sluice"} <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
