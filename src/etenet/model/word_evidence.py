"""Which words people would use of a clip, by a linear regression on its features: a second opinion on a sentence.

The regression knows no grammar and no order of frames, but its errors are not the decoder's: of a cartoon the decoder
may say "video game", where the regression sees no game. docs/scores.md has what it brings.

`training/evaluation/word_evidence.py` fits it. Of low rank, so that a checkpoint has room for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from etenet.model.hypothesis import WordShare

SMOOTHING = 0.005  # of shares: less than one caption in 200 says nothing
UNKNOWN = WordShare(here=0.0, usual=0.0)

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WordEvidence:
    """Of one checkpoint. C words, features of size D, rank R.

    Of the captions of a clip with mean features x, the share usual + (x directions - center) loadings has each word.
    """

    words: NDArray[np.int64]  # (C,) their ids
    usual: Array  # (C,) the share over all clips
    directions: Array  # (D, R)
    center: Array  # (R,)
    loadings: Array  # (R, C)

    def __post_init__(self) -> None:
        count, rank = self.loadings.shape[::-1]
        shapes = {"words": (count,), "usual": (count,), "directions": (self.feature_size, rank), "center": (rank,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"its word evidence has {name} of {getattr(self, name).shape}, not {shape}")
        for field in fields(self):
            if not np.isfinite(getattr(self, field.name)).all():
                raise ValueError(f"its word evidence has {field.name} that are not finite")

    @property
    def feature_size(self) -> int:
        """D."""
        return len(self.directions)

    def shares(self, means: Array, sentences: Sequence[Sequence[Sequence[int]]]) -> list[list[tuple[WordShare, ...]]]:
        """Mean features (B, D) and sentences of B clips -> of each sentence, those of its different words."""
        here = np.clip(self.usual + (means @ self.directions - self.center) @ self.loadings, 0.0, 1.0)
        column = {word: number for number, word in enumerate(self.words.tolist())}
        return [
            [
                tuple(
                    WordShare(here=float(of_clip[column[word]]), usual=float(self.usual[column[word]]))
                    if word in column
                    else UNKNOWN
                    for word in sorted(set(sentence))
                )
                for sentence in of_sentences
            ]
            for of_clip, of_sentences in zip(here, sentences, strict=True)
        ]


def log_ratio(shares: Sequence[WordShare]) -> float:
    """How much more these words are to be expected of this clip than of any, as the logarithm of a ratio."""
    return sum(math.log((share.here + SMOOTHING) / (share.usual + SMOOTHING)) for share in shares)


def informed_share(shares: Sequence[WordShare]) -> float:
    """The mean of the shares here, each by how much its word says, -log of its usual share; between 0 and 1."""
    weights = [-math.log(min(share.usual + SMOOTHING, 1.0)) for share in shares]
    total = sum(weights)
    return sum(weight * share.here for weight, share in zip(weights, shares, strict=True)) / total if total else 0.0
