"""The curve of latency over arrivals, as a PNG: of the server, and of captioning processes that share a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.rig.load import PERCENTILES

_SHADES = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def draw_latency(curve: Sequence[Mapping[str, float]], capacity_per_s: float, path: Path) -> None:
    """`curve` has a point per rate, as `latency_percentiles_ms` gives it and `rate_per_s`."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rates = [point["rate_per_s"] for point in curve]
    for p, shade in zip(PERCENTILES, _SHADES, strict=True):
        axes.plot(rates, [point[f"p{p:g}"] for point in curve], marker="o", markersize=3, color=shade, label=f"p{p:g}")
    axes.axvline(capacity_per_s, color="#888888", linestyle="--", linewidth=1)
    top = axes.get_ylim()[1]
    axes.annotate("capacity", (capacity_per_s, top), ha="right", va="top", rotation=90, color="#888888")
    axes.set(
        yscale="log", xlabel="arrivals per second (Poisson)", ylabel="ms from the intended sending to the response"
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
