"""`python -m benchmarks.neighbours`: a caption on a machine that is shared.

One client asks a server with the demo model: alone, beside one busy loop per core, and in a control group with half the
cores, where such groups can be made. The fair share of a caption's time is the time alone, times how many programs want
a core for each core that there is. The first two take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rig import command, servers
from benchmarks.rig.control_group import control_group
from benchmarks.rig.load import Client
from benchmarks.rig.record import REPOSITORY
from etenet.linux import cores

CLIP = REPOSITORY / "examples" / "rocket-standing-street.mp4"
_LOOP = "while True: pass"


@dataclass(slots=True)
class Captions:
    """Of one situation: seconds of each caption, and processor seconds of all, by the server with its processes."""

    seconds: list[float] = field(default_factory=list)
    processor_s: float = 0.0

    def ask(self, served: servers.Served, clip: bytes, count: int) -> None:
        before_s = processor_s(served.process)
        self.seconds += asyncio.run(latencies_s(served.url, clip, count))
        self.processor_s += processor_s(served.process) - before_s

    @property
    def p50_ms(self) -> float:
        return 1000 * statistics.median(self.seconds)

    @property
    def per_processor_s(self) -> float:
        return len(self.seconds) / self.processor_s

    def figures(self) -> dict[str, float]:
        return {"p50_ms": round(self.p50_ms, 2), "captions_per_processor_s": round(self.per_processor_s, 2)}


async def latencies_s(url: str, clip: bytes, count: int) -> list[float]:
    """Of so many captions, one after another."""
    async with Client(url) as client:
        arrivals = [await client.send(clip) for _ in range(count)]
    if bad := [arrival.status for arrival in arrivals if arrival.status != 200]:
        raise RuntimeError(f"a request got status {bad[0]}")
    return [arrival.seconds for arrival in arrivals]


def processor_s(process: psutil.Process | None) -> float:
    """Of a process and those that it started, the ended ones too."""
    assert process is not None
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            total += sum(each.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Programs that each want all of a core."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGKILL)
            loop.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "model_store" / "demo.pt", metavar="F.pt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=20, metavar="N", help="in each round")
    options, results = command.start(parser, arguments)
    clip, count = CLIP.read_bytes(), cores()
    alone, beside, limited = Captions(), Captions(), Captions()
    with servers.ours(options.checkpoint, clip) as served:
        asyncio.run(latencies_s(served.url, clip, options.captions))
        for _ in range(options.rounds):
            alone.ask(served, clip, options.captions)
            with busy_loops(count):
                beside.ask(served, clip, options.captions)
    with control_group(count / 2) as enter:
        if enter:
            enter()
            with servers.ours(options.checkpoint, clip) as served:
                asyncio.run(latencies_s(served.url, clip, options.captions))
                limited.ask(served, clip, options.rounds * options.captions)
    results.conclude(
        "neighbours",
        {
            "cores": count,
            "captions": options.rounds * options.captions,
            "alone": alone.figures(),
            "beside_a_busy_loop_per_core": _compared(beside, alone),
            "with_half_the_cores": _compared(limited, alone) if limited.seconds else None,
        },
    )


def _compared(shared: Captions, alone: Captions) -> dict[str, Any]:
    """Both situations leave half of each core: the fair share is twice the time alone."""
    ratios = {
        "p50_of_fair_share": shared.p50_ms / (2 * alone.p50_ms),
        "captions_per_processor_s_of_alone": shared.per_processor_s / alone.per_processor_s,
    }
    return shared.figures() | {name: round(ratio, 3) for name, ratio in ratios.items()}


if __name__ == "__main__":
    command.run("neighbours", main)
