"""Ends a process of the demo as soon as the demo itself is gone, however it went.

The demo holds the other end of the process's standard input. The system closes it even when the
demo is killed, on every platform, so that nothing is left running.
"""

import os
import runpy
import sys
import threading

_GONE = 1
"""Exit code of a process whose demo is gone."""


def hold() -> None:
    """From now on this process ends when its standard input does."""
    threading.Thread(target=_wait, name="leash", daemon=True).start()


def _wait() -> None:
    # Not through sys.stdin: its lock, held while it reads, would break the interpreter's exit.
    while os.read(0, 4096):
        pass
    # No drain: the broker lived in the demo, so there is nothing to commit to.
    os._exit(_GONE)


def main() -> None:
    """`python -m service.demo.leash MODULE ARGUMENT…`: `python -m MODULE ARGUMENT…`, held."""
    hold()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
