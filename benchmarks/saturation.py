"""`python -m benchmarks.saturation`: latency from a tenth of what the server can do to more than that, open loop.

Requests arrive by chance (Poisson) whether or not those before are answered, and latency counts from the moment a
request was meant to be sent. Clips of several sizes in turn; refusals (503) are counted, not timed. The curve is drawn
beside the figures. `--batch-sizes` are compared by the same clips: what they can do, and their latency at 70 % of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.rig import servers
from benchmarks.rig.clips import drifting
from benchmarks.rig.load import Arrival, closed_loop, open_loop, throughput_per_s
from benchmarks.rig.record import REPOSITORY, RESULTS, conclude
from etenet.errors import EtenetError
from etenet.serving import archive

SIZES = ((320, 240),) * 4 + ((640, 480),) * 2 + ((1280, 720),)
SECONDS_OF_CLIP = 10
CLIENTS = 16
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.2)
MODERATE = 0.7
PERCENTILES = (50, 90, 99, 99.9)


def capacity_per_s(url: str, clips: Sequence[bytes], seconds: float) -> float:
    return throughput_per_s(asyncio.run(closed_loop(url, clips, clients=CLIENTS, seconds=seconds)))


def under_load(url: str, clips: Sequence[bytes], rate_per_s: float, seconds: float) -> dict[str, float]:
    """Percentiles of the latency in ms, and what share was refused."""
    arrivals = asyncio.run(open_loop(url, clips, rate_per_s=rate_per_s, seconds=seconds))
    broken = [arrival.status for arrival in arrivals if arrival.status not in (200, 503)]
    if broken:
        raise RuntimeError(f"{len(broken)} requests were answered with status {broken[0]}")
    return {
        "rate_per_s": round(rate_per_s, 3),
        "requests": len(arrivals),
        "refused_share": round(sum(arrival.status == 503 for arrival in arrivals) / len(arrivals), 4),
        **_latency_ms(arrivals),
    }


def _latency_ms(arrivals: Sequence[Arrival]) -> dict[str, float]:
    taken = [arrival.seconds for arrival in arrivals if arrival.status == 200]
    return {
        f"p{p:g}": round(1000 * float(value), 1)
        for p, value in zip(PERCENTILES, np.percentile(taken, PERCENTILES), strict=True)
    }


def draw(curve: Sequence[Mapping[str, float]], capacity: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rates = [point["rate_per_s"] for point in curve]
    for p, shade in zip(PERCENTILES, ("#9ecae1", "#4292c6", "#08519c", "#08306b"), strict=True):
        axes.plot(rates, [point[f"p{p:g}"] for point in curve], marker="o", markersize=3, color=shade, label=f"p{p:g}")
    axes.axvline(capacity, color="#888888", linestyle="--", linewidth=1)
    axes.annotate("capacity", (capacity, axes.get_ylim()[1]), ha="right", va="top", rotation=90, color="#888888")
    axes.set(yscale="log", xlabel="arrivals per second (Poisson)", ylabel="ms from the intended sending to the answer")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saturation", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "model_store" / "demo.pt", metavar="F.pt")
    parser.add_argument("--seconds", type=float, default=60.0, help="per point of the curve, and per batch size")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the capacity")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(1, 2, 4, 8, 16))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
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
    draw(curve, capacity, options.out / "saturation.png")
    conclude(
        "saturation",
        {
            "clips": [f"{width}x{height}, {SECONDS_OF_CLIP} s" for width, height in SIZES],
            "capacity_per_s": round(capacity, 3),
            "curve": curve,
            "batch_sizes": by_batch_size,
        },
        folder=options.out,
    )


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        print(f"saturation: {error}", file=sys.stderr)
        sys.exit(2)
