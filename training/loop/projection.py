"""Where a learned projection of the features starts: a ridge regression onto words, beside principal components.

Not in the paper. ImageNet's features say much that no caption does. A regression from features to the words of the
captions finds what is worth saying before the decoder has learnt to speak, so the decoder learns faster from few clips.
Knows nothing of encoders, optimizers or files.

Shapes: N clips, D feature size, P size of the projection, C words of the regression.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from etenet.errors import UsageError
from etenet.model.vocabulary import UNKNOWN_ID, Vocabulary

COMPONENTS_SHARE = 1 / 8  # of P; the rest are words
PENALTIES = tuple(2.0**power for power in range(-6, 9))  # weights per clip, for features of unit variance
HELD_OUT = 5  # a fifth of the clips is, to choose one of them
LEAST_AGREEMENT = 0.05  # of the captions of a clip on a word (intraclass correlation)

Array = NDArray[np.float64]


def start_projection(
    projection: nn.Linear,
    features: NDArray[np.float32],
    captions: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    weights: Sequence[float],
) -> None:
    """Set the weights of `projection` (D -> P) from mean features (N, D) and captions of N weighted clips.

    Raises `UsageError` if the captions have too few words that depend on the clip.
    """
    size, weight = projection.out_features, np.asarray(weights, dtype=np.float64) / np.sum(weights)
    components = int(size * COMPONENTS_SHARE)
    standard, mean, scale = standardised(features, weight)
    shares = content_shares(captions, vocabulary, weight, size - components)
    onto_words = ridge(standard, shares, weight, best_penalty(standard, shares, weight))
    onto_words /= (standard @ onto_words).std(axis=0) + 1e-4
    matrix = np.concatenate([onto_words, principal_components(standard, weight, components)], axis=1) / scale[:, None]
    with torch.no_grad():
        projection.weight.copy_(torch.from_numpy(matrix.T))
        projection.bias.copy_(torch.from_numpy(-mean @ matrix))


def standardised(features: NDArray[np.float32], weight: Array) -> tuple[Array, Array, Array]:
    """(N, D) of mean 0 and variance 1, and the mean and the scale (D,) that did it."""
    mean = weight @ features
    scale = np.sqrt(weight @ np.square(features - mean)) + 1e-3
    return (features - mean) / scale, mean, scale


def word_shares(captions: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Array:
    """(N, V): the share of a clip's captions that have a word of the vocabulary."""
    shares = np.zeros((len(captions), len(vocabulary)))
    for clip, of_clip in enumerate(captions):
        for caption in of_clip:
            shares[clip, list(set(vocabulary.encode(caption)) - {UNKNOWN_ID})] += 1 / len(of_clip)
    return shares


def content_shares(captions: Sequence[Sequence[str]], vocabulary: Vocabulary, weight: Array, count: int) -> Array:
    """(N, C): the share of a clip's captions that have a word, for the commonest words that depend on the clip.

    The captions of a clip agree more on "horse" than on "some", by the intraclass correlation of having the word. Where
    clips have one caption each, nothing tells which words recur, and the commonest words are taken.
    """
    shares = word_shares(captions, vocabulary)
    mean = weight @ shares
    if_agreed = mean * (1 - mean)  # the variance between clips if all captions of a clip agreed, and if none did:
    by_chance = if_agreed * (weight @ [1 / len(of_clip) for of_clip in captions])
    between = weight @ np.square(shares - mean) - by_chance
    depends = between >= LEAST_AGREEMENT * (if_agreed - by_chance) - 1e-12
    words = [word for word in np.argsort(-mean, kind="stable") if depends[word] and if_agreed[word] > 1e-9][:count]
    if len(words) < count:
        raise UsageError(
            f"a projection of this size needs {count} words that depend on the clip, the captions have {len(words)}: "
            f"choose a smaller one with --set projection, or 0 for none"
        )
    chosen: Array = shares[:, words]
    return chosen


def best_penalty(standard: Array, targets: Array, weight: Array) -> float:
    """The one of `PENALTIES` with which a regression on the other clips has the least error on those held out.

    An error counts relative to the variance of its word.
    """
    out = held_out(len(standard))
    if out.all():
        return 1.0
    mean = np.average(targets[~out], axis=0, weights=weight[~out])
    spread = np.average(np.square(targets - mean), axis=0, weights=weight) + 1e-9
    weighted = (standard[~out] * (weight[~out] / weight[~out].sum())[:, None]).T
    variances, directions = np.linalg.eigh(weighted @ standard[~out])
    seen, onto = standard[out] @ directions, directions.T @ (weighted @ (targets[~out] - mean))

    def error(penalty: float) -> float:
        predicted = mean + (seen / (variances + penalty)) @ onto
        return float((weight[out] @ np.square(targets[out] - predicted)) @ (1 / spread))

    return min(PENALTIES, key=error)


def held_out(clips: int) -> NDArray[np.bool_]:
    """(N,): every fifth of fifty stretches, because neighbours may be pieces of one film."""
    out: NDArray[np.bool_] = np.arange(clips) * 10 * HELD_OUT // clips % HELD_OUT == 0
    return out


def ridge(standard: Array, targets: Array, weight: Array, penalty: float) -> Array:
    """(D, C): minimises the weighted squared error of (N, D) -> (N, C) plus `penalty` times the squared weights."""
    weighted = (standard * weight[:, None]).T
    squares = weighted @ standard + penalty * np.eye(standard.shape[1])
    solution = np.linalg.solve(squares, weighted @ (targets - weight @ targets))
    return np.asarray(solution, dtype=np.float64)


def principal_components(standard: Array, weight: Array, count: int) -> Array:
    """(D, count): onto the directions of largest variance, each scaled to unit variance."""
    variances, directions = np.linalg.eigh((standard * weight[:, None]).T @ standard)
    scale = np.sqrt(np.maximum(variances[::-1][:count], 1e-12))
    return np.asarray(directions[:, ::-1][:, :count] / scale, dtype=np.float64)
