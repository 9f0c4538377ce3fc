"""`python -m benchmarks.server`: the whole server, beside the work it does, and beside what a fair user would write.

The peers, TorchServe and LitServe, run the same plain code (`plain.py`) on the same checkpoint, one clip at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

import etenet
from benchmarks.rig import servers
from benchmarks.rig.load import Arrival, Client, closed_loop, throughput_per_s
from benchmarks.rig.record import REPOSITORY, RESULTS, conclude
from benchmarks.rig.untrained import numbered_words
from etenet.errors import EtenetError
from etenet.model import checkpoint as checkpoints
from etenet.runtime.openvino import compile_encoder

CLIENTS = 8
PEERS = {"plain TorchServe": servers.plain_torchserve, "plain LitServe": servers.plain_litserve}


def one_by_one(captioner: etenet.Captioner, url: str, clip: bytes, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds in process and over HTTP, in turns, each with nothing beside it."""

    async def measure() -> tuple[list[float], list[float]]:
        within, over_http = [], []
        async with Client(url) as client:
            for _ in range(rounds):
                started = time.perf_counter()
                captioner.caption(clip)
                within.append(time.perf_counter() - started)
                over_http.append(_answered(await client.send(clip)).seconds)
        return within, over_http

    return asyncio.run(measure())


def alone(url: str, clip: bytes, rounds: int) -> float:
    """p50 in seconds of one client."""

    async def measure() -> list[float]:
        async with Client(url) as client:
            return [_answered(await client.send(clip)).seconds for _ in range(rounds)]

    return statistics.median(asyncio.run(measure()))


def together(url: str, clip: bytes, seconds: float) -> float:
    """Captions per second with 8 clients that always have one more."""
    arrivals = asyncio.run(closed_loop(url, [clip], clients=CLIENTS, seconds=seconds))
    return throughput_per_s([_answered(arrival) for arrival in arrivals])


def _answered(arrival: Arrival) -> Arrival:
    if arrival.status != 200:
        raise RuntimeError(f"a clip was answered with status {arrival.status}")
    return arrival


def processor_seconds(captioner: etenet.Captioner, clip: bytes, rounds: int) -> float:
    """What decoding, encoding and searching of a clip take of the processor, in process."""

    def used() -> float:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(process.cpu_times().user + process.cpu_times().system for process in family)

    before = used()
    for _ in range(rounds):
        captioner.caption(clip)
    return (used() - before) / rounds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--clip", type=Path, default=REPOSITORY / "examples" / "car-bouncing-room.mp4", metavar="F")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=90.0, help="of load with 8 clients, per server")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    clip = options.clip.read_bytes()
    words = numbered_words(options.words)
    p50_s, per_s = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "untrained.pt"
        checkpoints.save(checkpoints.initialise(options.encoder, words, crop_px=options.crop_px), checkpoint)
        compile_encoder(checkpoints.load(checkpoint), Path(folder) / "encoder.xml")
        captioner = etenet.load(checkpoint, compiled_encoder=Path(folder) / "encoder.xml")
        captioner.caption(clip)
        with servers.ours(checkpoint, clip) as ours:
            within, over_http = one_by_one(captioner, ours.url, clip, options.rounds)
            processor_s = processor_seconds(captioner, clip, options.rounds)
            p50_s["ours"], per_s["ours"] = statistics.median(over_http), together(ours.url, clip, options.seconds)
        for name, peer in PEERS.items():
            with peer(checkpoint, clip) as it:
                p50_s[name], per_s[name] = alone(it.url, clip, options.rounds), together(it.url, clip, options.seconds)
    in_process_s, cores = statistics.median(within), len(os.sched_getaffinity(0))
    print(f"{'in process':20} p50 {1000 * in_process_s:8.1f} ms")
    for name in p50_s:
        print(f"{name:20} p50 {1000 * p50_s[name]:8.1f} ms, {CLIENTS} clients {per_s[name]:6.3f} clips/s")
    conclude(
        "server",
        {
            "encoder": options.encoder,
            "words": options.words,
            "p50_ms": {name: round(1000 * seconds, 1) for name, seconds in p50_s.items()},
            "throughput_per_s": {name: round(rate, 3) for name, rate in per_s.items()},
            "in_process_p50_ms": round(1000 * in_process_s, 1),
            "processor_s_per_clip": round(processor_s, 3),
            "overhead_p50_ms": 1000 * (p50_s["ours"] - in_process_s),
            "throughput_share": per_s["ours"] * processor_s / cores,
            "throughput_vs_plain": per_s["ours"] / max(per_s[name] for name in PEERS),
            "p50_vs_plain": p50_s["ours"] / min(p50_s[name] for name in PEERS),
            "ready_s": ours.ready_s,
        },
        folder=options.out,
    )


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        print(f"server: {error}", file=sys.stderr)
        sys.exit(2)
