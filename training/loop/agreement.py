"""How well each caption of a clip agrees with the clip's others, by which a step may prefer it.

People describe a clip in many ways. What most of them say is what a score rewards, and what frames can show. Source:
Phan et al., "Consensus-based Sequence Training for Video Captioning", arXiv 1712.09532.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from etenet.model.vocabulary import Vocabulary
from training.data.datasets import DatasetClip
from training.loop.reward import SCALE, CiderD, ended

LEAST = 0.05  # so that every caption is learned from


def with_preferences(clips: Sequence[DatasetClip], vocabulary: Vocabulary, power: float) -> list[DatasetClip]:
    """The clips with the probability of each caption: its agreement, CIDEr-D against the others, to this power."""
    captions = {(clip.part, clip.video): clip.captions for clip in clips}
    reward = CiderD.from_captions(captions, vocabulary)
    words, lengths = ended([vocabulary.encode(caption) for clip in clips for caption in clip.captions])
    scores = reward.score([(clip.part, clip.video) for clip in clips for _ in clip.captions], words, lengths)
    of_clips = np.split(scores, np.cumsum([len(clip.captions) for clip in clips])[:-1])
    return [
        replace(clip, preferences=_preferences(of_clip, power)) for clip, of_clip in zip(clips, of_clips, strict=True)
    ]


def _preferences(scores: NDArray[np.float64], power: float) -> tuple[float, ...]:
    """From the CIDEr-D of each caption against all of the clip, itself among them."""
    agreement = (scores * len(scores) - SCALE) / max(len(scores) - 1, 1)
    weights = np.maximum(agreement, LEAST) ** power
    return tuple((weights / weights.sum()).tolist())
