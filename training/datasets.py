"""A prepared dataset folder -> batches. Knows the files that `prepare` writes, nothing of networks or losses.

Shapes: B clips, L frames per clip, K captions per clip, T words (the longest of the batch, <EOS> included).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.errors import UsageError
from etenet.vocabulary import EOS_ID, SOS_ID, Vocabulary


@dataclass(frozen=True, slots=True)
class Clip:
    row: int  # of the frame cache
    video: str
    captions: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All splits of a dataset folder."""

    folder: Path
    clips: dict[str, list[Clip]]  # by split
    frames: NDArray[np.uint8]  # (N, L, resize_px, resize_px, 3), mapped from disk

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        manifest, cache = folder / "manifest.jsonl", folder / "frames.npy"
        for file in (manifest, cache):
            if not file.is_file():
                raise UsageError(f"{file} is missing; make the dataset with python -m training.prepare")
        clips: dict[str, list[Clip]] = {}
        for row, line in enumerate(manifest.read_text().splitlines()):
            entry = json.loads(line)
            clip = Clip(row, entry["video"], tuple(entry["captions"]), entry.get("labels", {}))
            clips.setdefault(entry["split"], []).append(clip)
        return cls(folder, clips, np.load(cache, mmap_mode="r"))

    def vocabulary(self) -> Vocabulary:
        """The words of the training split."""
        return Vocabulary.from_captions(caption for clip in self.clips["train"] for caption in clip.captions)

    def clip_file(self, clip: Clip) -> Path:
        return self.folder / "clips" / f"{clip.video}.mp4"

    def frames_of(self, clips: Sequence[Clip]) -> Tensor:
        """(B, L, resize_px, resize_px, 3) uint8."""
        return torch.from_numpy(np.stack([self.frames[clip.row] for clip in clips]))


@dataclass(frozen=True, slots=True)
class Sentences:
    """Word ids for teacher forcing: `previous` starts with <SOS>, `target` ends with <EOS>, `mask` is 1 on words."""

    previous: Tensor  # (B, K, T) int64
    target: Tensor  # (B, K, T) int64
    mask: Tensor  # (B, K, T) float32

    @classmethod
    def encode(cls, captions: Sequence[Sequence[str]], vocabulary: Vocabulary, max_words: int) -> Sentences:
        """K captions for each of B clips; longer ones are cut at `max_words`."""
        ids = [[vocabulary.encode(caption)[:max_words] for caption in of_clip] for of_clip in captions]
        longest = 1 + max(len(sentence) for of_clip in ids for sentence in of_clip)
        shape = (len(ids), len(ids[0]), longest)
        previous, target = torch.full(shape, EOS_ID), torch.full(shape, EOS_ID)
        mask = torch.zeros(shape)
        previous[..., 0] = SOS_ID
        for clip, of_clip in enumerate(ids):
            for number, sentence in enumerate(of_clip):
                words = torch.tensor(sentence, dtype=torch.long)
                previous[clip, number, 1 : len(words) + 1] = words
                target[clip, number, : len(words)] = words
                mask[clip, number, : len(words) + 1] = 1
        return cls(previous, target, mask)


def shuffled_batches(clips: Sequence[Clip], batch: int, *, seed: int, epoch: int) -> Iterator[list[Clip]]:
    """Every clip once, in an order that is a function of seed and epoch alone; the last batch may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(clips))
    for start in range(0, len(order), batch):
        yield [clips[i] for i in order[start : start + batch]]


def draw_captions(clips: Sequence[Clip], count: int, rng: np.random.Generator) -> list[list[str]]:
    """`count` captions of each clip at random, different ones as far as there are enough."""
    return [[clip.captions[i] for i in np.resize(rng.permutation(len(clip.captions)), count)] for clip in clips]
