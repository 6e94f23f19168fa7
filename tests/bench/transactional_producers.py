"""What a transactional producer for each input partition costs: connections, memory, time, CPU.

    python -m tests.bench.transactional_producers [--partitions 10 50 100 200 300]

For each number: a process of its own fences so many partitions anew, then commits transactions in
all of them at once, as often as `--interval-s` says, then only waits. Connections are counted in
the process's own file descriptors; memory is what the producers add to the resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aiokafka import AIOKafkaProducer

from service.core.messages import Partition
from service.kafka.sending.producers import BATCH_MAX_BYTES
from service.kafka.transactions.transactions import Transactions, transactional_options
from tests.support.kafka import RealKafka
from tests.support.service import ROOT
from tests.support.topics import create_topic, unique_name
from tests.support.transactions import Ledger, Page, output

OUTPUT_PARTITIONS = 6
DEADLINE_S = 60.0
COLUMNS = (
    ("partitions", 12),
    ("fence s", 9),
    ("again s", 9),
    ("conns: new", 12),
    ("busy", 6),
    ("idle", 6),
    ("MB added", 10),
    ("txn/s", 8),
    ("CPU ms/txn", 12),
    ("idle CPU %", 12),
    ("stop s", 8),
)


def connections() -> int:
    """Sockets of this process that are TCP."""
    tcp = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    }
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        found += target.startswith("socket:[") and target[8:-1] in tcp
    return found


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1_000_000


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(servers: str, topic: str, count: int, given: argparse.Namespace) -> list[float]:
    partitions = [Partition(f"{topic}-in", number) for number in range(count)]
    group_id = unique_name("group")
    ledger = Ledger()

    def create(transactional_id: str) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=servers,
            transactional_id=transactional_id,
            max_batch_size=2 * BATCH_MAX_BYTES,
            **transactional_options(DEADLINE_S) | {"connections_max_idle_ms": given.idle_ms},
        )

    before_mb = resident_mb()
    async with asyncio.TaskGroup() as group:
        transactions = Transactions(
            create,
            group_id=group_id,
            observe=lambda _: None,
            refused=lambda topic, size: None,
            batch_max_bytes=lambda topic: BATCH_MAX_BYTES,
            interval_s=given.interval_s,
            deadline_s=DEADLINE_S,
            open_timeout_s=30.0,
            group=group,
            partitions_max=count,
        )
        transactions.ask(ledger)
        for partition in partitions:
            ledger.pages[partition] = Page(None)
        began_s = time.monotonic()
        await transactions.fence(frozenset(partitions))
        fence_s = time.monotonic() - began_s
        idle = connections()
        await publish(transactions, ledger, partitions, topic, rounds=2)
        began_s = time.monotonic()
        await transactions.fence(frozenset(partitions))
        again_s = time.monotonic() - began_s
        await asyncio.sleep(1)
        asked, used_s, began_s = len(ledger.attempts), cpu_s(), time.monotonic()
        await publish(transactions, ledger, partitions, topic, rounds=given.rounds)
        took_s = time.monotonic() - began_s
        done = len(ledger.attempts) - asked
        busy, cpu_ms = connections(), (cpu_s() - used_s) * 1000 / done
        added_mb = resident_mb() - before_mb
        used_s = cpu_s()
        await asyncio.sleep(given.idle_s)
        idle_percent = (cpu_s() - used_s) / given.idle_s * 100
        later = connections()
        began_s = time.monotonic()
        await transactions.stop(5.0)
        stop_s = time.monotonic() - began_s
    rate = done / took_s
    return [
        count,
        fence_s,
        again_s,
        idle,
        busy,
        later,
        added_mb,
        rate,
        cpu_ms,
        idle_percent,
        stop_s,
    ]


async def publish(
    transactions: Transactions,
    ledger: Ledger,
    partitions: Sequence[Partition],
    topic: str,
    rounds: int,
) -> None:
    """In each round one message of each partition, so that each has one transaction."""
    for _ in range(rounds):
        sent = []
        await asyncio.sleep(0)  # callbacks of the last round
        for partition in partitions:
            page = ledger.pages[partition]
            offset = len(page.finished)
            outputs = [(offset % OUTPUT_PARTITIONS, output(topic, b"x" * 300))]
            future = transactions.hand_over(partition, offset, outputs, lambda: None)
            future.add_done_callback(lambda _, page=page, offset=offset: page.finished.add(offset))
            sent.append(future)
        for each in sent:
            await each


def one_process(given: argparse.Namespace) -> None:
    """In a process of its own, so that memory and connections are those of the producers."""
    found = asyncio.run(measure(given.servers, given.topic, given.partitions[0], given))
    print(json.dumps(found))


def table(servers: str, given: argparse.Namespace) -> None:
    topic = unique_name("records")
    asyncio.run(create_topic(servers, topic, OUTPUT_PARTITIONS))
    asyncio.run(create_topic(servers, f"{topic}-in", max(given.partitions)))
    print("".join(f"{name:>{width}}" for name, width in COLUMNS))
    for count in given.partitions:
        command = [sys.executable, "-m", "tests.bench.transactional_producers"]
        command += ["--partitions", str(count), "--servers", servers, "--topic", topic]
        for name in ("interval-s", "rounds", "idle-s", "idle-ms"):
            command += [f"--{name}", str(getattr(given, name.replace("-", "_")))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        figures = json.loads(done.stdout.splitlines()[-1])
        cells = zip(figures, COLUMNS, strict=True)
        print("".join(f"{round(value, 2):>{width}g}" for value, (_, width) in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What transactional producers cost.")
    parser.add_argument("--partitions", type=int, nargs="+", default=[10, 50, 100, 200, 300])
    parser.add_argument("--interval-s", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--idle-ms", type=int, default=5_000)
    parser.add_argument("--servers", default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS"))
    parser.add_argument("--topic")
    given = parser.parse_args()
    if given.topic is not None:
        one_process(given)
    elif given.servers is not None:
        table(given.servers, given)
    else:
        with RealKafka({"transaction.state.log.num.partitions": "50"}, heap_mb=768) as broker:
            table(broker.bootstrap_servers, given)


if __name__ == "__main__":
    main()
