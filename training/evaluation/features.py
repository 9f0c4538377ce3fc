"""The features of some clips of a data set, as the serving network computes them: once for each stored frame.

Kept in a file, they serve every checkpoint with the same encoder, and the baselines. Given features are taken as they
are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.captioning.captioner import Captioner
from etenet.errors import UsageError
from training.data.arrays import COMPUTE_AGAIN, mapped, new_array
from training.data.datasets import Dataset, DatasetClip
from training.loop.features import digest
from training.progress import Progress

FRAMES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class ClipFeatures:
    """rows (R,): which frames of the data set were encoded, sorted. values (R, D): their features."""

    dataset: Dataset
    rows: NDArray[np.int64]
    values: NDArray[np.float32]

    def of(self, clips: Sequence[DatasetClip]) -> Tensor:
        """(B, L, D)."""
        return torch.from_numpy(np.stack([self._of(clip) for clip in clips]))

    def means(self, clips: Sequence[DatasetClip]) -> NDArray[np.float32]:
        """The mean over the frames of each clip, (B, D)."""
        return np.stack([self._of(clip).mean(axis=0) for clip in clips])

    def _of(self, clip: DatasetClip) -> NDArray[np.float32]:
        of_clip: NDArray[np.float32] = self.values[np.searchsorted(self.rows, _rows(self.dataset, clip))]
        return of_clip


def features_of(
    captioner: Captioner, dataset: Dataset, clips: Sequence[DatasetClip], folder: Path | None = None
) -> ClipFeatures:
    """The features of these clips. With a `folder`, read from there if they are known, else written there.

    Raises `UsageError` if the stored frames have another size than the checkpoint takes.
    """
    if dataset.features is not None:
        length, size = dataset.features.shape[1:]
        return ClipFeatures(dataset, np.arange(len(dataset.features) * length), dataset.features.reshape(-1, size))
    preprocessing = captioner.checkpoint.preprocessing
    if (wanted_px := preprocessing.resize_px) != dataset.resize_px:
        raise UsageError(
            f"the frames of {dataset.folder} have {dataset.resize_px} pixels, the checkpoint takes {wanted_px}; "
            f"prepare them again with --encoder {captioner.encoder}"
        )
    rows = np.unique(np.concatenate([dataset.distinct_rows(clip) for clip in clips]))
    if folder is None:
        return ClipFeatures(dataset, rows, np.concatenate(list(_encoded(captioner, dataset, rows))))
    made_with = [digest(captioner.checkpoint.encoder), asdict(preprocessing), dataset.digest(), rows.tolist()]
    name = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
    file = folder / f"{name[:16]}.npy"
    if not file.is_file():
        _write(file, captioner, dataset, rows)
    return ClipFeatures(dataset, rows, mapped(file, fix=COMPUTE_AGAIN))


def _write(file: Path, captioner: Captioner, dataset: Dataset, rows: NDArray[np.int64]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished, size = file.with_suffix(".unfinished"), captioner.checkpoint.model.decoder.config.feature_size
    values = new_array(unfinished, np.float32, (len(rows), size))
    start = 0
    for features in _encoded(captioner, dataset, rows):
        values[start : start + len(features)] = features
        start += len(features)
    values.flush()
    os.replace(unfinished, file)


def _encoded(captioner: Captioner, dataset: Dataset, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """(<= FRAMES_AT_ONCE, D) after another."""
    with Progress("features", len(rows), "frame") as progress:
        for start in range(0, len(rows), FRAMES_AT_ONCE):
            some = rows[start : start + FRAMES_AT_ONCE]
            features = captioner.network.features(dataset.pixels(some)[:, None].numpy())[:, 0]
            yield features.cpu().numpy() if isinstance(features, Tensor) else features
            progress.update(len(some))


def _rows(dataset: Dataset, clip: DatasetClip) -> NDArray[np.int64]:
    if dataset.features is None:
        return dataset.frame_rows(clip)
    length = dataset.features.shape[1]
    return np.arange(clip.row * length, (clip.row + 1) * length)
