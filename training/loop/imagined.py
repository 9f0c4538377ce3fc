"""Features for videos of which only the captions are known, so that a decoder can learn from their sentences, too.

Not in the paper. Such a video borrows the features of a training clip whose captions are like its own, its donor, moved
by what a regression from words to features expects of the difference between the captions. (Translation learns from
text of one language alone in this way: Sennrich et al., arXiv 1511.06709.)

Knows nothing of files or decoders. Shapes: N clips with features, M without, D feature size, C words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from etenet.model.vocabulary import Vocabulary
from training.data.datasets import Dataset, DatasetClip
from training.loop.agreement import with_preferences
from training.loop.projection import ridge, standardised, word_shares
from training.run_settings import Stage

WORDS = 1500
DONORS = 10  # of a video, one of which is drawn for each epoch
PENALTY = 0.001  # of the regression; on 2,449 videos of MSR-VTT it leaves .88 of the variance of others


def unseen_clips(dataset: Dataset, stage: Stage, vocabulary: Vocabulary) -> list[DatasetClip]:
    """The clips without frames that a stage learns from."""
    if not (stage.unseen_weight and dataset.unseen):
        return []
    clips = [replace(clip, weight=stage.unseen_weight) for clip in dataset.unseen]
    return with_preferences(clips, vocabulary, stage.caption_agreement) if stage.caption_agreement else clips


class Imagination:
    """What clips without frames may look like."""

    def __init__(
        self,
        donors: Sequence[DatasetClip],
        means: NDArray[np.float32],
        without: Sequence[DatasetClip],
        vocabulary: Vocabulary,
    ) -> None:
        """`donors` are N clips with mean features (N, D)."""
        self._donors, self._without = donors, without
        shares = word_shares([clip.captions for clip in donors], vocabulary)
        words = np.argsort(-shares.mean(axis=0), kind="stable")[:WORDS]
        shares = shares[:, words]
        wanted = word_shares([clip.captions for clip in without], vocabulary)[:, words]
        weight = np.full(len(donors), 1 / len(donors))
        standard, _, scale = standardised(means, weight)
        onto_features = ridge(shares - shares.mean(axis=0), standard, weight, PENALTY) * scale
        self._expected = (shares @ onto_features).astype(np.float32)  # (N, D) but for a constant, as is the next
        self._wanted = (wanted @ onto_features).astype(np.float32)  # (M, D)
        rarity = -np.log(shares.mean(axis=0) + 0.002)
        similarity = _unit(wanted * rarity) @ _unit(shares * rarity).T
        self._nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :DONORS]

    def clips(self, rng: np.random.Generator) -> list[DatasetClip]:
        """The clips without frames, each with the frames of a donor, and how their features differ from its own."""
        drawn = rng.integers(self._nearest.shape[1], size=len(self._nearest))
        return [
            replace(
                clip,
                row=(donor := self._donors[chosen]).row,
                distinct=donor.distinct,
                part=donor.part,
                shift=self._wanted[number] - self._expected[chosen],
            )
            for number, (clip, chosen) in enumerate(
                zip(self._without, self._nearest[np.arange(len(drawn)), drawn].tolist(), strict=True)
            )
        ]


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each of length 1, but for those that are 0."""
    of_length_1: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return of_length_1
