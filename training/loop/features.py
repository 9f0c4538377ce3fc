"""The features of stage 1: the frozen encoder runs over every clip once, and the result is cached on disk.

The cache is used again only if encoder, data set and preprocessing are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from training.data.datasets import Dataset
from training.loop.loading import read_ahead
from training.loop.processes import Processes
from training.loop.step import Trainee

SPLITS = ("train", "validation")


def cached_features(
    trainee: Trainee, dataset: Dataset, file: Path, *, batch_clips: int, processes: Processes
) -> NDArray[np.float32] | None:
    """(N, L, D), by row of the data set; None if SIGTERM came first. Processes share the work and the file."""
    made_with = json.dumps(
        {
            "encoder": digest(trainee.encoder),
            "dataset": dataset.digest(),
            "preprocessing": asdict(trainee.preprocessing),
            "mixed_precision": trainee.stage.mixed_precision,
        },
        sort_keys=True,
    )
    description = file.with_suffix(".json")
    known = description.is_file() and description.read_text() == made_with and file.is_file()
    if not processes.broadcast(known):
        unfinished = file.with_suffix(".unfinished")
        if not _compute(trainee, dataset, unfinished, batch_clips=batch_clips, processes=processes):
            return None
        if processes.first:
            os.replace(unfinished, file)
            description.write_text(made_with)
        processes.broadcast(None)
    features: NDArray[np.float32] = np.load(file, mmap_mode="r")
    return features


@torch.no_grad()
def _compute(trainee: Trainee, dataset: Dataset, file: Path, *, batch_clips: int, processes: Processes) -> bool:
    clips = [clip for split in SPLITS for clip in dataset.clips.get(split, [])]
    rows, size = 1 + max(clip.row for clip in clips), trainee.model.decoder.config.feature_size
    if processes.first:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (rows, dataset.frames_of(clips[:1]).shape[1], size)
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape).flush()
    processes.broadcast(None)
    features = np.lib.format.open_memmap(file, mode="r+")
    trainee.eval()
    stride, device = batch_clips * processes.count, processes.device
    batches = [clips[start : start + stride] for start in range(0, len(clips), stride)]
    shares = [batch[processes.rank :: processes.count] for batch in batches]
    read = partial(dataset.frames_of, pinned=device.type == "cuda")
    quiet = None if processes.first else True
    with (
        closing(read_ahead(read, filter(None, shares))) as frames,
        tqdm(total=len(clips), desc="features", unit="clip", disable=quiet) as bar,
    ):
        for batch, mine in zip(batches, shares, strict=True):
            if processes.should_stop():
                return False
            if mine:
                pixels = next(frames).to(device, non_blocking=True)
                features[[clip.row for clip in mine]] = trainee.features(pixels).cpu().numpy()
            bar.update(len(batch))
    features.flush()
    processes.broadcast(None)
    return True


def digest(module: nn.Module) -> str:
    """SHA-256 of all weights of a module, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
