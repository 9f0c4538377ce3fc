"""Which clips are shown, and what of each: its different frames, where the network looked, captions and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

RANK_BY = "CIDEr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """weights (T, n): how much of each of the T words the network took from each of n frames; a row sums to 1."""

    words: Sequence[str]
    weights: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """(n,): of all words together."""
        mean: NDArray[np.float64] = self.weights.mean(axis=0)
        return mean


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedClip:
    """A clip with its captions and references.

    `frames` are RGB, (n, H, W, 3), each different from the one before it, or None if there are only features.
    `captions` are by the name of what wrote them, that which is evaluated last; `scores` and `attention` are its own.
    """

    video: str
    frames: NDArray[np.uint8] | None
    captions: Mapping[str, str]
    references: Sequence[str]
    scores: Mapping[str, float]
    attention: Attention | None = None


def shown_once(
    frames: NDArray[np.uint8], weights: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """frames (L, H, W, 3), weights (T, L) -> runs of equal frames, (n, H, W, 3), and their sums, (T, n)."""
    is_new = [True, *(not np.array_equal(before, frame) for before, frame in pairwise(frames))]
    firsts = np.flatnonzero(is_new)
    return frames[firsts], np.add.reduceat(weights, firsts, axis=1)


def chosen(scores: Mapping[str, Mapping[str, float]], count: int, *, seed: int) -> dict[str, list[str]]:
    """Scores by video -> heading -> videos: the `count` best and worst by CIDEr, and as many of the rest at random.

    None is there twice. If a clip has no CIDEr, the first `2 * count` in the order given.
    """
    if not all(RANK_BY in of_clip for of_clip in scores.values()):
        return {"Examples": list(scores)[: 2 * count]}
    ranked = sorted(scores, key=lambda video: scores[video][RANK_BY], reverse=True)
    best, rest = ranked[:count], ranked[count:][::-1]
    worst, rest = rest[:count], rest[count:]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:count]
    sections = {
        f"Best by {RANK_BY}": best,
        f"Worst by {RANK_BY}": worst,
        f"At random (seed {seed})": [rest[number] for number in drawn],
    }
    return {heading: videos for heading, videos in sections.items() if videos}
