"""Ends a process of the demo as soon as the demo itself has ended, even where it was killed.

The demo holds the other end of the process's standard input. The operating system closes it when
the demo ends for any reason, on every platform, so that no process is left running.
"""

import os
import runpy
import sys
import threading

_GONE = 1
"""The exit code of a process whose demo has ended."""


def hold() -> None:
    """From now on this process ends when its standard input is closed."""
    threading.Thread(target=_wait, name="leash", daemon=True).start()


def _wait() -> None:
    # sys.stdin is not used: it holds its lock while it reads, which would break Python's exit.
    while os.read(0, 4096):
        pass
    # There is no drain: the broker was part of the demo, so nothing could be committed.
    os._exit(_GONE)


def main() -> None:
    """`python -m service.demo.leash MODULE ARGUMENT…` runs `python -m MODULE ARGUMENT…` on the
    leash."""
    hold()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
