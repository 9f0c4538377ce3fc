"""How far a confidence can be trusted: AUC, calibration error, reliability diagram. Knows no model and no caption.

N captions; scores and confidences (N,), `good` (N,) says which captions are good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from etenet.errors import UsageError

BINS = 10
DRAWS = 200  # of captions that a perfect confidence would find good

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Bin:
    """Captions whose confidences are close: how many, their mean confidence, and the share of good ones."""

    count: int
    confidence: float
    good: float


def auc(scores: Numbers, good: Flags) -> float:
    """The probability that a good caption has a higher score than another one; equal scores count half.

    Raises `UsageError` if all captions are good, or none.
    """
    if good.all() or not good.any():
        raise UsageError(f"{int(good.sum())} of {len(good)} captions are good, so no score can tell them apart")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of equal scores, their mean
    good_count = int(good.sum())
    wins = float(ranks[good].sum()) - good_count * (good_count + 1) / 2
    return wins / (good_count * (len(good) - good_count))


def bins(confidences: Numbers, good: Flags) -> list[Bin]:
    """`BINS` of equal width between 0 and 1, without the empty ones."""
    return [
        Bin(int(of_bin.sum()), float(confidences[of_bin].mean()), float(good[of_bin].mean()))
        for of_bin in _members(confidences)
    ]


def calibration_error(confidences: Numbers, good: Flags) -> float:
    """The expected one (Guo et al., ICML 2017): the mean over the captions of |confidence - good| of their bin."""
    return sum(each.count * abs(each.confidence - each.good) for each in bins(confidences, good)) / len(good)


def least_error(confidences: Numbers) -> float:
    """The calibration error that is left, on average, if the confidences are right: so few captions scatter."""
    rng = np.random.default_rng(0)
    draws = (rng.random(len(confidences)) < confidences for _ in range(DRAWS))
    return float(np.mean([calibration_error(confidences, good) for good in draws]))


def draw(confidences: Numbers, good: Flags, title: str) -> Figure:
    """The reliability diagram: of each bin the share of good captions over the confidence, and how many there are.

    The bars are one standard error, sqrt(p (1 - p) / n) with p the confidence.
    """
    figure = Figure(figsize=(5, 6), layout="constrained")
    panel, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    found = bins(confidences, good)
    at = [each.confidence for each in found]
    errors = [np.sqrt(each.confidence * (1 - each.confidence) / each.count) for each in found]
    panel.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect")
    panel.errorbar(at, [each.good for each in found], yerr=errors, fmt="o-", markersize=4, capsize=2, label="measured")
    panel.set(title=title, ylabel="share of good captions", xlim=(0, 1), ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    counts.bar(at, [each.count for each in found], width=0.6 / BINS)
    counts.set(xlabel="confidence", ylabel="captions")
    return figure


def _members(confidences: Numbers) -> Iterator[Flags]:
    numbers = np.minimum((confidences * BINS).astype(int), BINS - 1)
    for number in np.unique(numbers):
        yield numbers == number
