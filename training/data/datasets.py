"""A prepared dataset folder -> batches. Knows the files that `prepare` writes, nothing of networks or losses.

Shapes: B clips, L frames per clip, K captions per clip, T words (the longest of the batch, <EOS> included).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.errors import UsageError
from etenet.model.vocabulary import EOS_ID, SOS_ID, Vocabulary


@dataclass(frozen=True, slots=True)
class DatasetClip:
    row: int  # of the frame cache
    video: str
    captions: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    file: str | None = None  # relative to the dataset folder, or absolute; None if there are only features


@dataclass(frozen=True, slots=True)
class Dataset:
    """All splits of a dataset folder."""

    folder: Path
    clips: dict[str, list[DatasetClip]]  # by split
    frames: NDArray[np.uint8] | None  # (N, L, resize_px, resize_px, 3), mapped from disk
    features: NDArray[np.float32] | None = None  # (N, L, D), mapped from disk; given instead of frames

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        manifest, frames, features = (folder / name for name in ("manifest.jsonl", "frames.npy", "features.npy"))
        for file in (manifest, features if features.is_file() else frames):
            if not file.is_file():
                raise UsageError(f"{file} is missing; make the dataset with python -m training.prepare")
        clips: dict[str, list[DatasetClip]] = {}
        try:
            for line in manifest.read_text().splitlines():
                entry = json.loads(line)
                split = entry.pop("split")
                clips.setdefault(split, []).append(DatasetClip(**entry | {"captions": tuple(entry["captions"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{manifest} is damaged or of another version ({error}); prepare {folder} again"
            ) from error
        if features.is_file():
            return cls(folder, clips, None, np.load(features, mmap_mode="r"))
        return cls(folder, clips, np.load(frames, mmap_mode="r"))

    def vocabulary(self) -> Vocabulary:
        """The words that `prepare` chose."""
        file = self.folder / "vocabulary.json"
        if not file.is_file():
            raise UsageError(f"{file} is missing; make the dataset with python -m training.prepare")
        return Vocabulary(json.loads(file.read_text())["words"])

    def digest(self) -> str:
        """SHA-256 of clips and captions, the vocabulary, and the middle of every cached row."""
        every = [(split, *astuple(replace(clip, file=None))) for split, clips in self.clips.items() for clip in clips]
        known = json.dumps([every, self.vocabulary().known_words])
        cache = self.frames if self.features is None else self.features
        assert cache is not None
        rows = [clip.row for clips in self.clips.values() for clip in clips]
        middles = cache[(rows, *(size // 2 for size in cache.shape[1:-1]))]
        return hashlib.sha256(f"{cache.shape} {known}".encode() + middles.tobytes()).hexdigest()

    def clip_file(self, clip: DatasetClip) -> Path:
        if clip.file is None:
            raise UsageError(f"{self.folder} was made from features; it has no video of {clip.video}")
        return self.folder / clip.file

    def frames_of(self, clips: Sequence[DatasetClip], *, pinned: bool = False) -> Tensor:
        """(B, L, resize_px, resize_px, 3) uint8, in pinned memory if asked for."""
        frames = self._all_frames()
        return _packed([frames[clip.row] for clip in clips], pinned)

    def stills_of(self, clips: Sequence[DatasetClip], moments: Sequence[int], *, pinned: bool = False) -> Tensor:
        """One frame of each clip, (B, resize_px, resize_px, 3) uint8."""
        frames = self._all_frames()
        return _packed([frames[clip.row, moment] for clip, moment in zip(clips, moments, strict=True)], pinned)

    def _all_frames(self) -> NDArray[np.uint8]:
        if self.frames is None:
            raise UsageError(f"{self.folder} was made from features; it has no frames")
        return self.frames


def _packed(pictures: Sequence[NDArray[np.uint8]], pinned: bool) -> Tensor:
    """Pictures of one size as one tensor, copied once: from the disk to the memory that a GPU copies from."""
    packed = torch.empty((len(pictures), *pictures[0].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack(pictures, out=packed.numpy())
    return packed


@dataclass(frozen=True, slots=True)
class EncodedCaptions:
    """Word ids for teacher forcing: `previous` starts with <SOS>, `target` ends with <EOS>, `mask` is 1 on words."""

    previous: Tensor  # (B, K, T) int64
    target: Tensor  # (B, K, T) int64
    mask: Tensor  # (B, K, T) float32

    @classmethod
    def encode(cls, captions: Sequence[Sequence[str]], vocabulary: Vocabulary, max_words: int) -> EncodedCaptions:
        """K captions for each of B clips. Captions longer than `max_words` are cut."""
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

    def pinned(self) -> EncodedCaptions:
        """The same in pinned memory."""
        return EncodedCaptions(*(tensor.pin_memory() for tensor in (self.previous, self.target, self.mask)))

    def to(self, device: torch.device) -> EncodedCaptions:
        """Copying from pinned memory does not block the host."""
        return EncodedCaptions(
            *(tensor.to(device, non_blocking=True) for tensor in (self.previous, self.target, self.mask))
        )
