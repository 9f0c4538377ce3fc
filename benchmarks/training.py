"""`python -m benchmarks.training`: one optimizer step of effective batch 512, end to end, at full size.

Inception-ResNet-v2 at 299 x 299 in bf16 autocast, 16 frames and one sentence per clip: time, clips/s and peak memory
for several micro-batches, with and without activation checkpointing. The frames are noise: speed does not depend on
them. Made for a CUDA GPU; `--dry-run` takes one small step of everything on whatever is there.
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
from etenet.vocabulary import Vocabulary
from training.datasets import Clip, Sentences
from training.memory import checkpoint_activations, keep_freed_memory, peak_bytes
from training.order import Example
from training.processes import Processes
from training.recipes import Recipe, msrvtt
from training.step import Trainee, accumulate

VOCABULARY_WORDS = 12_000
CAPTION = " ".join(["w1"] * 12)


def measured_step(
    recipe: Recipe, device: torch.device, *, clips: int, micro_batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Time and memory of one step, after a step of one micro-batch to warm up."""
    vocabulary = Vocabulary(f"w{number}" for number in range(VOCABULARY_WORDS))
    start = checkpoints.initialise(recipe.encoder, vocabulary, crop_px=recipe.crop_px, max_words=recipe.max_words)
    model = start.model.to(device).to(memory_format=torch.channels_last).train()
    if checkpointing:
        checkpoint_activations(model.encoder.network)
    trainee = Trainee(model, start.preprocessing, recipe.stages[2])
    optimizer = torch.optim.Adam(trainee.parameters(), 1e-6)
    load = _noise(start, micro_batch, device)
    window = [Example(Clip(row=0, video="", captions=()), (CAPTION,))] * clips
    processes = Processes(device=device)

    def step(examples: Sequence[Example]) -> None:
        optimizer.zero_grad()
        accumulate(trainee, examples, load, micro_batch=micro_batch, processes=processes)
        optimizer.step()

    step(window[:micro_batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step(window)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "clips_per_s": clips / seconds, "peak_memory_bytes": peak_bytes(device)}


def _noise(
    start: checkpoints.Checkpoint, micro_batch: int, device: torch.device
) -> Callable[[Sequence[Example]], tuple[Tensor, Sentences]]:
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
    parser.add_argument("--dry-run", action="store_true", help="a small network and two clips")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe, clips, micro_batches = msrvtt(), 512, [8, 16, 32, 64]
    if options.dry_run:
        recipe, clips, micro_batches = replace(recipe, encoder="squeezenet1_1", crop_px=64), 2, [1]
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
        {"device": device.type, "encoder": recipe.encoder, "crop_px": recipe.crop_px, "clips": clips, "steps": rows},
        folder=options.out,
    )


if __name__ == "__main__":
    main()
