"""Captions that need no decoder: what a model has to beat. Pure functions of features and captions.

N training videos, M videos to caption, D feature size, W words, C distinct training captions. A video's features are
the mean over its frames. Captions are made of Treebank words in lower case, as those of the model are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from etenet.model.vocabulary import sentence, words

WORDS = 1000  # that the regression predicts
PENALTIES = tuple(10.0**power for power in range(-1, 6))  # of the regression, per unit variance of a feature
CAPTIONS_AT_ONCE = 4096

Captions = Sequence[Sequence[str]]  # of each video


def most_frequent_caption(captions: Captions) -> str:
    """Of all captions; the first in alphabetical order if several are as frequent."""
    counts = Counter(map(plain, _every(captions)))
    return min(counts, key=lambda caption: (-counts[caption], caption))


def nearest_captions(train: NDArray[np.float32], captions: Captions, given: NDArray[np.float32]) -> list[str]:
    """train (N, D) with the captions of each, given (M, D) -> the central caption of the training video whose features
    have the largest cosine (nearest neighbours as in Devlin et al., arXiv 1505.04467)."""
    nearest = (_unit(given) @ _unit(train).T).argmax(axis=1)
    central = {number: central_caption(captions[number]) for number in set(nearest.tolist())}
    return [central[number] for number in nearest.tolist()]


def central_caption(captions: Sequence[str]) -> str:
    """The caption that has most in common with the others: the largest mean F1 of words; the first of equals."""
    bags = [frozenset(words(caption)) for caption in captions]
    likeness = [sum(2 * len(bag & other) / (len(bag) + len(other) or 1) for other in bags) for bag in bags]
    return plain(captions[int(np.argmax(likeness))])


def regressed_captions(train: NDArray[np.float32], captions: Captions, given: NDArray[np.float32]) -> list[str]:
    """train (N, D) with the captions of each, given (M, D) -> the training caption that fits best to the words which a
    ridge regression sees in the features.

    The regression predicts, for each of the `WORDS` commonest words, the share of a video's captions that have it. The
    caption with the largest cosine to these shares fits best; words count by their rarity (inverse document frequency).
    """
    known = [word for word, _ in Counter(word for caption in _every(captions) for word in words(caption)).most_common()]
    number_of = {word: number for number, word in enumerate(known[:WORDS])}
    shares = np.stack([_bags(of_video, number_of).mean(axis=0) for of_video in captions])
    predicted = ridge(train, shares, given)
    rarity = np.log(len(captions) / (shares > 0).sum(axis=0))
    candidates = sorted({plain(caption) for caption in _every(captions)})
    best, best_fit = np.zeros(len(given), int), np.full(len(given), -np.inf)
    for start in range(0, len(candidates), CAPTIONS_AT_ONCE):
        some = _unit(_bags(candidates[start : start + CAPTIONS_AT_ONCE], number_of) * rarity)
        fits = (predicted * rarity) @ some.T
        better = fits.max(axis=1) > best_fit
        best[better], best_fit[better] = start + fits.argmax(axis=1)[better], fits.max(axis=1)[better]
    return [candidates[number] for number in best]


def ridge(train: NDArray[np.float32], targets: NDArray[np.float64], given: NDArray[np.float32]) -> NDArray[np.float64]:
    """train (N, D), targets (N, W), given (M, D) -> predictions (M, W) of a linear regression on standardised features.

    Of the `PENALTIES` it takes the one with the least leave-one-out error, in closed form (Hastie et al., *The Elements
    of Statistical Learning*, eq. 7.64).
    """
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64) + 1e-6
    x, level = (train - mean) / spread, targets.mean(axis=0)
    strengths, axes = np.linalg.eigh(x.T @ x)
    along = x @ axes  # (N, D), its columns are orthogonal
    products = along.T @ (targets - level)  # (D, W)

    def error(penalty: float) -> float:
        inverse = 1 / (strengths + penalty)
        left_out = (targets - level - along @ (inverse[:, None] * products)).T
        left_out /= np.maximum(1 - 1 / len(x) - along**2 @ inverse, 1e-9)
        return float(np.square(left_out).mean())

    inverse = 1 / (strengths + min(PENALTIES, key=error))
    predictions: NDArray[np.float64] = level + ((given - mean) / spread) @ axes @ (inverse[:, None] * products)
    return predictions


def plain(caption: str) -> str:
    """A caption as a model would write it: in lower case, without punctuation."""
    return sentence(words(caption))


def _every(captions: Captions) -> Iterable[str]:
    return (caption for of_video in captions for caption in of_video)


def _bags(captions: Sequence[str], number_of: dict[str, int]) -> NDArray[np.float64]:
    """(captions, W): 1 where a caption has a word."""
    bags = np.zeros((len(captions), len(number_of)))
    for bag, caption in zip(bags, captions, strict=True):
        bag[[number_of[word] for word in words(caption) if word in number_of]] = 1
    return bags


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.floating] = vectors / np.maximum(lengths, 1e-12)
    return unit
