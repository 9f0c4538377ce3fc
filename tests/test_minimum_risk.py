"""Minimum risk: what it prefers, by brute force, and that a checkpoint with it says that sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nltk.util import ngrams

import etenet
from etenet.captioning.captioner import decoders_for
from etenet.model import checkpoint as checkpoints
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.generate import generate, log_probs
from etenet.model.hypothesis import Hypothesis
from etenet.model.minimum_risk import HABIT_WEIGHT, RARE, LogProbs, MinimumRisk, habits
from etenet.model.vocabulary import EOS_ID, Vocabulary
from etenet.runtime.network import TorchNetwork

WORDS = 12


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(1)
    config = DecoderConfig(
        feature_size=6, vocabulary_size=WORDS, hidden_size=8, embedding_size=5, attention_size=4, projection_size=3
    )
    return Decoder(config).eval()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)) * 3


def beams_of(decoder: Decoder, features: torch.Tensor) -> list[list[Hypothesis]]:
    return generate(decoder, features, beam_size=5, max_words=7)


def log_probs_of(decoder: Decoder) -> LogProbs:
    return lambda feature, sentences: log_probs(decoder, torch.from_numpy(feature), sentences)


def test_log_probs_are_those_of_the_search(decoder: Decoder, features: torch.Tensor) -> None:
    still = features[0, :1]
    (beam,) = beams_of(decoder, still.expand(1, 4, 6))
    given = log_probs(decoder, still[0], [hypothesis.words for hypothesis in beam])
    assert given == pytest.approx([hypothesis.log_prob for hypothesis in beam], abs=1e-4)


def expected_similarity(beam: list[Hypothesis], number: int, weights: list[float]) -> float:
    total = 0.0
    for other, weight in zip(beam, weights, strict=True):
        scores = []
        for order in (1, 2, 3, 4):
            mine, theirs = (list(ngrams([*one.words, EOS_ID], order)) for one in (beam[number], other))
            shared = 0
            for gram in set(mine):
                shared += min(mine.count(gram), theirs.count(gram))
            scores.append(2 * shared / (len(mine) + len(theirs)) if mine or theirs else 1.0)
        total += weight * sum(scores) / 4
    return total


@pytest.mark.parametrize(("power", "prior_weight"), [(0.5, 0.25), (1.0, 0.0), (0.1, 2.0)])
def test_the_order_is_that_of_the_expected_similarity(
    decoder: Decoder, features: torch.Tensor, power: float, prior_weight: float
) -> None:
    beams, typical = beams_of(decoder, features), features.mean((0, 1))
    often = {beams[0][0].words: 0.04, beams[1][2].words: 0.5, (3, 3): 0.2}
    minimum_risk = MinimumRisk(typical=typical.numpy(), power=power, prior_weight=prior_weight, habits=often)
    for beam in minimum_risk.compared(log_probs_of(decoder), features.mean(1).numpy(), beams):
        order = minimum_risk.order(beam)
        priors = log_probs(decoder, typical, [hypothesis.words for hypothesis in beam])
        assert [hypothesis.typical_log_prob for hypothesis in beam] == pytest.approx(priors, abs=1e-4)
        weights = [
            math.exp(one.log_prob - prior_weight * prior) ** power
            / (often.get(one.words, RARE) / RARE) ** (power * HABIT_WEIGHT)
            for one, prior in zip(beam, priors, strict=True)
        ]
        worth = [expected_similarity(beam, number, weights) for number in range(len(beam))]
        assert sorted(order) == list(range(len(beam)))
        once = [worth[number] for number in order if not repeats(beam[number])]
        twice = [worth[number] for number in order if repeats(beam[number])]
        assert [repeats(beam[number]) for number in order] == [False] * len(once) + [True] * len(twice)
        assert once == pytest.approx(sorted(once, reverse=True))
        assert twice == pytest.approx(sorted(twice, reverse=True))


def repeats(hypothesis: Hypothesis) -> bool:
    pairs = list(ngrams(hypothesis.words, 2))
    return len(set(pairs)) < len(pairs)


def test_a_sentence_that_says_two_words_in_a_row_twice_comes_last() -> None:
    a, horse, rides, woman = 3, 4, 5, 6
    horses, women = (a, horse, rides, a, horse), (a, woman, rides, a, horse)
    beam = [Hypothesis(words, (), math.log(probability), ()) for words, probability in [(horses, 0.5), (women, 0.1)]]
    minimum_risk = MinimumRisk(typical=np.zeros(6, np.float32))
    assert minimum_risk.order(beam) == [1, 0]
    assert minimum_risk.order(beam[:1]) == [0]


def test_sentences_that_agree_beat_a_more_probable_one_that_stands_alone() -> None:
    beam = [
        Hypothesis(words, (), math.log(probability), ())
        for words, probability in [((3, 4, 5), 0.2), ((6, 7, 8), 0.18), ((6, 7, 8, 9), 0.17)]
    ]
    assert MinimumRisk(typical=np.zeros(6, np.float32), power=1.0, prior_weight=0.0).order(beam)[-1] == 0


def test_what_a_typical_clip_makes_probable_is_worth_less() -> None:
    generic, special = (
        Hypothesis(words, (), math.log(0.2), (), math.log(typical))
        for words, typical in [((3, 4), 0.1), ((5, 6), 1e-6)]
    )
    assert MinimumRisk(typical=np.zeros(6, np.float32)).order([generic, special]) == [1, 0]


def test_a_sentence_that_is_said_of_many_clips_is_worth_less() -> None:
    often, seldom = (Hypothesis(words, (), math.log(0.2), ()) for words in ((3, 4), (5, 6)))
    known = habits([often.words] * 20 + [seldom.words] * 7 + [(7, number) for number in range(973)])
    assert known == {often.words: 0.02}
    assert MinimumRisk(typical=np.zeros(6, np.float32), habits=known).order([often, seldom]) == [1, 0]
    assert MinimumRisk(typical=np.zeros(6, np.float32), habits=known, habit_weight=0.0).order([often, seldom]) == [0, 1]


def test_clips_without_sentences_have_no_order(decoder: Decoder) -> None:
    minimum_risk = MinimumRisk(typical=np.zeros(6, np.float32))
    compared = minimum_risk.compared(log_probs_of(decoder), np.zeros((2, 6), np.float32), [[], []])
    assert [minimum_risk.order(beam) for beam in compared] == [[], []]


@pytest.fixture
def captioner(tmp_path: Path) -> etenet.Captioner:
    """Of a random network with minimum risk, as a file keeps it."""
    torch.manual_seed(0)
    checkpoint = checkpoints.initialise(
        "squeezenet1_1", Vocabulary(["a", "dog", "runs", "cat", "sits", "the", "on"]), crop_px=64
    )
    typical = np.linspace(-1, 1, checkpoint.model.decoder.config.feature_size, dtype=np.float32)
    minimum_risk = MinimumRisk(typical=typical, power=0.1, prior_weight=1.0, habits={(3, 4): 0.5})
    checkpoints.save(replace(checkpoint, minimum_risk=minimum_risk), tmp_path / "with.pt")
    read = checkpoints.load(tmp_path / "with.pt")
    assert read.minimum_risk is not None
    np.testing.assert_array_equal(read.minimum_risk.typical, typical)
    assert read.minimum_risk.habits == {(3, 4): 0.5}
    return etenet.Captioner(read, TorchNetwork(read), decoders_for(read, sandboxed=False))


def test_a_captioner_says_the_sentence_of_least_risk_unless_a_length_penalty_is_given(
    captioner: etenet.Captioner,
) -> None:
    size, rng = captioner.checkpoint.model.decoder.config.feature_size, torch.Generator().manual_seed(0)
    features = torch.randn(8, 16, size, generator=rng)
    beams = captioner.network.sentences(features, beam_size=5, max_words=20)
    minimum_risk = captioner.checkpoint.minimum_risk
    assert minimum_risk is not None
    means = captioner.network.mean_features(features)
    np.testing.assert_allclose(means, features.mean(1).numpy(), rtol=1e-6)
    orders = [minimum_risk.order(b) for b in minimum_risk.compared(captioner.network.log_probs, means, beams)]
    assert any(order[0] != 0 for order in orders)
    reordered = captioner.caption_features(features, etenet.CaptionOptions(captions=5))
    plain = captioner.caption_features(features, etenet.CaptionOptions(length_penalty=0.0001))
    for beam, order, sentences, (likeliest,) in zip(beams, orders, reordered, plain, strict=True):
        assert [sentence.log_prob for sentence in sentences] == [beam[number].log_prob for number in order]
        assert likeliest.log_prob == beam[0].log_prob
    different = {number: etenet.CaptionOptions(length_penalty=number % 2) for number in range(8)}
    searched = captioner.search(dict(enumerate(features)), different)
    for number, (sentence,) in searched.items():
        expected = orders[number][0] if number % 2 == 0 else captioner.order(beams[number], 1.0)[0]
        assert sentence.log_prob == pytest.approx(beams[number][expected].log_prob, abs=1e-4)
