"""The clock for everything outside of the core: the event loop's, monotonic, in seconds."""

import asyncio


def now_s() -> float:
    """Seconds on the running loop's clock; only differences between two of them are useful."""
    return asyncio.get_running_loop().time()
