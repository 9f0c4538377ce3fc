"""The order of clips and their sentences: a function of data set, recipe, seed, stage and epoch alone.

So a run that is resumed gets the examples that it would have got without the kill. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.data.datasets import DatasetClip
from training.recipes import Stage


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A clip and the K sentences to learn from it in one step. In a `mirrored` clip left and right are swapped."""

    clip: DatasetClip
    captions: tuple[str, ...]
    mirrored: bool = False


def epoch_windows(
    clips: Sequence[DatasetClip], stage: Stage, *, seed: int, stage_number: int, epoch: int
) -> Iterator[list[TrainingExample]]:
    """The examples of each optimizer step of an epoch. The last step may have fewer."""
    rng = np.random.default_rng([seed, stage_number, epoch])
    examples = [example for clip in clips for example in _examples(clip, stage, rng)]
    order = rng.permutation(len(examples))
    mirrored = rng.random(len(examples)) < stage.mirrored_share
    for start in range(0, len(order), stage.window_clips):
        window = slice(start, start + stage.window_clips)
        yield [
            replace(examples[i], mirrored=bool(flip)) for i, flip in zip(order[window], mirrored[window], strict=True)
        ]


def _examples(clip: DatasetClip, stage: Stage, rng: np.random.Generator) -> Iterator[TrainingExample]:
    """Groups of K captions: one, or as many as hold all captions. Only a clip with fewer than K repeats them."""
    count, each = len(clip.captions), stage.captions_per_clip
    groups = 1 if stage.epoch_of == "clips" else -(-count // each)
    for group in np.resize(rng.permutation(count), (groups, each)):
        yield TrainingExample(clip, tuple(clip.captions[i] for i in group))


def examples_per_epoch(clips: Sequence[DatasetClip], stage: Stage) -> int:
    """The number of examples in an epoch."""
    if stage.epoch_of == "clips":
        return len(clips)
    return sum(-(-len(clip.captions) // stage.captions_per_clip) for clip in clips)
