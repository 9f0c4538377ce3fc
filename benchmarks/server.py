"""`python -m benchmarks.server`: the whole server, beside the captioner in process, and beside plain servers.

The peers, TorchServe and LitServe, run the same plain code (`peers/plain.py`) on the same checkpoint, one clip at a
time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

import etenet
from benchmarks.rig import command, servers
from benchmarks.rig.load import Arrival, Client, closed_loop, throughput_per_s
from benchmarks.rig.record import REPOSITORY
from benchmarks.rig.untrained import numbered_words
from etenet.linux import cores
from etenet.model import checkpoint as checkpoints
from etenet.runtime.openvino import compile_encoder

CLIENTS = 8
PEERS = {"plain TorchServe": servers.plain_torchserve, "plain LitServe": servers.plain_litserve}


def one_by_one(captioner: etenet.Captioner, url: str, clip: bytes, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each clip, in process and over HTTP, in turns."""

    async def measure() -> tuple[list[float], list[float]]:
        in_process, over_http = [], []
        async with Client(url) as client:
            for _ in range(rounds):
                started = time.perf_counter()
                captioner.caption(clip)
                in_process.append(time.perf_counter() - started)
                over_http.append(_captioned(await client.send(clip)).seconds)
        return in_process, over_http

    return asyncio.run(measure())


def alone(url: str, clip: bytes, rounds: int) -> float:
    """p50 of one client, in seconds."""

    async def measure() -> list[float]:
        async with Client(url) as client:
            return [_captioned(await client.send(clip)).seconds for _ in range(rounds)]

    return statistics.median(asyncio.run(measure()))


def together(url: str, clip: bytes, seconds: float) -> float:
    """Captions per second with 8 clients that always have another clip."""
    arrivals = asyncio.run(closed_loop(url, [clip], clients=CLIENTS, seconds=seconds))
    return throughput_per_s([_captioned(arrival) for arrival in arrivals])


def _captioned(arrival: Arrival) -> Arrival:
    if arrival.status != 200:
        raise RuntimeError(f"a clip got status {arrival.status}")
    return arrival


def processor_seconds(captioner: etenet.Captioner, clip: bytes, rounds: int) -> float:
    """Processor time that decoding, encoding and searching take for one clip, in process."""

    def used() -> float:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        times = [process.cpu_times() for process in family]
        return float(sum(of_process.user + of_process.system for of_process in times))

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
    parser.add_argument("--seconds", type=float, default=90.0, help="of load by 8 clients, for each server")
    options, results = command.start(parser, arguments)
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
            in_process, over_http = one_by_one(captioner, ours.url, clip, options.rounds)
            processor_s = processor_seconds(captioner, clip, options.rounds)
            p50_s["ours"], per_s["ours"] = statistics.median(over_http), together(ours.url, clip, options.seconds)
        for name, peer in PEERS.items():
            with peer(checkpoint, clip) as it:
                p50_s[name], per_s[name] = alone(it.url, clip, options.rounds), together(it.url, clip, options.seconds)
    in_process_s = statistics.median(in_process)
    print(f"{'in process':20} p50 {1000 * in_process_s:8.1f} ms")
    for name in p50_s:
        print(f"{name:20} p50 {1000 * p50_s[name]:8.1f} ms, {CLIENTS} clients {per_s[name]:6.3f} clips/s")
    results.conclude(
        "server",
        {
            "encoder": options.encoder,
            "words": options.words,
            "p50_ms": {name: round(1000 * seconds, 1) for name, seconds in p50_s.items()},
            "throughput_per_s": {name: round(rate, 3) for name, rate in per_s.items()},
            "in_process_p50_ms": round(1000 * in_process_s, 1),
            "processor_s_per_clip": round(processor_s, 3),
            "overhead_p50_ms": 1000 * (p50_s["ours"] - in_process_s),
            "throughput_share": per_s["ours"] * processor_s / cores(),
            "throughput_vs_plain": per_s["ours"] / max(per_s[name] for name in PEERS),
            "p50_vs_plain": p50_s["ours"] / min(p50_s[name] for name in PEERS),
            "ready_s": ours.ready_s,
        },
    )


if __name__ == "__main__":
    command.run("server", main)
