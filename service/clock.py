"""The clock that everything outside of the core reads: the event loop's, monotonic, in seconds."""

import asyncio


def now_s() -> float:
    """Seconds on the running loop's clock; only their differences mean something."""
    return asyncio.get_running_loop().time()
