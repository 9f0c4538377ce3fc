"""Several dataset folders in one run, each with a weight: they look like one `Dataset`.

Training clips come from all folders, every other split from the first alone: so scores stay comparable, whatever is
trained on beside it. The vocabulary has the first folder's words and then the new ones of the others; `--minimum-count`
acted in each folder alone. How a weight becomes an epoch is decided in `loop/order.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from etenet.errors import UsageError
from etenet.model.vocabulary import Vocabulary
from training.data.datasets import Dataset, DatasetClip


def data_source(text: str) -> tuple[Path, float]:
    """The type of `--data`: DIR, or DIR=WEIGHT. A folder that has such a name is meant as it is."""
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text), 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise argparse.ArgumentTypeError(f"the weight of {folder} must be above 0, got {number}")
    return Path(folder), weight


def load_all(sources: Sequence[tuple[Path, float]]) -> Dataset:
    """One folder of weight 1 as it is, others as a mixture. Raises `UsageError` if they do not fit together."""
    datasets = [Dataset.load(folder) for folder, _ in sources]
    weights = [weight for _, weight in sources]
    return datasets[0] if weights == [1.0] else mixed(datasets, weights)


def mixed(datasets: Sequence[Dataset], weights: Sequence[float]) -> Dataset:
    """An epoch has the training clips of a folder of weight 0.5 half once, and of one of weight 2 twice."""
    first = datasets[0]
    if len({dataset.folder.resolve() for dataset in datasets}) < len(datasets):
        raise UsageError(f"{first.folder} or another folder is given twice; give each once, with a larger weight")
    for dataset in datasets:
        if not dataset.has_frames:
            raise UsageError(f"{dataset.folder} holds given features; train on it alone, at weight 1")
        if dataset.resize_px != first.resize_px:
            raise UsageError(
                f"{first.folder} has frames of {first.resize_px} pixels and {dataset.folder} of {dataset.resize_px}; "
                "prepare both with the same --encoder or --resize-px"
            )
    training = [
        replace(clip, part=part, weight=weight)
        for part, (dataset, weight) in enumerate(zip(datasets, weights, strict=True))
        for clip in dataset.clips.get("train", [])
    ]
    return Mixture(
        first.folder,
        {**first.clips, "train": training},
        frames=None,
        unseen=[clip for dataset in datasets for clip in dataset.unseen],
        parts=tuple(datasets),
        weights=tuple(weights),
    )


@dataclass(frozen=True)
class Mixture(Dataset):
    """Frame rows count through the folders, one after the other. `clip.part` is the folder of a clip."""

    parts: tuple[Dataset, ...] = ()
    weights: tuple[float, ...] = ()

    def vocabulary(self) -> Vocabulary:
        every = (word for part in self.parts for word in part.vocabulary().known_words)
        return Vocabulary(list(dict.fromkeys(every)))

    def digest(self) -> str:
        """SHA-256 of the folders' digests and their weights."""
        every = [(part.digest(), weight) for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(every).encode()).hexdigest()

    def clip_file(self, clip: DatasetClip) -> Path:
        return self.parts[clip.part].clip_file(clip)

    @property
    def frame_count(self) -> int:
        return sum(part.frame_count for part in self.parts)

    @property
    def resize_px(self) -> int:
        return self.parts[0].resize_px

    def distinct_rows(self, clip: DatasetClip) -> NDArray[np.int64]:
        return self._starts[clip.part] + self.parts[clip.part].distinct_rows(clip)

    def frame_rows(self, clip: DatasetClip) -> NDArray[np.int64]:
        return self._starts[clip.part] + self.parts[clip.part].frame_rows(clip)

    def picture(self, frame_row: int) -> NDArray[np.uint8]:
        part = bisect_right(self._starts, frame_row) - 1
        return self.parts[part].picture(frame_row - self._starts[part])

    @property
    def _starts(self) -> list[int]:
        """The first frame row of each folder."""
        return [0, *accumulate(part.frame_count for part in self.parts[:-1])]
