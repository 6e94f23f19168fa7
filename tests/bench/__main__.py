"""Sluice and its peers on one real Kafka and one compiled endpoint, in one run.

    python -m tests.bench [--scenarios a,b,c,d,e] [--peers sluice,window,bare,…] [--seconds 20]
                          [--rounds 1] [--pictures FOLDER]
    python -m tests.bench --scenarios b --peers sluice,sluice-2    (one worker; two of one command)

Prints a table for each scenario and the ratios that matter. On a machine that does other things as
well the CPU figures and ratios hold; rates are what was left over. It needs Go, for Kafka and
parallel-consumer Java and Maven, and `pip install -e '.[test,bench]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from statistics import median

from tests.bench import latency, ratios
from tests.bench.built import Missing
from tests.bench.driver import Figures, Load, Place, fill, measure
from tests.support.kafka import a_kafka

FULL = (
    Load("e1", "1,000 calls in flight, of 4 s", 1000, 4000.0, 0.5),
    Load("e2", "2,000 calls in flight, of 4 s", 2000, 4000.0, 0.5),
)
LOADS = (
    Load("a", "lognormal latency, median 300 ms, sigma 1", 200, 300.0, 1.0),
    Load("b", "the endpoint answers at once", 100),
    Load("c", "one partition, 1,000 keys, 50 ms", 100, 50.0, partitions=1),
    Load(
        *("d", "texts of 32 KB, 20 records in an answer", 100),
        text_bytes=32_000,
        records=20,
        rate_max=3000.0,
    ),
    *FULL,
)
PEERS = ("gather", "window", "faststream", "parallel-consumer", "bare", "sluice")


async def compare(servers: str, given: argparse.Namespace) -> dict[str, list[Figures]]:
    found = {}
    for load in LOADS:
        if load.letter[0] in given.scenarios:
            print(f"\n({load.letter}) {load.claim}; {load.slots} slots", flush=True)
            place = await fill(servers, load, given.seconds + 2 * given.warm_up)
            found[load.letter] = await _rounds(place, given)
            print(ratios.table(found[load.letter]), flush=True)
    return found


async def _rounds(place: Place, given: argparse.Namespace) -> list[Figures]:
    """The medians of all rounds; in each every peer has its turn, so that they share bad times."""
    rows: dict[str, list[Figures]] = {peer: [] for peer in given.peers}
    for _ in range(given.rounds):
        for peer in given.peers:
            try:
                rows[peer].append(await measure(place, peer, given.seconds, given.warm_up))
            except Missing as missing:
                print(f"without {peer}: {missing}", file=sys.stderr)
    return [_middle(peer, those) for peer, those in rows.items() if those]


def _middle(peer: str, those: list[Figures]) -> Figures:
    return Figures(
        peer,
        *(median(getattr(each, name) for each in those) for name in Figures.__slots__[1:]),
    )


async def run(servers: str, given: argparse.Namespace) -> None:
    found = await compare(servers, given)
    added = []
    if "e" in given.scenarios:
        print("\nlatency added to a call at 70 % load, ordering none", flush=True)
        for load in FULL:
            added.append(await latency.added(servers, load, given.seconds))
            print(added[-1], flush=True)
    print("\n" + ratios.verdicts(found, added))
    if given.pictures is not None:
        from tests.bench import pictures

        for path in pictures.draw(found, given.pictures):
            print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--scenarios", type=lambda text: text.split(","), default=list("abcde"))
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before it")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many")
    parser.add_argument("--pictures", type=Path, help="folder for charts")
    given = parser.parse_args()
    with a_kafka() as servers:
        asyncio.run(run(servers, given))


if __name__ == "__main__":
    main()
