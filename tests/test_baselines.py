"""The baselines against closed forms, refits and captions that are known to fit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from training.evaluation import baselines

THINGS = ("dog", "cat", "car", "ship")
CAPTIONS = [
    [f"a {thing} is running", f"the {thing} runs.", f"A {thing} is here!"] for thing in THINGS for _ in range(5)
]


def features(seed: int, noise: float = 0.1) -> NDArray[np.float32]:
    """(20, 9): five noisy videos of each thing, in the order of `CAPTIONS`."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(size=(len(THINGS), 9))
    return (directions.repeat(5, axis=0) + noise * rng.normal(size=(20, 9))).astype(np.float32)


def test_the_most_frequent_caption_counts_captions_without_case_and_punctuation() -> None:
    assert baselines.most_frequent_caption([["A dog runs.", "a cat"], ["a dog runs", "b"]]) == "a dog runs"
    assert baselines.most_frequent_caption([["b", "a"], ["c"]]) == "a"


def test_the_central_caption_has_most_in_common_with_the_others() -> None:
    captions = ["nonsense", "a man sings", "a man is singing a song", "a man is singing", "somebody plays"]
    assert baselines.central_caption(captions) == "a man is singing"
    assert baselines.central_caption(["A dog!"]) == "a dog"


def test_the_nearest_video_is_that_of_the_largest_cosine_whatever_its_length() -> None:
    train = np.array([[1, 0.1], [0, 5], [-1, 0]], np.float32)
    given = np.array([[100, 0], [0.001, 0.01], [-1, 0.2]], np.float32)
    assert baselines.nearest_captions(train, [["a"], ["b"], ["c"]], given) == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(3))
def test_both_find_captions_that_name_what_is_seen(seed: int) -> None:
    train, given = features(seed), features(seed + 100)
    for captions_of in (baselines.nearest_captions, baselines.regressed_captions):
        captions = captions_of(train, CAPTIONS, given)
        assert [thing in caption for thing, caption in zip(np.repeat(THINGS, 5), captions, strict=True)] == [True] * 20


def test_the_caption_that_fits_best_is_found_in_any_batches_of_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    train, given = features(0), features(1)
    expected = baselines.regressed_captions(train, CAPTIONS, given)
    monkeypatch.setattr(baselines, "CAPTIONS_AT_ONCE", 5)
    assert baselines.regressed_captions(train, CAPTIONS, given) == expected


def test_ridge_equals_the_solution_of_its_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PENALTIES", (3.0,))
    rng = np.random.default_rng(0)
    train, given, targets = rng.normal(2, 3, (30, 5)), rng.normal(size=(4, 5)), rng.normal(size=(30, 2))
    x = (train - train.mean(axis=0)) / (train.std(axis=0) + 1e-6)
    weights = np.linalg.solve(x.T @ x + 3 * np.eye(5), x.T @ (targets - targets.mean(axis=0)))
    expected = (given - train.mean(axis=0)) / (train.std(axis=0) + 1e-6) @ weights + targets.mean(axis=0)
    np.testing.assert_allclose(baselines.ridge(train, targets, given), expected)


def test_ridge_takes_the_penalty_whose_refits_without_each_video_err_least(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    train, penalties = rng.normal(size=(40, 12)), (0.01, 30.0, 1e5)
    targets = train[:, :1] + rng.normal(size=(40, 1))
    x, y = (train - train.mean(axis=0)) / (train.std(axis=0) + 1e-6), targets - targets.mean(axis=0)

    def error(penalty: float) -> float:
        errors = []
        for left_out in range(40):
            kept = np.arange(40) != left_out
            level = y[kept].mean(axis=0)
            weights = np.linalg.solve(
                x.T[:, kept] @ (x[kept] - x[kept].mean(axis=0)) + penalty * np.eye(12), x.T[:, kept] @ (y[kept] - level)
            )
            errors.append(float(((y[left_out] - level - (x[left_out] - x[kept].mean(axis=0)) @ weights) ** 2).item()))
        return float(np.mean(errors))

    best = min(penalties, key=error)
    assert best == 30.0
    monkeypatch.setattr(baselines, "PENALTIES", penalties)
    chosen = baselines.ridge(train, targets, train)
    monkeypatch.setattr(baselines, "PENALTIES", (best,))
    np.testing.assert_array_equal(chosen, baselines.ridge(train, targets, train))


def test_one_training_video_and_features_that_do_not_vary_are_enough() -> None:
    train, given = np.ones((1, 3), np.float32), np.zeros((2, 3), np.float32)
    for captions_of in (baselines.nearest_captions, baselines.regressed_captions):
        assert captions_of(train, [["a dog"]], given) == ["a dog", "a dog"]
