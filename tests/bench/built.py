"""What the benchmarks need beside Python, built once: the endpoint with Go, one peer with Maven."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
JAVA_PEER = HERE / "parallel_consumer"


class Missing(Exception):
    """A compiler that is not here; the text says which and what for."""


def endpoint() -> Path:
    """The compiled endpoint."""
    return _built("endpoint", [HERE / "endpoint.go"], _compile)


def parallel_consumer() -> list[str]:
    """The command that runs the peer in Java."""
    sources = [JAVA_PEER / "pom.xml", JAVA_PEER / "Peer.java"]
    folder = _built("parallel-consumer", sources, _package)
    classes = folder / "classes"
    return ["java", "-Xmx512m", "-cp", f"{classes}:{folder / 'jars'}/*", "Peer"]


def _built(name: str, sources: list[Path], build: Callable[[Path], None]) -> Path:
    """The build of these very sources; built in place of its name, whole or not at all."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    target = _cache() / f"{name}-{digest}"
    if not target.exists():
        half = target.with_name(f"{target.name}.{os.getpid()}")
        build(half)
        half.rename(target)
    return target


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "kafka-sluice" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile(target: Path) -> None:
    _need("go", "the benchmarks' endpoint, which must not be what is measured")
    _run(["go", "build", "-o", str(target), str(HERE / "endpoint.go")])


def _package(target: Path) -> None:
    _need("java", "the peer parallel-consumer")
    _need("mvn", "the peer parallel-consumer")
    work = target.with_name(target.name + ".work")
    shutil.copytree(JAVA_PEER, work)
    try:
        maven = ["mvn", "-q", "-B", "-f", str(work / "pom.xml")]
        copy = ["dependency:copy-dependencies", "-DincludeScope=runtime"]
        _run([*maven, "package", *copy, f"-DoutputDirectory={work / 'target' / 'jars'}"])
        (work / "target").rename(target)
    finally:
        shutil.rmtree(work)


def _need(program: str, what_for: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"{program} is not installed; it is needed for {what_for}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{command[0]} failed: {(done.stdout + done.stderr)[-800:]}")
