"""`python -m benchmarks.training --out DIR`: how fast full-size training is, and the checkpoint that it makes.

Measures whole steps of effective batch 512, from frames in a memory-mapped file: Inception-ResNet-v2 at 299 x 299, 16
frames and one sentence per clip, bf16; for several micro-batches, with and without activation checkpointing, and
compiled. The bound is the time that the chip's matrix product would take for three times the network's forward FLOPs.
The frames are noise: speed does not depend on them. Then both stages are trained on the demo world
(`rig/full_size.py`).

Needs the repository, torch and a CUDA GPU, and takes less than eight minutes. Compiled steps come last, and only if
there is time. A part that fails is recorded as failed, and the others go on. `--dry-run` does all of it in miniature,
with or without a GPU; without one, the figures mean nothing. `--clips` and `--micro-batches` make the steps fit a CPU,
where only the steps are measured.
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

from benchmarks.rig import command, full_size
from benchmarks.rig.chip import ceilings, clip_flops
from benchmarks.rig.full_size import Plan
from benchmarks.rig.timing import timed_s
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import Encoder
from etenet.video.clip import FRAMES_PER_CLIP
from training.data.datasets import Dataset, DatasetClip
from training.loop.compiling import Compiler
from training.loop.features import cached_features
from training.loop.loading import Loader
from training.loop.memory import checkpoint_activations, keep_freed_memory, peak_bytes
from training.loop.order import TrainingExample
from training.loop.processes import Processes
from training.loop.step import Trainee, accumulate, micro_batches
from training.recipes import msrvtt
from training.run_settings import Recipe

CAPTION = " ".join(["w1"] * 12)
COMPILING_S = 120.0  # the longest that a compiled row takes
ALONE_CLIPS = 128  # on which the encoder is timed without the rest of the step
CPU_MATRIX = 2048  # larger ones take minutes


@dataclass(frozen=True, kw_only=True)
class TrainingWorkload:
    """How much of everything is measured."""

    recipe: Recipe = field(default_factory=msrvtt)
    words: int = 12_000
    clips: int = 512  # in a step
    micro_batches: tuple[int, ...] = (8, 16, 32, 64)
    matrix: int = 8192
    rounds: int = 10
    compiler: Compiler = torch.compile
    plan: Plan = field(default_factory=Plan)  # of the full-size checkpoint


def miniature() -> TrainingWorkload:
    """A small network, few words, two clips, and a compiler that generates no code."""
    return TrainingWorkload(
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
    """A data set of noise on disk, and networks that learn from it."""

    def __init__(self, workload: TrainingWorkload, folder: Path, device: torch.device) -> None:
        self.workload, self.folder, self.processes = workload, folder, Processes(device=device)
        self.dataset = noise(workload, folder)
        self.window = [TrainingExample(clip, clip.captions) for clip in self.dataset.clips["train"]]

    def trainee(self, stage: int, *, checkpointing: bool = False, compiled: bool = False) -> Trainee:
        """A new network, as `loop/stage.py` starts to train it."""
        recipe, device = self.workload.recipe, self.processes.device
        torch.manual_seed(0)
        start = checkpoints.initialise(
            recipe.encoder, self.dataset.vocabulary(), crop_px=recipe.crop_px, max_words=recipe.max_words
        )
        model = start.model.to(device).to(memory_format=torch.channels_last)
        if checkpointing:
            checkpoint_activations(start.encoder.network)
        settings = replace(
            recipe.stages[stage], mixed_precision=True, activation_checkpointing=checkpointing, compiled=compiled
        )
        return Trainee(model, start.preprocessing, settings, self.workload.compiler).train()

    def features(self) -> dict[str, float]:
        """Stage 1: clips per second from frames on disk to features on disk, and of a step on these features."""
        trainee, device, clips = self.trainee(1), self.processes.device, len(self.window)
        compute = partial(cached_features, trainee, self.dataset, batch_clips=min(32, clips), processes=self.processes)
        compute(self.folder / "warm_up.npy")
        started = time.perf_counter()
        features = compute(self.folder / "features.npy")
        seconds = time.perf_counter() - started
        trainee.train()
        optimizer = torch.optim.Adam(trainee.model.decoder.parameters(), 1e-6)
        loader = Loader(self.dataset, self.dataset.vocabulary(), self.workload.recipe.max_words, device, features)
        with loader.ahead([self.window] * 2) as load:

            def step() -> None:
                optimizer.zero_grad()
                accumulate(trainee, self.window, load, micro_batch=clips, processes=self.processes)
                optimizer.step()

            step()
            return {"features_clips_per_s": clips / seconds, "step_clips_per_s": clips / timed_s(step, device)}

    def step(self, trainee: Trainee, micro_batch: int) -> dict[str, Any]:
        """Stage 2: one step of effective batch 512, after a step of one micro-batch to warm up."""
        device, clips = self.processes.device, len(self.window)
        optimizer = torch.optim.Adam(trainee.parameters(), 1e-6)
        loader = Loader(self.dataset, self.dataset.vocabulary(), self.workload.recipe.max_words, device)
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
        """Seconds for the encoder, forward and backward, for as many clips as a step has, with frames on the device."""
        frames = loader.inputs([example.clip for example in self.window[:micro_batch]])
        rounds = max(1, min(ALONE_CLIPS, len(self.window)) // micro_batch)

        def run() -> None:
            for _ in range(rounds):
                torch.autograd.backward(trainee.features(frames).sum())

        return timed_s(run, loader.device) * len(self.window) / (rounds * len(frames))


def noise(workload: TrainingWorkload, folder: Path) -> Dataset:
    """A prepared folder of noise, with as many clips as a step has and one sentence for each."""
    vocabulary = json.dumps({"words": [f"w{number}" for number in range(workload.words)]})
    (folder / "vocabulary.json").write_text(vocabulary)
    side = workload.recipe.preprocessing().resize_px
    shape = (workload.clips, FRAMES_PER_CLIP, side, side, 3)
    frames = np.lib.format.open_memmap(folder / "frames.npy", mode="w+", dtype=np.uint8, shape=shape)
    picture = np.random.default_rng(0).integers(256, size=shape[1:], dtype=np.uint8)
    for row in range(workload.clips):
        frames[row] = np.roll(picture, row, axis=0)
    frames.flush()
    clips = [DatasetClip(row=row, video=f"{row}", captions=(CAPTION,)) for row in range(workload.clips)]
    return Dataset(folder, {"train": clips}, np.load(folder / "frames.npy", mmap_mode="r"))


def eager_rows(bench: Bench) -> list[dict[str, Any]]:
    """One row per micro-batch, first with stored activations, then with activation checkpointing."""
    rows = []
    for checkpointing in (False, True):
        trainee = bench.trainee(2, checkpointing=checkpointing)
        for micro_batch in bench.workload.micro_batches:
            row = {"micro_batch": micro_batch, "activation_checkpointing": checkpointing, "compiled": False}
            rows.append(row | measured(partial(bench.step, trainee, micro_batch)))
            _print(rows[-1])
    return rows


def compiled_rows(bench: Bench, micro_batch: int, time_is_left: Callable[[], bool]) -> list[dict[str, Any]]:
    """The given micro-batch again, through torch's compiler."""
    rows = []
    for checkpointing in (False, True):
        row: dict[str, Any] = {"micro_batch": micro_batch, "activation_checkpointing": checkpointing, "compiled": True}
        if time_is_left():
            trainee = bench.trainee(2, checkpointing=checkpointing, compiled=True)
            row |= measured(partial(bench.step, trainee, micro_batch))
            if "clips_per_s" in row:
                assert trainee.compiled
                row |= {"compiled": trainee.compiled.works, "compile_s": trainee.compiled.compile_s}
        else:
            row["left_out"] = "no time was left"
        rows.append(row)
        _print(row)
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the most clips per second."""
    return max(rows, key=lambda row: row.get("clips_per_s", 0.0))


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or why there are none."""
    gc.collect()  # the traceback of an earlier failure still holds memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _print(row: dict[str, Any]) -> None:
    cells = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print("  ".join(cells), flush=True)


class Watch:
    """Seconds from the start to the end of each part, and whether the budget allows another one."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s, self._started = budget_s, time.monotonic()
        self.elapsed_s: dict[str, float] = {}

    def done(self, part: str) -> None:
        self.elapsed_s[part] = round(time.monotonic() - self._started, 1)
        print(f"{part}: done after {self.elapsed_s[part]} s", flush=True)

    def time_is_left(self) -> bool:
        """Whether there is time for one more compiled row."""
        return time.monotonic() - self._started < self._budget_s - COMPILING_S


def figures(
    workload: TrainingWorkload, device: torch.device, watch: Watch, keep: Path | None, *, steps_only: bool
) -> dict[str, Any]:
    """All figures, by part."""
    by_part: dict[str, Any] = {"ceilings": ceilings(workload.matrix, workload.rounds, device)}
    with tempfile.TemporaryDirectory() as scratch:
        (folder := Path(scratch) / "noise").mkdir()
        bench = Bench(workload, folder, device)
        watch.done("ceilings and frames")
        by_part["stage_1"] = measured(bench.features)
        _print(by_part["stage_1"])
        watch.done("stage 1")
        rows = eager_rows(bench)
        watch.done("steps")
        if not steps_only:
            train = partial(full_size.train, workload.plan, Path(scratch) / "full_size", device, keep=keep)
            by_part["full_size"] = measured(train)
            watch.done("full-size checkpoint")
        if device.type == "cuda" or not steps_only:
            rows += compiled_rows(bench, best_of(rows)["micro_batch"], watch.time_is_left)
            watch.done("compiled steps")
    encoder = Encoder(workload.recipe.encoder).eval()
    flops, flops_per_s = clip_flops(encoder, workload.recipe.crop_px), 1e12 * by_part["ceilings"]["tflop_per_s"]
    for row in rows:
        if "clips_per_s" in row:
            row["share_of_bound"] = row["clips_per_s"] * 3 * flops / flops_per_s
    return {**by_part, "clip_tflop": flops / 1e12, "steps": rows, "elapsed_s": watch.elapsed_s}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the full-size checkpoint there")
    parser.add_argument("--clips", type=int, metavar="N", help="in a step; default: 512")
    parser.add_argument("--micro-batches", type=int, nargs="+", metavar="N", help="default: 8 16 32 64")
    parser.add_argument("--budget-s", type=float, default=480.0, metavar="S", help="nothing is compiled near its end")
    parser.add_argument("--steps-only", action="store_true", help="no full-size checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="all of it, in miniature")
    options, results = command.start(parser, arguments)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = miniature() if options.dry_run else TrainingWorkload()
    workload = replace(
        workload,
        matrix=workload.matrix if device.type == "cuda" else min(workload.matrix, CPU_MATRIX),
        clips=options.clips or workload.clips,
        micro_batches=tuple(options.micro_batches or workload.micro_batches),
    )
    steps_only = options.steps_only or (device.type == "cpu" and not options.dry_run)
    by_part = figures(workload, device, Watch(options.budget_s), options.keep, steps_only=steps_only)
    about = {"encoder": workload.recipe.encoder, "crop_px": workload.recipe.crop_px, "clips": workload.clips}
    name = "training_gpu" if device.type == "cuda" else "training"
    results.conclude(name, {"dry_run": options.dry_run, "device": device.type, **about, **by_part})
    parts = [by_part["stage_1"], by_part.get("full_size", {}), *by_part["steps"]]
    for part in (part for part in parts if "failed" in part):
        print(f"training: {part['failed']}", file=sys.stderr)
    return int(any("failed" in part for part in parts))


if __name__ == "__main__":
    command.run("training", main)
