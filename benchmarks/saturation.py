"""`python -m benchmarks.saturation`: latency from a tenth of the server's capacity to more than all of it, open loop.

Requests arrive at random (Poisson), whether or not earlier ones have a response. Latency counts from the moment at
which a request was intended to be sent. Clips of several sizes take turns. Refusals (503) are counted, not timed. The
curve is drawn as `saturation.png`. For each of `--batch-sizes`: the capacity, and the latency at 70 % of the capacity
of the default.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rig import command, servers
from benchmarks.rig.clips import drifting
from benchmarks.rig.load import closed_loop, latency_percentiles_ms, open_loop, throughput_per_s
from benchmarks.rig.plots import draw_latency
from benchmarks.rig.record import REPOSITORY
from etenet.serving import archive

SIZES = ((320, 240),) * 4 + ((640, 480),) * 2 + ((1280, 720),)
SECONDS_OF_CLIP = 10
CLIENTS = 16
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.2)
MODERATE = 0.7


def capacity_per_s(url: str, clips: Sequence[bytes], seconds: float) -> float:
    return throughput_per_s(asyncio.run(closed_loop(url, clips, clients=CLIENTS, seconds=seconds)))


def under_load(url: str, clips: Sequence[bytes], rate_per_s: float, seconds: float) -> dict[str, float]:
    """Percentiles of the latency in ms, and the share of refusals."""
    arrivals = asyncio.run(open_loop(url, clips, rate_per_s=rate_per_s, seconds=seconds))
    broken = [arrival.status for arrival in arrivals if arrival.status not in (200, 503)]
    if broken:
        raise RuntimeError(f"{len(broken)} requests got status {broken[0]}")
    return {
        "rate_per_s": round(rate_per_s, 3),
        "requests": len(arrivals),
        "refused_share": round(sum(arrival.status == 503 for arrival in arrivals) / len(arrivals), 4),
        **latency_percentiles_ms(arrivals),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saturation", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "model_store" / "demo.pt", metavar="F.pt")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each point of the curve, and for each batch size"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the capacity")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(1, 2, 4, 8, 16))
    options, results = command.start(parser, arguments)
    clips = [drifting(SECONDS_OF_CLIP, *size) for size in SIZES]
    by_batch_size = {}
    with tempfile.TemporaryDirectory() as folder:
        mar = archive.package(options.checkpoint, Path(folder) / "etenet.mar")
        with servers.ours_with(mar, clips[0]) as ours:
            capacity = capacity_per_s(ours.url, clips, options.seconds)
            print(f"{CLIENTS} clients: {capacity:.2f} clips/s")
            curve = []
            for share in options.shares:
                curve.append(under_load(ours.url, clips, share * capacity, options.seconds))
                print("  ".join(f"{name} {value:g}" for name, value in curve[-1].items()), flush=True)
        for size in options.batch_sizes:
            with servers.ours_with(mar, clips[0], batchSize=size) as ours:
                rate = capacity_per_s(ours.url, clips, options.seconds / 2)
                moderate = under_load(ours.url, clips, MODERATE * capacity, options.seconds / 2)
            by_batch_size[size] = {"capacity_per_s": round(rate, 3), **moderate}
            print(
                f"batchSize {size}: {rate:.2f} clips/s, p50 {moderate['p50']} ms, p99 {moderate['p99']} ms", flush=True
            )
    results.conclude(
        "saturation",
        {
            "clips": [f"{width}x{height}, {SECONDS_OF_CLIP} s" for width, height in SIZES],
            "capacity_per_s": round(capacity, 3),
            "curve": curve,
            "batch_sizes": by_batch_size,
        },
    )
    draw_latency(curve, capacity, results.folder / "saturation.png")


if __name__ == "__main__":
    command.run("saturation", main)
