"""A real small language model on this machine, behind an OpenAI-compatible endpoint.

It is llama.cpp's own server (the xllamacpp wheel) with SmolLM2-135M-Instruct. It runs in a process
of its own, so that it does not slow down the demo's process and can be ended at any moment.

    python -m service.demo.model --host 0.0.0.0 --port 8080     on its own, until SIGTERM
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from service.core.errors import CannotRun
from service.demo.download import OWN_ENDPOINT, fetch_model
from service.demo.leash import hold

MODEL_NAME = "SmolLM2-135M-Instruct"
"""The model's name at the endpoint and in its list of models."""
SLOTS = 2
"""How many calls the model works on at once. More would gain nothing with one thread: each slot
reads the instructions for itself, and then all slots share the thread."""
THREADS = 1
"""How many threads compute. Threads wait for each other at every layer by spinning: on two cores
that other processes use too, two threads were ten times slower than one."""
CONTEXT_TOKENS = 2048
"""How many tokens of prompt and answer each slot can hold."""
START_TIMEOUT_S = 60.0
"""How many seconds the process may take until it prints its address; about one on an idle
machine."""
STOP_TIMEOUT_S = 3.0
OPENMP = "libgomp.so.1"
"""The OpenMP runtime that llama.cpp's library is linked to; a minimal Debian does not have it."""
OPENMP_WHEEL = "cmeel-libomp"
"""The demo extra's wheel with LLVM's OpenMP runtime, which has a file of the same name."""
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@asynccontextmanager
async def local_model() -> AsyncIterator[str]:
    """Start the model in a process of its own; the value is its base URL. The process ends when the
    context is left.

    The model's file must be in the cache (`fetch_model`). Raises `CannotRun` with a sentence.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.demo.model", "--leash"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # only the demo gets Ctrl-C; it ends this process
        cwd=Path(__file__).parents[2],
    )
    try:
        yield await _address(process)
    finally:
        await _end(process)


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            said = (await process.stdout.readline()).decode().strip()
            if not said:
                code = await process.wait()
                raise CannotRun(f"The local model ended with exit code {code}. {OWN_ENDPOINT}")
    except TimeoutError:
        raise CannotRun(f"The local model did not start in time. {OWN_ENDPOINT}") from None
    if not said.startswith("http"):
        raise CannotRun(said)
    return said + "/v1"


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the leash
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


# --- the process itself -------------------------------------------------------------------------


def main() -> None:
    """Serve until SIGTERM or SIGINT. Prints one line: the address, or why it cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m service.demo.model", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--leash", action="store_true", help="end when standard input does")
    wanted = parser.parse_args()
    _bring_openmp()
    if wanted.leash:
        hold()
    try:
        path = asyncio.run(fetch_model(lambda done, total: None))
        # Block the signals before the server starts its threads, which inherit that: then only
        # `sigwait` gets them. This also works as process 1 of a container, where the kernel drops
        # signals without a handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
        server = serve(path, wanted.host, wanted.port)
    except CannotRun as reason:
        print(reason, flush=True)
        sys.exit(1)
    print(server.listening_address, flush=True)
    signal.sigwait(_END_SIGNALS)
    os._exit(0)  # do not wait for answers: no client reads them any more


def _bring_openmp() -> None:
    """Start this process anew with the wheel's OpenMP runtime, where the system has none.

    The loader searches the folders in LD_LIBRARY_PATH, which it reads only when a process starts.
    Loading the file by its path beforehand would not help: the loader looks for it by its name.
    """
    folder = openmp_folder()
    known = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if sys.platform != "linux" or folder is None or str(folder) in known or _loads(OPENMP):
        return
    searched = ":".join([str(folder), *filter(None, known)])
    sys.stdout.flush()
    arguments = [sys.executable, "-m", "service.demo.model", *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, "LD_LIBRARY_PATH": searched})


def openmp_folder() -> Path | None:
    """The folder of the wheel's OpenMP runtime; None where the wheel is not installed."""
    try:
        folder = Path(str(distribution(OPENMP_WHEEL).locate_file("cmeel.prefix/lib")))
    except PackageNotFoundError:
        return None
    return folder if (folder / OPENMP).is_file() else None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def serve(path: Path, host: str, port: int) -> Any:
    """Start a llama.cpp server. It answers when this returns and runs as long as the object
    lives."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise CannotRun(
            "The local model needs the demo extra: pip install 'kafka-sluice[demo]'. "
            + OWN_ENDPOINT
        )
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as error:
        raise CannotRun(
            f"The local model's library does not load ({error}). If {OPENMP} is missing: "
            f"pip install 'kafka-sluice[demo]' brings it on Linux. {OWN_ENDPOINT}"
        ) from None
    params = CommonParams()
    params.model.path = str(path)
    params.model_alias = {MODEL_NAME}
    params.hostnames, params.port = [host], port
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.n_threads_http = 2 * SLOTS
    params.use_jinja = True  # the model's own chat template
    params.endpoint_metrics = True
    params.fit_params = False  # without an accelerator there is no memory to measure
    params.ui = False
    params.verbosity = 0
    try:
        return Server(params)
    except RuntimeError as error:
        raise CannotRun(f"The local model does not start: {error}.") from None


if __name__ == "__main__":
    main()
