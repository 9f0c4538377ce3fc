"""The start of a projection, against clips whose features and words are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from etenet.errors import UsageError
from etenet.model.vocabulary import Vocabulary
from training.loop.projection import (
    PENALTIES,
    best_penalty,
    content_shares,
    held_out,
    principal_components,
    ridge,
    start_projection,
)

WORDS = ("horse", "car", "song", "dog", "tree", "ball", "road")
CLIPS, SIZE = 600, 12


def clips(seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Feature i of a clip says word i; the other features say nothing. "a" is in every other caption of every clip."""
    rng = np.random.default_rng(seed)
    features = rng.normal(5, 2, size=(CLIPS, SIZE)).astype(np.float32)
    shown = features[:, : len(WORDS)] > 5
    captions = [
        [" ".join([word for word, is_shown in zip(WORDS, row, strict=True) if is_shown] + ["a"] * a + ["runs"])
         for a in (0, 1)]
        for row in shown
    ]  # fmt: skip
    return features, captions


def test_words_that_depend_on_the_clip_are_chosen() -> None:
    _, captions = clips()
    vocabulary = Vocabulary(["runs", "a", *WORDS])
    shares = content_shares(captions, vocabulary, np.full(CLIPS, 1 / CLIPS), 7)
    assert shares.shape == (CLIPS, 7)
    assert set(np.unique(shares)) == {0.0, 1.0}
    with pytest.raises(UsageError, match="needs 8 words that depend on the clip, the captions have 7"):
        content_shares(captions, vocabulary, np.full(CLIPS, 1 / CLIPS), 8)


def test_of_clips_with_one_caption_the_commonest_words_are_taken() -> None:
    captions = [["a horse"], ["a horse"], ["a car"]]
    shares = content_shares(captions, Vocabulary(["song", "car", "horse"]), np.full(3, 1 / 3), 2)
    np.testing.assert_allclose(shares, [[1, 0], [1, 0], [0, 1]])


def test_the_projection_says_the_words_of_unseen_clips_and_has_unit_variance() -> None:
    features, captions = clips()
    projection = nn.Linear(SIZE, 8)
    with torch.no_grad():
        start_projection(
            projection,
            features,
            captions,
            Vocabulary(["a", "runs", *WORDS]),
            [1.0] * CLIPS,
        )
        unseen, _ = clips(seed=1)
        projected = projection(torch.from_numpy(unseen)).numpy()
    for word in range(7):
        best = max(abs(np.corrcoef(projected[:, word], unseen[:, feature])[0, 1]) for feature in range(7))
        assert best > 0.9
    np.testing.assert_allclose(projected.mean(0), 0, atol=0.2)
    np.testing.assert_allclose(projected.std(0), 1, atol=0.2)


def test_a_clip_of_weight_two_counts_as_two_clips() -> None:
    features, captions = clips()
    vocabulary, both = Vocabulary(["a", "runs", *WORDS]), [nn.Linear(SIZE, 8), nn.Linear(SIZE, 8)]
    start_projection(both[0], features, captions, vocabulary, [2.0] * 10 + [1.0] * (CLIPS - 10))
    doubled = np.concatenate([features[:10], features])
    start_projection(both[1], doubled, captions[:10] + captions, vocabulary, [1.0] * (CLIPS + 10))
    probe = torch.from_numpy(features)
    torch.testing.assert_close(both[0](probe)[:, :7], both[1](probe)[:, :7], atol=1e-2, rtol=1e-2)


def test_ridge_and_principal_components_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    standard, targets = rng.normal(size=(50, 5)), rng.normal(size=(50, 2))
    weight = np.full(50, 1 / 50)
    found = ridge(standard, targets, weight, 0.5)

    def cost(solution: np.ndarray) -> float:
        errors = standard @ solution - (targets - targets.mean(0))
        return float((errors**2).sum() / 50 + 0.5 * (solution**2).sum())

    assert all(cost(found) < cost(found + 1e-3 * rng.normal(size=found.shape)) for _ in range(20))
    components = principal_components(standard - standard.mean(0), weight, 3)
    np.testing.assert_allclose(np.cov(((standard - standard.mean(0)) @ components).T, bias=True), np.eye(3), atol=1e-9)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.1, 0.0, 0.1), (3.0, 0.5, 100.0)])
def test_the_penalty_is_the_one_that_errs_least_on_clips_held_out(noise: float, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    standard, weight = rng.normal(size=(200, 40)), rng.uniform(1, 3, 200)
    targets = standard @ rng.normal(size=(40, 3)) * (1, 10, 0.1) / 6 + noise * rng.normal(size=(200, 3)) * (1, 10, 0.1)
    weight /= weight.sum()
    out = held_out(200)
    assert out.mean() == 0.2
    inside, mean = weight[~out] / weight[~out].sum(), np.average(targets, axis=0, weights=weight)
    spread = np.average((targets - mean) ** 2, axis=0, weights=weight)

    def error(penalty: float) -> float:
        predicted = standard[out] @ ridge(standard[~out], targets[~out], inside, penalty) + inside @ targets[~out]
        return float(np.average(((targets[out] - predicted) ** 2 / spread).sum(axis=1), weights=weight[out]))

    chosen = best_penalty(standard, targets, weight)
    assert chosen == min(PENALTIES, key=error)
    assert least <= chosen <= most


def test_of_a_single_clip_no_penalty_is_chosen() -> None:
    assert best_penalty(np.zeros((1, 2)), np.zeros((1, 1)), np.ones(1)) == 1.0
