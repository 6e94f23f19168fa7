"""Prometheus and promtool for tests and the drill: those of the path, else Debian's, unpacked.

Nothing is installed and no service started: the package is downloaded and unpacked once into the
cache folder. `Prometheus` runs a real one on a free port of 127.0.0.1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.support.kafka import dying_with_us, free_ports
from tests.support.started import Started, do_without

GOLDEN = Path(__file__).parents[1] / "data" / "metrics.txt"

START_TIMEOUT_S = 60.0
"""From the process's start to its first answer; below a second on a free machine."""


class PrometheusUnavailable(Exception):
    """There is no Prometheus here; the text says why and what to do."""


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    if found := shutil.which(name):
        return found
    binary = _cache() / "usr" / "bin" / name
    if not binary.exists():
        _unpack_debians(_cache())
    if not binary.exists():
        raise PrometheusUnavailable(f"no {name} here, and Debian's packages do not have it either")
    return str(binary)


def promtool(*arguments: str) -> str:
    """What it printed; the test fails where it failed, and is skipped where there is none."""
    try:
        command = [tool("promtool"), *arguments]
    except PrometheusUnavailable as error:
        do_without(str(error), "TEST_PROMTOOL")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path: Path) -> ModuleType:
    """A file of deploy/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"deploy_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def exposed_series() -> dict[str, set[str]]:
    """The labels of every series that the service exposes, by the name that Prometheus stores."""
    found = {}
    for line in GOLDEN.read_text().splitlines():
        if not line.startswith("#"):
            name, kind, labels, _ = line.split(" | ", 3)
            ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
            for end in ends.get(kind, ("",)):
                found[name + end] = {*labels.split(","), *(["le"] if end == "_bucket" else [])}
    return found


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "kafka-sluice" / "prometheus"


def _unpack_debians(folder: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise PrometheusUnavailable(
            "no prometheus and promtool here: put them on the path (this is no Debian or Ubuntu, "
            "from whose packages they could be taken)"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        if not _download(work):
            if os.geteuid() == 0:
                _said("apt-get", "update", "-qq", cwd=work)
            if not _download(work):
                raise PrometheusUnavailable(
                    "apt-get could not download the package prometheus: run `apt-get update`, or "
                    "put prometheus and promtool on the path"
                )
        for package in Path(work).glob("*.deb"):
            _said("dpkg", "-x", str(package), f"{work}/unpacked", cwd=work)
        if not folder.exists():  # another run may have been faster
            Path(work, "unpacked").rename(folder)


def _download(work: str) -> bool:
    # From Debian 13 on promtool is a package of its own; before, it was part of the other one.
    for name in ("prometheus", "promtool"):
        _said("apt-get", "download", "-qq", name, cwd=work)
    return any(Path(work).glob("prometheus_*.deb"))


def _said(*command: str, cwd: str | Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout


class Prometheus(Started):
    """A server with this configuration and these files beside it; `with` starts and removes it."""

    def __init__(self, config: Mapping[str, Any], files: Mapping[str, str]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._listen = f"127.0.0.1:{port}"
        self._config, self._files = config, files
        self._folder = Path(tempfile.mkdtemp(prefix="sluice-prometheus-"))
        self._process: subprocess.Popen[bytes] | None = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query gives; raises `ValueError` with Prometheus's own words."""
        return list(self._get("query", query=expression)["result"])

    def query_range(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[dict[str, Any]]:
        found = self._get(
            "query_range", query=expression, start=start_s, end=end_s, step=f"{step_s}s"
        )
        return list(found["result"])

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are pending or fire now."""
        return list(self._get("alerts")["alerts"])

    def _get(self, path: str, **parameters: object) -> Any:
        url = f"{self.url}/api/v1/{path}"
        body = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(url, data=body, timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")) from None

    def begin(self) -> None:
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(dict(self._config)))
        for name, text in self._files.items():
            (self._folder / name).write_text(text)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                dying_with_us(self._command()),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise PrometheusUnavailable(f"did not start: {self._log.read_text()[-800:]}")
            time.sleep(0.1)

    @property
    def _log(self) -> Path:
        return self._folder / "prometheus.log"

    def _command(self) -> list[str]:
        return [
            tool("prometheus"),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._listen}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def remove(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)
