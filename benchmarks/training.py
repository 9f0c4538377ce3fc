"""`python -m benchmarks.training`: both stages beside what their encoder takes alone, at full size.

Inception-ResNet-v2 at 299 x 299, 16 frames and one sentence per clip, in bf16 autocast. Stage 2: one optimizer
step of effective batch 512, end to end, for several micro-batches, with and without activation checkpointing. Stage 1:
frames to features, and a step on those. The frames are noise: speed does not depend on them. Made for a CUDA GPU;
`--clips` and `--micro-batches` make it fit a CPU, `--dry-run` takes one small step of everything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, conclude
from etenet import checkpoint as checkpoints
from etenet.config import FRAMES_PER_CLIP
from etenet.preprocess import preprocess
from etenet.vocabulary import Vocabulary
from training.datasets import Clip, Sentences
from training.memory import checkpoint_activations, keep_freed_memory, peak_bytes
from training.order import Example
from training.processes import Processes
from training.recipes import Recipe, msrvtt
from training.step import Load, Trainee, accumulate

VOCABULARY_WORDS = 12_000
CAPTION = " ".join(["w1"] * 12)


def measured_step(
    recipe: Recipe, device: torch.device, *, clips: int, micro_batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Stage 2: time and memory of a step, and which share of it the encoder would take alone, forth and back."""
    trainee, load = _begin(recipe, device, 2, micro_batch)
    if checkpointing:
        checkpoint_activations(trainee.model.encoder.network)
    optimizer = torch.optim.Adam(trainee.parameters(), 1e-6)
    window = [Example(Clip(row=0, video="", captions=()), (CAPTION,))] * clips
    frames, _ = load(window[:micro_batch])

    def step(examples: Sequence[Example]) -> None:
        optimizer.zero_grad()
        accumulate(trainee, examples, load, micro_batch=micro_batch, processes=Processes(device=device))
        optimizer.step()

    def encoder_alone() -> None:
        for _ in range(clips // micro_batch):
            trainee.features(frames).sum().backward()

    step(window[:micro_batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed(lambda: step(window), device)
    memory = peak_bytes(device)
    share = _timed(encoder_alone, device) / seconds
    return {
        "seconds": seconds,
        "clips_per_s": clips / seconds,
        "share_of_encoder": share,
        "peak_memory_bytes": memory,
    }


def measured_features(recipe: Recipe, device: torch.device, *, clips: int, micro_batch: int) -> dict[str, Any]:
    """Stage 1: clips per second from frames to features, of a step on features, and of the bare encoder."""
    trainee, load = _begin(recipe, device, 1, micro_batch)
    optimizer = torch.optim.Adam(trainee.model.decoder.parameters(), 1e-6)
    frames, sentences = load([Example(Clip(row=0, video="", captions=()), (CAPTION,))] * micro_batch)
    batches = range(clips // micro_batch)

    @torch.no_grad()
    def features() -> Tensor:
        for _ in batches:
            found = trainee.features(frames).float().cpu()
        return found.to(device)

    @torch.no_grad()
    def encoder_alone() -> None:
        pixels = preprocess(frames, trainee.preprocessing)
        with torch.autocast(device.type, torch.bfloat16, enabled=trainee.stage.mixed_precision):
            for _ in batches:
                trainee.model.encode(pixels)

    known = features()

    def steps() -> None:
        for _ in batches:
            optimizer.zero_grad()
            trainee(known, sentences).mean().backward()
            optimizer.step()

    steps()
    runs = {"features": features, "step": steps, "encoder": encoder_alone}
    return {f"{name}_clips_per_s": clips / _timed(run, device) for name, run in runs.items()}


def _begin(recipe: Recipe, device: torch.device, stage: int, micro_batch: int) -> tuple[Trainee, Load]:
    vocabulary = Vocabulary(f"w{number}" for number in range(VOCABULARY_WORDS))
    start = checkpoints.initialise(recipe.encoder, vocabulary, crop_px=recipe.crop_px, max_words=recipe.max_words)
    model = start.model.to(device).to(memory_format=torch.channels_last).train()
    return Trainee(model, start.preprocessing, recipe.stages[stage]), _noise(start, micro_batch, device)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _noise(start: checkpoints.Checkpoint, micro_batch: int, device: torch.device) -> Load:
    side = start.preprocessing.resize_px
    frames = torch.randint(256, (micro_batch, FRAMES_PER_CLIP, side, side, 3), dtype=torch.uint8)
    frames = frames.pin_memory() if device.type == "cuda" else frames

    def load(examples: Sequence[Example]) -> tuple[Tensor, Sentences]:
        sentences = Sentences.encode([e.captions for e in examples], start.vocabulary, start.max_words)
        return frames[: len(examples)].to(device, non_blocking=True), sentences.to(device)

    return load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--clips", type=int, default=512, help="of a step")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=(8, 16, 32, 64))
    parser.add_argument("--dry-run", action="store_true", help="a small network and two clips")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe, clips, micro_batches = msrvtt(), options.clips, options.micro_batches
    if options.dry_run:
        recipe, clips, micro_batches = replace(recipe, encoder="squeezenet1_1", crop_px=64), 2, [1]
    first = measured_features(recipe, device, clips=clips, micro_batch=micro_batches[0])
    print("  ".join(f"{name} {value}" for name, value in first.items()), flush=True)
    rows = []
    for micro_batch in micro_batches:
        for checkpointing in (False, True):
            row: dict[str, Any] = {"micro_batch": micro_batch, "activation_checkpointing": checkpointing}
            try:
                row |= measured_step(recipe, device, clips=clips, micro_batch=micro_batch, checkpointing=checkpointing)
            except torch.cuda.OutOfMemoryError:
                row["out_of_memory"] = True
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    conclude(
        "training",
        {
            "device": device.type,
            "encoder": recipe.encoder,
            "crop_px": recipe.crop_px,
            "clips": clips,
            "stage_1": first,
            "steps": rows,
        },
        folder=options.out,
    )


if __name__ == "__main__":
    main()
