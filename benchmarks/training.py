"""`python -m benchmarks.training --out DIR`: what training takes at full size, and the checkpoint that it makes.

Steps of effective batch 512, end to end, from frames in a memory-mapped file: Inception-ResNet-v2 at 299 x 299, 16
frames and one sentence per clip, bf16, over micro-batches, with and without activation checkpointing, and compiled.
The bound is the time that the chip's matrix product would take for three times the network's forward FLOPs. The frames
are noise: speed does not depend on them. Then both stages on the demo world (`full_size.py`).

Needs the repository, torch and a CUDA GPU, and takes less than eight minutes; compiled steps come last, and only while
there is time. What does not work is written down as such, and the rest goes on. `--dry-run` does all of it in
miniature on whatever there is; without a GPU no figure of it means anything. `--clips` and `--micro-batches` make the
steps fit a CPU, where they are all that is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.rig import full_size
from benchmarks.rig.chip import ceilings, clip_flops
from benchmarks.rig.full_size import Plan
from benchmarks.rig.record import RESULTS, conclude
from benchmarks.rig.timing import timed_s
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import Encoder
from etenet.video.sampling import FRAMES_PER_CLIP
from training.data.datasets import Dataset, DatasetClip
from training.loop.compiling import Compiler
from training.loop.features import cached_features
from training.loop.loading import Loader
from training.loop.memory import checkpoint_activations, keep_freed_memory, peak_bytes
from training.loop.order import TrainingExample
from training.loop.processes import Processes
from training.loop.step import Trainee, accumulate, micro_batches
from training.recipes import Recipe, msrvtt

CAPTION = " ".join(["w1"] * 12)
COMPILING_S = 120.0  # what a compiled row may take
ALONE_CLIPS = 128  # that the encoder sees without the rest of the step
CPU_MATRIX = 2048  # larger ones take minutes


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything is measured."""

    recipe: Recipe = field(default_factory=msrvtt)
    words: int = 12_000
    clips: int = 512  # of a step
    micro_batches: tuple[int, ...] = (8, 16, 32, 64)
    matrix: int = 8192
    rounds: int = 10
    compiler: Compiler = torch.compile
    plan: Plan = field(default_factory=Plan)


def miniature() -> Scale:
    """A small network, few words, two clips, and a compiler that compiles nothing."""
    return Scale(
        recipe=replace(msrvtt(), encoder="squeezenet1_1", crop_px=64),
        words=30,
        clips=2,
        micro_batches=(1, 2),
        matrix=64,
        rounds=1,
        compiler=partial(torch.compile, backend="aot_eager"),
        plan=full_size.miniature(),
    )


class Bench:
    """A data set of noise on the disk, and the network that learns from it."""

    def __init__(self, scale: Scale, folder: Path, device: torch.device) -> None:
        self.scale, self.folder, self.processes = scale, folder, Processes(device=device)
        self.dataset = noise(scale, folder)
        self.window = [TrainingExample(clip, clip.captions) for clip in self.dataset.clips["train"]]

    def trainee(self, stage: int, *, checkpointing: bool = False, compiled: bool = False) -> Trainee:
        """A new network, as `stage.py` would begin to train it."""
        recipe, device = self.scale.recipe, self.processes.device
        torch.manual_seed(0)
        start = checkpoints.initialise(
            recipe.encoder, self.dataset.vocabulary(), crop_px=recipe.crop_px, max_words=recipe.max_words
        )
        model = start.model.to(device).to(memory_format=torch.channels_last)
        if checkpointing:
            checkpoint_activations(start.encoder.network)
        settings = replace(recipe.stages[stage], activation_checkpointing=checkpointing, compiled=compiled)
        return Trainee(model, start.preprocessing, settings, self.scale.compiler).train()

    def features(self) -> dict[str, float]:
        """Stage 1: clips per second from frames on the disk to features on the disk, and of a step on those."""
        trainee, device, clips = self.trainee(1), self.processes.device, len(self.window)
        compute = partial(cached_features, trainee, self.dataset, batch_clips=min(32, clips), processes=self.processes)
        compute(self.folder / "warm_up.npy")
        started = time.perf_counter()
        features = compute(self.folder / "features.npy")
        seconds = time.perf_counter() - started
        trainee.train()
        optimizer = torch.optim.Adam(trainee.model.decoder.parameters(), 1e-6)
        loader = Loader(self.dataset, self.dataset.vocabulary(), self.scale.recipe.max_words, device, features)
        with loader.ahead([self.window] * 2) as load:

            def step() -> None:
                optimizer.zero_grad()
                accumulate(trainee, self.window, load, micro_batch=clips, processes=self.processes)
                optimizer.step()

            step()
            return {"features_clips_per_s": clips / seconds, "step_clips_per_s": clips / timed_s(step, device)}

    def step(self, trainee: Trainee, micro_batch: int) -> dict[str, Any]:
        """Stage 2: one step of effective batch 512, after a first one of a micro-batch."""
        device, clips = self.processes.device, len(self.window)
        optimizer = torch.optim.Adam(trainee.parameters(), 1e-6)
        loader = Loader(self.dataset, self.dataset.vocabulary(), self.scale.recipe.max_words, device)
        first = self.window[:micro_batch]
        with loader.ahead([first, *micro_batches(self.window, micro_batch, self.processes)]) as load:

            def step(window: Sequence[TrainingExample]) -> None:
                optimizer.zero_grad()
                accumulate(trainee, window, load, micro_batch=micro_batch, processes=self.processes)
                nn.utils.clip_grad_value_(trainee.parameters(), trainee.stage.gradient_clip_value)
                optimizer.step()

            step(first)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            loader.waited_s = 0.0
            seconds = timed_s(lambda: step(self.window), device)
        alone_s = self._encoder_alone_s(trainee, loader, micro_batch)
        return {
            "seconds": seconds,
            "clips_per_s": clips / seconds,
            "waited_for_data_share": loader.waited_s / seconds,
            "share_of_encoder": alone_s / seconds,
            "peak_memory_bytes": peak_bytes(device),
        }

    def _encoder_alone_s(self, trainee: Trainee, loader: Loader, micro_batch: int) -> float:
        """What the encoder, forth and back, would take for the window on frames that lie on the device already."""
        frames = loader.inputs([example.clip for example in self.window[:micro_batch]])
        rounds = max(1, min(ALONE_CLIPS, len(self.window)) // micro_batch)

        def run() -> None:
            for _ in range(rounds):
                trainee.features(frames).sum().backward()

        return timed_s(run, loader.device) * len(self.window) / (rounds * len(frames))


def noise(scale: Scale, folder: Path) -> Dataset:
    """A prepared folder of noise: as many clips as a step has, each with one sentence."""
    vocabulary = json.dumps({"words": [f"w{number}" for number in range(scale.words)]})
    (folder / "vocabulary.json").write_text(vocabulary)
    side = scale.recipe.preprocessing().resize_px
    shape = (scale.clips, FRAMES_PER_CLIP, side, side, 3)
    frames = np.lib.format.open_memmap(folder / "frames.npy", mode="w+", dtype=np.uint8, shape=shape)
    picture = np.random.default_rng(0).integers(256, size=shape[1:], dtype=np.uint8)
    for row in range(scale.clips):
        frames[row] = np.roll(picture, row, axis=0)
    frames.flush()
    clips = [DatasetClip(row=row, video=f"{row}", captions=(CAPTION,)) for row in range(scale.clips)]
    return Dataset(folder, {"train": clips}, np.load(folder / "frames.npy", mmap_mode="r"))


def eager_rows(bench: Bench) -> list[dict[str, Any]]:
    """A row per micro-batch, activations kept, then computed twice."""
    rows = []
    for checkpointing in (False, True):
        trainee = bench.trainee(2, checkpointing=checkpointing)
        for micro_batch in bench.scale.micro_batches:
            row = {"micro_batch": micro_batch, "activation_checkpointing": checkpointing, "compiled": False}
            rows.append(row | measured(partial(bench.step, trainee, micro_batch)))
            _tell(rows[-1])
    return rows


def compiled_rows(bench: Bench, micro_batch: int, time_is_left: Callable[[], bool]) -> list[dict[str, Any]]:
    """The best micro-batch again, through torch's compiler."""
    rows = []
    for checkpointing in (False, True):
        row: dict[str, Any] = {"micro_batch": micro_batch, "activation_checkpointing": checkpointing, "compiled": True}
        if time_is_left():
            trainee = bench.trainee(2, checkpointing=checkpointing, compiled=True)
            row |= measured(partial(bench.step, trainee, micro_batch))
            if "clips_per_s" in row:
                row |= {"compiled": trainee.compiled.works, "compile_s": trainee.compiled.compile_s}
        else:
            row["left_out"] = "no time was left"
        rows.append(row)
        _tell(row)
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of most clips per second. One of them fitted into memory."""
    return max(rows, key=lambda row: row.get("clips_per_s", 0.0))


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not."""
    gc.collect()  # what failed before is still held by its own traceback
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _tell(figures: dict[str, Any]) -> None:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    print("  ".join(shown), flush=True)


class Watch:
    """Seconds since the start: at the end of each part, and against a budget."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s, self._started = budget_s, time.monotonic()
        self.elapsed_s: dict[str, float] = {}

    def done(self, part: str) -> None:
        self.elapsed_s[part] = round(time.monotonic() - self._started, 1)
        print(f"{part}: done {self.elapsed_s[part]} s after the start", flush=True)

    def time_is_left(self) -> bool:
        """For one more compiled row."""
        return time.monotonic() - self._started < self._budget_s - COMPILING_S


def figures(scale: Scale, device: torch.device, watch: Watch, keep: Path | None, *, steps_only: bool) -> dict[str, Any]:
    """All that is measured, by part."""
    found: dict[str, Any] = {"ceilings": ceilings(scale.matrix, scale.rounds, device)}
    with tempfile.TemporaryDirectory() as scratch:
        (folder := Path(scratch) / "noise").mkdir()
        bench = Bench(scale, folder, device)
        watch.done("ceilings and frames")
        found["stage_1"] = measured(bench.features)
        _tell(found["stage_1"])
        watch.done("stage 1")
        rows = eager_rows(bench)
        watch.done("steps")
        if not steps_only:
            made = partial(full_size.made, scale.plan, Path(scratch) / "full_size", device, keep=keep)
            found["full_size"] = measured(made)
            watch.done("full-size checkpoint")
            rows += compiled_rows(bench, best_of(rows)["micro_batch"], watch.time_is_left)
            watch.done("compiled steps")
    encoder = Encoder(scale.recipe.encoder).eval()
    flops, flops_per_s = clip_flops(encoder, scale.recipe.crop_px), 1e12 * found["ceilings"]["tflop_per_s"]
    for row in rows:
        if "clips_per_s" in row:
            row["share_of_bound"] = row["clips_per_s"] * 3 * flops / flops_per_s
    return {**found, "clip_tflop": flops / 1e12, "steps": rows, "elapsed_s": watch.elapsed_s}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the full-size checkpoint there")
    parser.add_argument("--clips", type=int, metavar="N", help="of a step; default: 512")
    parser.add_argument("--micro-batches", type=int, nargs="+", metavar="N", help="default: 8 16 32 64")
    parser.add_argument("--budget-s", type=float, default=480.0, metavar="S", help="near its end nothing is compiled")
    parser.add_argument("--dry-run", action="store_true", help="all of it, in miniature")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = miniature() if options.dry_run else Scale()
    scale = replace(
        scale,
        matrix=scale.matrix if device.type == "cuda" else min(scale.matrix, CPU_MATRIX),
        clips=options.clips or scale.clips,
        micro_batches=tuple(options.micro_batches or scale.micro_batches),
    )
    steps_only = device.type == "cpu" and not options.dry_run
    found = figures(scale, device, Watch(options.budget_s), options.keep, steps_only=steps_only)
    about = {"encoder": scale.recipe.encoder, "crop_px": scale.recipe.crop_px, "clips": scale.clips}
    conclude("training", {"dry_run": options.dry_run, "device": device.type, **about, **found}, folder=options.out)
    parts = [found["stage_1"], found.get("full_size", {}), *found["steps"]]
    for part in (part for part in parts if "failed" in part):
        print(f"training: {part['failed']}", file=sys.stderr)
    return int(any("failed" in part for part in parts))


if __name__ == "__main__":
    sys.exit(main())
