"""What an answer from the cache costs against one from the model: CPU and time for each.

    python -m tests.bench.cache_hits [--texts 2000] [--in-flight 50]

The endpoint answers at once and runs in a process of its own, so that what is measured is ours:
the extractor's work for a call, a miss and its write, and a hit. A real model's latency and price
come on top of a call and not of a hit. Redis is an installed server, on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator

from service.llm.cache import ModelExtractor, cached
from service.llm.extractor import OpenAIExtractor
from service.settings import Settings
from tests.bench.slots_busy import endpoint
from tests.support.redis import RealRedis


async def ask_all(extractor: ModelExtractor, texts: list[str], in_flight: int) -> None:
    left: Iterator[str] = iter(texts)

    async def ask() -> None:
        for text in left:
            await extractor.call(text, None)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(ask())


async def measure(name: str, settings: Settings, given: argparse.Namespace) -> None:
    """Two rounds over the same texts: with a cache misses, then hits."""
    extractor = cached(OpenAIExtractor(settings, lambda _: None), settings.cache, lambda _: None)
    await extractor.start()
    try:
        for number in (1, 2):
            texts = [f"Person {n} is {n % 90}" for n in range(given.texts)]
            cpu_s, began_s = time.process_time(), time.perf_counter()
            await ask_all(extractor, texts, given.in_flight)
            cpu_ms = (time.process_time() - cpu_s) * 1000 / given.texts
            ms = (time.perf_counter() - began_s) * 1000 / given.texts
            print(f"{name:<8} round {number}: {cpu_ms:7.3f} ms of CPU, {ms:7.3f} ms a text")
    finally:
        await extractor.stop()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=50)
    given = parser.parse_args()
    with RealRedis() as server:
        async with endpoint(0, 0) as url:
            os.environ |= {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}
            patient = {"redis_url": server.url, "redis_timeout_s": 5}
            for mode in ("off", "memory", "redis"):
                cache = {"mode": mode, **(patient if mode == "redis" else {})}
                settings = Settings.model_validate({"cache": cache})
                await measure(mode, settings, given)


if __name__ == "__main__":
    asyncio.run(main())
