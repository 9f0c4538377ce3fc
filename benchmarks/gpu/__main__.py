"""`python -m benchmarks.gpu --out DIR`: how fast each stage is on a GPU, beside peers and the chip's limits.

Needs the repository, torch and a CUDA GPU, and takes less than eight minutes. The network is untrained and its frames
are noise: speed depends on neither. Captions are compared with the demo checkpoint. A part that fails is recorded as
failed, and the others go on; one that has not begun within `--budget-s` is recorded as left out. `--dry-run` does all
of it once in miniature, with or without a GPU; without one, nothing is captured as a CUDA graph, and the figures mean
nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.captions import equality
from benchmarks.gpu.encoders import encoding
from benchmarks.gpu.searching import searching
from benchmarks.gpu.starting import starting
from benchmarks.gpu.streaming import streaming
from benchmarks.gpu.workers import working
from benchmarks.gpu.workload import MINIATURE, Workload
from benchmarks.rig import command
from benchmarks.rig.chip import ceilings
from benchmarks.rig.plots import draw_latency
from benchmarks.rig.untrained import untrained
from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import default_preprocessing
from etenet.video.clip import FRAMES_PER_CLIP


def parts(workload: Workload, device: torch.device, folder: Path) -> dict[str, Callable[[], Mapping[str, Any]]]:
    """By name, in the order in which they run. What `starting` compiles, the parts after it use."""
    size_px = default_preprocessing(workload.encoder, crop_px=workload.crop_px).resize_px
    frames = torch.randint(0, 256, (FRAMES_PER_CLIP, size_px, size_px, 3), dtype=torch.uint8)
    checkpoint = untrained(workload.encoder, workload.crop_px, frames, words=workload.words)
    path = folder / "untrained.pt"
    checkpoints.save(checkpoint, path)
    chip = ceilings(workload.matrix, workload.rounds, device)
    return {
        "chip": lambda: chip,
        "starting": lambda: starting(path, folder, device),
        "searching": lambda: searching(checkpoint.model.decoder, workload, device),
        "encoding": lambda: encoding(checkpoint, workload, device, chip["tflop_per_s"], folder),
        "captions": lambda: equality(workload, device),
        "streaming": lambda: streaming(path, workload, device),
        "working": lambda: working(path, workload, device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="all of it once, in miniature")
    parser.add_argument("--budget-s", type=float, default=480.0, metavar="S", help="no part begins after it")
    parser.add_argument("--load-s", type=float, metavar="S", help="of arrivals per point of the curve; default: 4")
    parser.add_argument("--encoder", metavar="NAME", help="default: inceptionresnetv2")
    options, results = command.start(parser, arguments)
    workload = MINIATURE if options.dry_run else Workload()
    workload = replace(workload, encoder=options.encoder or workload.encoder, load_s=options.load_s or workload.load_s)
    if not torch.cuda.is_available() and not options.dry_run:
        raise UsageError("there is no CUDA GPU here; --dry-run tries the code without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Mapping[str, Any]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts(workload, device, Path(folder)).items():
            if time.monotonic() - began > options.budget_s:
                figures[name] = {"left_out": "no time was left"}
                continue
            try:
                figures[name] = part()
            except Exception as error:
                traceback.print_exc()
                figures[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"after {time.monotonic() - began:.0f} s: {name}: {figures[name]}", flush=True)
    seconds = time.monotonic() - began
    about = {"dry_run": options.dry_run, "device": str(device), "encoder": workload.encoder, "seconds": seconds}
    results.conclude("gpu", {**about, **figures})
    if best := figures["working"].get("best"):
        draw_latency(best["curve"], best["capacity_per_s"], results.folder / "gpu.png")
    return int(any("failed" in part for part in figures.values()))


if __name__ == "__main__":
    command.run("gpu", main)
