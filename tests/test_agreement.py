"""Captions are preferred by how well they agree with the clip's others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from etenet.model.vocabulary import Vocabulary
from etenet.scoring.scores import Scorer
from training.data.datasets import DatasetClip
from training.loop.agreement import with_preferences
from training.loop.order import epoch_windows
from training.recipes import RECIPES

CAPTIONS = {
    "guitar": ("a man plays a guitar", "a man is playing the guitar", "a man plays the guitar", "somebody sits there"),
    "dog": ("a dog runs in the grass", "a dog is running", "the dog runs in a field"),
    "cat": ("a cat sleeps",),
}
VOCABULARY = Vocabulary(sorted({word for of_clip in CAPTIONS.values() for text in of_clip for word in text.split()}))
CLIPS = [DatasetClip(row=row, video=video, captions=of_clip) for row, (video, of_clip) in enumerate(CAPTIONS.items())]


def preferences(power: float) -> dict[str, np.ndarray]:
    return {clip.video: np.array(clip.preferences) for clip in with_preferences(CLIPS, VOCABULARY, power)}


def test_probabilities_sum_to_one_and_power_0_prefers_none() -> None:
    for of_clip in preferences(1.5).values():
        assert of_clip.sum() == pytest.approx(1)
        assert of_clip.min() > 0
    for of_clip in preferences(0.0).values():
        np.testing.assert_allclose(of_clip, 1 / len(of_clip))


def test_the_caption_that_agrees_with_no_other_is_the_least_likely() -> None:
    of_clip = preferences(1.0)["guitar"]
    assert of_clip.argmin() == 3
    assert of_clip[3] < 0.1 * of_clip.max()


def test_twice_the_power_is_the_square() -> None:
    once, twice = preferences(1.0), preferences(2.0)
    for video, of_clip in once.items():
        np.testing.assert_allclose(twice[video], of_clip**2 / (of_clip**2).sum())


def test_agreement_follows_pycocoevalcaps_cider_against_the_others() -> None:
    """Its document frequencies lack the one caption that is scored, so the order is compared, not the number."""
    others = {}
    for number, caption in enumerate(CAPTIONS["dog"]):
        references = {**CAPTIONS, "dog": [text for text in CAPTIONS["dog"] if text != caption]}
        scorer = Scorer({video: list(texts) for video, texts in references.items()}, tokenizer="none", meteor=False)
        hypotheses = {video: [caption if video == "dog" else texts[0]] for video, texts in references.items()}
        others[number] = scorer.score(hypotheses).per_clip["dog"]["CIDEr"]
    assert sorted(others, key=others.__getitem__) == np.argsort(preferences(1.0)["dog"]).tolist()


def test_an_epoch_draws_captions_by_their_probabilities() -> None:
    stage = replace(RECIPES["real"]().stages[1], captions_per_clip=1, caption_agreement=1.0)
    preferred = with_preferences(CLIPS, VOCABULARY, stage.caption_agreement)
    drawn = Counter(
        example.captions[0]
        for epoch in range(2000)
        for window in epoch_windows(preferred, stage, seed=0, stage_number=1, epoch=epoch)
        for example in window
    )
    for clip in preferred:
        shares = [drawn[caption] / 2000 for caption in clip.captions]
        np.testing.assert_allclose(shares, clip.preferences, atol=0.04)
