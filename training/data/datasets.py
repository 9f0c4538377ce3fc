"""A prepared dataset folder -> batches. Knows the files that `prepare` writes, nothing of networks or losses.

Shapes: B clips, L frames per clip, K captions per clip, T words (the longest of the batch, <EOS> included).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.errors import UsageError
from etenet.model.vocabulary import EOS_ID, SOS_ID, Vocabulary
from etenet.video.sampling import middle_of_slices
from training.data.arrays import damaged, mapped


@dataclass(frozen=True, slots=True)
class DatasetClip:
    """A clip of video, whose 16 frames are `row` of frames.npy, or one of stills, whose frames begin at `row`."""

    row: int
    video: str
    captions: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    file: str | None = None  # of a video: relative to the dataset folder, or absolute; None: stills or features
    distinct: int | None = None  # how many frames a clip of stills has; None: as many as a row
    part: int = 0  # which folder of a mixture
    weight: float = 1.0  # how often an epoch of training has it
    preferences: tuple[float, ...] | None = None  # the probability of each caption; None: all alike
    shift: NDArray[np.float32] | None = field(default=None, compare=False)  # (D,), see `loop/imagined.py`

    @property
    def is_unseen(self) -> bool:
        """Whether it has no frames of its own."""
        return self.row < 0 or self.shift is not None


@dataclass(frozen=True)
class Dataset:
    """All splits of a dataset folder.

    All its pictures are numbered: a frame row is the number of one. A clip of stills has each of its frames once there,
    and stands for L = 16 by the rule for short videos.
    """

    folder: Path
    clips: dict[str, list[DatasetClip]]  # by split
    frames: NDArray[np.uint8] | None  # mapped from disk: (N, L, px, px, 3), or (F, px, px, 3) with stills
    features: NDArray[np.float32] | None = None  # (N, L, D), mapped from disk; given instead of frames
    unseen: list[DatasetClip] = field(default_factory=list)  # to train on, with captions and without frames: row is -1

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Raises `UsageError` for a file that is missing or damaged."""
        names = ("manifest.jsonl", "unseen.jsonl", "frames.npy", "features.npy")
        manifest, unseen_manifest, frames, features = (folder / name for name in names)
        for file in (manifest, features if features.is_file() else frames):
            if not file.is_file():
                raise UsageError(f"{file} is missing; make the dataset with python -m training.prepare")
        clips: dict[str, list[DatasetClip]] = {}
        for split, clip in _listed(manifest):
            clips.setdefault(split, []).append(clip)
        unseen = [clip for _, clip in _listed(unseen_manifest)] if unseen_manifest.is_file() else []
        if features.is_file():
            return Dataset(folder, clips, None, mapped(features), unseen)
        return Dataset(folder, clips, mapped(frames), None, unseen)

    def need(self, split: str) -> list[DatasetClip]:
        """The clips of a split. Raises `UsageError` if it has none."""
        if clips := self.clips.get(split):
            return clips
        there = ", ".join(name for name, clips in self.clips.items() if clips) or "no clips at all"
        raise UsageError(
            f"{self.folder} has no {split} split, only {there}; prepare it again with splits in its captions file, "
            "or with larger shares"
        )

    def vocabulary(self) -> Vocabulary:
        """The words that `prepare` chose. Raises `UsageError` if their file is missing or damaged."""
        file = self.folder / "vocabulary.json"
        if not file.is_file():
            raise UsageError(f"{file} is missing; make the dataset with python -m training.prepare")
        try:
            return Vocabulary(json.loads(file.read_text())["words"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(file) from error

    def digest(self) -> str:
        """SHA-256 of clips and captions, the vocabulary, and the middle of every cached row."""
        every = [(split, *_identity(clip)) for split, clips in self.clips.items() for clip in clips]
        every += [("unseen", clip.video, clip.captions) for clip in self.unseen]
        known = json.dumps([every, self.vocabulary().known_words])
        cache = self.frames if self.features is None else self.features
        assert cache is not None
        rows = [row for clips in self.clips.values() for clip in clips for row in _cached_rows(clip)]
        middles = cache[(rows, *(size // 2 for size in cache.shape[1:-1]))]
        return hashlib.sha256(f"{cache.shape} {known}".encode() + middles.tobytes()).hexdigest()

    def clip_file(self, clip: DatasetClip) -> Path:
        if clip.file is None:
            made_from = "stills" if self.has_frames else "features"
            raise UsageError(f"{self.folder} was made from {made_from}; it has no video of {clip.video}")
        return self.folder / clip.file

    @property
    def has_frames(self) -> bool:
        """False if there are only given features."""
        return self.features is None

    @property
    def frame_count(self) -> int:
        """Pictures that are stored, and so one more than the highest frame row."""
        return len(self._pictures())

    @property
    def resize_px(self) -> int:
        return int(self._pictures().shape[-2])

    def need_size(self, resize_px: int) -> None:
        """Raises `UsageError` if the frames have another size than an encoder takes. Given features have none."""
        if self.has_frames and self.resize_px != resize_px:
            raise UsageError(
                f"{self.folder} has frames of {self.resize_px} pixels, the encoder takes {resize_px}; prepare it again "
                f"with --resize-px {resize_px}, or with the --encoder of the recipe"
            )

    def need_labels(self) -> None:
        """Raises `UsageError` if clips have no labels."""
        if not all(clip.labels for clips in self.clips.values() for clip in clips):
            raise UsageError(
                f"{self.folder} is not of the demo world, whose clips say what is in them; "
                "make one with python -m training.prepare demo"
            )

    def distinct_rows(self, clip: DatasetClip) -> NDArray[np.int64]:
        """(n,) frame rows of the clip's different frames, in order of time."""
        if clip.distinct is not None:
            return np.arange(clip.row, clip.row + clip.distinct)
        length = self._all_frames().shape[1]
        return np.arange(clip.row * length, (clip.row + 1) * length)

    def frame_rows(self, clip: DatasetClip) -> NDArray[np.int64]:
        """(L,) frame rows of the clip, in order of time. A short one has some of them twice, as in serving."""
        rows = self.distinct_rows(clip)
        return rows if clip.distinct is None else rows[middle_of_slices(len(rows))]

    def repeats(self, clip: DatasetClip) -> NDArray[np.int64]:
        """(n,): how often each of the `distinct_rows` is among the `frame_rows`. They sum to L."""
        return np.unique_counts(self.frame_rows(clip)).counts

    def pixels(self, frame_rows: Sequence[int] | NDArray[np.int64], *, pinned: bool = False) -> Tensor:
        """(R, resize_px, resize_px, 3) uint8 of R frame rows, in pinned memory if asked for."""
        return _packed([self.picture(row) for row in frame_rows], pinned)

    def picture(self, frame_row: int) -> NDArray[np.uint8]:
        """(resize_px, resize_px, 3), mapped from disk."""
        return self._pictures()[frame_row]  # type: ignore[no-any-return]

    def frames_of(
        self,
        clips: Sequence[DatasetClip],
        moments: Sequence[Sequence[int]] | None = None,
        *,
        pinned: bool = False,
    ) -> Tensor:
        """(B, L, resize_px, resize_px, 3) uint8. With k `moments` for each clip, (B, k, ...): moment m is the m-th of
        the clip's different frames."""
        if moments is None:
            rows = [self.frame_rows(clip) for clip in clips]
        else:
            chosen = zip(clips, moments, strict=True)
            rows = [self.distinct_rows(clip)[list(of_clip)] for clip, of_clip in chosen]
        pixels = self.pixels(np.concatenate(rows), pinned=pinned)
        return pixels.view(len(rows), -1, *pixels.shape[1:])

    def stills_of(self, clips: Sequence[DatasetClip], moments: Sequence[int], *, pinned: bool = False) -> Tensor:
        """One of the L frames of each clip, (B, resize_px, resize_px, 3) uint8."""
        rows = [self.frame_rows(clip)[moment] for clip, moment in zip(clips, moments, strict=True)]
        return self.pixels(rows, pinned=pinned)

    def _all_frames(self) -> NDArray[np.uint8]:
        if self.frames is None:
            raise UsageError(f"{self.folder} was made from features; it has no frames")
        return self.frames

    def _pictures(self) -> NDArray[np.uint8]:
        """(F, resize_px, resize_px, 3), mapped from disk."""
        frames = self._all_frames()
        return frames.reshape(-1, *frames.shape[-3:])


def _listed(manifest: Path) -> Iterator[tuple[str, DatasetClip]]:
    """Clips and their splits. Raises `UsageError`."""
    try:
        for line in manifest.read_text().splitlines():
            entry = json.loads(line)
            split = entry.pop("split")
            yield split, DatasetClip(**entry | {"captions": tuple(entry["captions"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{manifest} is damaged or of another version ({error}); prepare {manifest.parent} again"
        ) from error


def _identity(clip: DatasetClip) -> list[object]:
    """What a digest knows of a clip: not where its file is."""
    stills = [] if clip.distinct is None else [clip.distinct]
    return [clip.row, clip.video, clip.captions, clip.labels, None, *stills]


def _cached_rows(clip: DatasetClip) -> range:
    """The rows of the cache that hold the clip."""
    return range(clip.row, clip.row + (clip.distinct or 1))


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
