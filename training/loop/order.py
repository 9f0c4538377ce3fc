"""The order of clips and their sentences: a function of data set, recipe, seed, stage and epoch alone.

So a run that is resumed gets the examples that it would have got without the kill. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.sampling import middle_of_slices
from training.data.datasets import DatasetClip
from training.loop.views import WHOLE, View, drawn_crop
from training.run_settings import Stage


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A clip and the K sentences to learn from it in one step.

    `moments` are the clip's different frames to look at, None for all L of the clip. They are shown as the `view` says,
    or, to a frozen encoder, as the view of that number.
    """

    clip: DatasetClip
    captions: tuple[str, ...]
    moments: tuple[int, ...] | None = None
    view: View = WHOLE
    view_number: int = 0


def epoch_windows(
    clips: Sequence[DatasetClip],
    stage: Stage,
    *,
    seed: int,
    stage_number: int,
    epoch: int,
    frames_per_clip: int = 0,
) -> Iterator[list[TrainingExample]]:
    """The examples of each optimizer step of an epoch. The last step may have fewer.

    With `frames_per_clip` k > 0 an example looks at k different frames of its clip, drawn anew; with 0 at all.
    """
    rng = np.random.default_rng([seed, stage_number, epoch])
    examples = [example for of_folder in _by_folder(clips) for example in _weighted(of_folder, stage, rng)]
    order = rng.permutation(len(examples))
    if frames_per_clip:
        examples = [replace(example, moments=_moments(example.clip, frames_per_clip, rng)) for example in examples]
    if stage.encoder_learning_rate:
        mirrored = rng.random(len(examples)) < stage.mirrored_share
        views = [View(drawn_crop(stage.smallest_crop, rng), bool(flip)) for flip in mirrored]
        examples = [replace(example, view=view) for example, view in zip(examples, views, strict=True)]
    elif stage.views > 1:
        numbers = rng.integers(stage.views, size=len(examples)).tolist()
        examples = [replace(example, view_number=number) for example, number in zip(examples, numbers, strict=True)]
    for start in range(0, len(order), stage.window_clips):
        yield [examples[i] for i in order[start : start + stage.window_clips]]


def examples_per_epoch(clips: Sequence[DatasetClip], stage: Stage) -> int:
    """The number of examples in an epoch: the same in every epoch."""
    counts = ((of_folder[0].weight, sum(_groups(clip, stage) for clip in of_folder)) for of_folder in _by_folder(clips))
    return sum(_share(weight, count) for weight, count in counts)


def _by_folder(clips: Sequence[DatasetClip]) -> list[list[DatasetClip]]:
    """The clips of a mixture, which come folder by folder; then those without frames, or with those of a donor."""
    return [list(of_folder) for _, of_folder in groupby(clips, lambda clip: (clip.is_unseen, clip.part))]


def _weighted(clips: Sequence[DatasetClip], stage: Stage, rng: np.random.Generator) -> Iterator[TrainingExample]:
    """All examples of a folder as often as its weight says; of the last time, a part that is drawn."""
    left = _share(clips[0].weight, sum(_groups(clip, stage) for clip in clips))
    while left > 0:
        examples = [example for clip in clips for example in _examples(clip, stage, rng)]
        drawn = range(len(examples)) if left >= len(examples) else rng.permutation(len(examples))[:left]
        yield from (examples[i] for i in drawn)
        left -= len(examples)


def _share(weight: float, examples: int) -> int:
    """At least one, so that a small folder of small weight is not left out."""
    return max(1, round(weight * examples))


def _examples(clip: DatasetClip, stage: Stage, rng: np.random.Generator) -> Iterator[TrainingExample]:
    """Groups of K captions: one, or as many as hold all captions. Only a clip with fewer than K repeats them."""
    shape, count = (_groups(clip, stage), stage.captions_per_clip), len(clip.captions)
    order = rng.permutation(count) if clip.preferences is None else rng.choice(count, count, False, clip.preferences)
    for group in np.resize(order, shape):
        yield TrainingExample(clip, tuple(clip.captions[i] for i in group))


def _groups(clip: DatasetClip, stage: Stage) -> int:
    return 1 if stage.epoch_of == "clips" else -(-len(clip.captions) // stage.captions_per_clip)


def _moments(clip: DatasetClip, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """One frame out of each of `count` equal slices of the clip's different frames; a shorter clip repeats them."""
    frames = clip.distinct or FRAMES_PER_CLIP
    if frames <= count:
        return tuple(middle_of_slices(frames, count))
    starts = [number * frames // count for number in range(count + 1)]
    return tuple(int(rng.integers(start, end)) for start, end in pairwise(starts))
