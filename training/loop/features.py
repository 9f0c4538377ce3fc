"""The features of stages 1 and 3: the frozen encoder runs once over every view of a frame; they are cached on disk.

Many frames run on a CPU as they do in serving, compiled by OpenVINO, in a quarter (EfficientNet-Lite2) to a half of
torch's time.

The cache is used again only if encoder, data set and preprocessing are unchanged. A stage looks for a cache in its own
folder and in those of the stages before it. Its rows are the data set's frame rows (`training/data/datasets.py`), first
of the frames as they are, and then of each other view (`training/loop/views.py`), which only clips to train on have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etenet.model.checkpoint import Checkpoint
from etenet.model.vocabulary import Vocabulary
from etenet.runtime.load import compile_network
from etenet.video.clip import FRAMES_PER_CLIP
from training.data.arrays import COMPUTE_AGAIN, mapped, new_array
from training.data.datasets import Dataset
from training.loop.loading import read_ahead
from training.loop.processes import Processes
from training.loop.step import Trainee
from training.loop.views import WHOLE, View, numbered_view, seen
from training.progress import Progress
from training.run_settings import Stage

SPLITS = ("train", "validation")
COMPILED_FROM_FRAMES = 1000  # compiling takes as long as some hundred frames

Encode = Callable[[Tensor], NDArray[np.float32]]  # frames (N, resize_px, resize_px, 3) uint8 -> features (N, D)


def cached_features(
    trainee: Trainee,
    dataset: Dataset,
    file: Path,
    *,
    batch_clips: int,
    processes: Processes,
    others: Sequence[Path] = (),
) -> NDArray[np.float32] | None:
    """(views * F, D), by view and frame row; None if SIGTERM came first. Processes share the work and the file.

    `others` are files that may hold the same.
    """
    made_with = json.dumps(
        {
            "encoder": digest(trainee.encoder),
            "dataset": dataset.digest(),
            "preprocessing": asdict(trainee.preprocessing),
            "mixed_precision": trainee.stage.mixed_precision,
            "views": [trainee.stage.views, trainee.stage.smallest_crop],
        },
        sort_keys=True,
    )
    known = processes.broadcast(next((path for path in (file, *others) if _is_made_with(path, made_with)), None))
    if known is None:
        unfinished = file.with_suffix(".unfinished")
        if not _compute(trainee, dataset, unfinished, batch_clips=batch_clips, processes=processes):
            return None
        if processes.first:
            os.replace(unfinished, file)
            _description(file).write_text(made_with)
        processes.broadcast(None)
    features: NDArray[np.float32] = mapped(known or file, fix=COMPUTE_AGAIN)
    return features


def _description(file: Path) -> Path:
    return file.with_suffix(".json")


def _is_made_with(file: Path, made_with: str) -> bool:
    return file.is_file() and _description(file).is_file() and _description(file).read_text() == made_with


@torch.no_grad()
def _compute(trainee: Trainee, dataset: Dataset, file: Path, *, batch_clips: int, processes: Processes) -> bool:
    pictures = list(_pictures(dataset, trainee.stage))
    if processes.first:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (trainee.stage.views * dataset.frame_count, trainee.model.decoder.config.feature_size)
        new_array(file, np.float32, shape)
    processes.broadcast(None)
    features = np.lib.format.open_memmap(file, mode="r+")
    trainee.eval()
    encode = _encoder(trainee, processes.device, frames=len(pictures))
    stride, device = batch_clips * FRAMES_PER_CLIP * processes.count, processes.device
    batches = [pictures[start : start + stride] for start in range(0, len(pictures), stride)]
    shares = [batch[processes.rank :: processes.count] for batch in batches]
    read = partial(_read, dataset, pinned=device.type == "cuda")
    with (
        closing(read_ahead(read, filter(len, shares))) as frames,
        Progress("features", len(pictures), "frame", silent=not processes.first) as progress,
    ):
        for batch, mine in zip(batches, shares, strict=True):
            if processes.should_stop():
                return False
            if mine:
                features[[picture.row for picture in mine]] = encode(next(frames))
            progress.update(len(batch))
    features.flush()
    processes.broadcast(None)
    return True


@dataclass(frozen=True, slots=True)
class _Picture:
    """A frame as the encoder sees it, and where its features go."""

    row: int
    frame_row: int
    view: View = WHOLE


def _pictures(dataset: Dataset, stage: Stage) -> Iterator[_Picture]:
    clips = [clip for split in SPLITS for clip in dataset.clips.get(split, [])]
    for row in np.unique(np.concatenate([dataset.distinct_rows(clip) for clip in clips])).tolist():
        yield _Picture(row, row)
    for number in range(1, stage.views):
        for clip in dataset.need("train"):
            view = numbered_view(clip, number, smallest_crop=stage.smallest_crop)
            for row in dataset.distinct_rows(clip).tolist():
                yield _Picture(number * dataset.frame_count + row, row, view)


def _read(dataset: Dataset, pictures: Sequence[_Picture], *, pinned: bool) -> Tensor:
    """(R, resize_px, resize_px, 3) uint8 of R pictures."""
    pixels = dataset.pixels([picture.frame_row for picture in pictures], pinned=pinned)
    for number, picture in enumerate(pictures):
        if picture.view != WHOLE:
            pixels[number : number + 1] = seen(pixels[number : number + 1], picture.view)
    return pixels


def _encoder(trainee: Trainee, device: torch.device, *, frames: int) -> Encode:
    if device.type == "cpu" and frames >= COMPILED_FROM_FRAMES:
        network = compile_network(Checkpoint(trainee.model, Vocabulary([]), trainee.preprocessing))
        return lambda pixels: np.asarray(network.features(pixels.numpy()[:, None])[:, 0])
    return lambda pixels: trainee.features(pixels.to(device, non_blocking=True)[:, None])[:, 0].cpu().numpy()


def digest(module: nn.Module) -> str:
    """SHA-256 of all weights of a module, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
