"""The second opinion on a sentence: as written, fitted to what is known, kept by a checkpoint, and heard."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.errors import CheckpointError
from etenet.model import checkpoint as checkpoints
from etenet.model.hypothesis import Hypothesis, WordShare
from etenet.model.minimum_risk import MinimumRisk
from etenet.model.vocabulary import Vocabulary
from etenet.model.word_evidence import SMOOTHING, WordEvidence, informed_share, log_ratio
from training.evaluation import word_evidence
from training.evaluation.word_evidence import fit_word_evidence

SIZE, RANK, WORDS = 6, 2, 4


@pytest.fixture
def evidence() -> WordEvidence:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return WordEvidence(
        words=np.array([7, 3, 9, 4]),
        usual=np.array([0.9, 0.5, 0.1, 0.01], np.float32),
        directions=normal(SIZE, RANK),
        center=normal(RANK),
        loadings=normal(RANK, WORDS) / 10,
    )


def test_shares_are_those_of_the_regression_word_by_word(evidence: WordEvidence) -> None:
    means = np.random.default_rng(1).normal(size=(3, SIZE)).astype(np.float32) * 2
    sentences = [[(7, 3, 7, 9)], [], [(4,), (5, 9)]]
    given = evidence.shares(means, sentences)
    columns = {7: 0, 3: 1, 9: 2, 4: 3}
    for of_clip, of_sentences, mean in zip(given, sentences, means, strict=True):
        assert len(of_clip) == len(of_sentences)
        for of_sentence, sentence in zip(of_clip, of_sentences, strict=True):
            expected = []
            for word in sorted(set(sentence)):
                here, usual = 0.0, 0.0
                if word in columns:
                    usual = float(evidence.usual[columns[word]])
                    here = usual
                    for direction in range(RANK):
                        found = sum(mean[at] * evidence.directions[at, direction] for at in range(SIZE))
                        here += (found - evidence.center[direction]) * evidence.loadings[direction, columns[word]]
                expected.append((min(max(here, 0.0), 1.0), usual))
            np.testing.assert_allclose(of_sentence, expected, atol=1e-5)
    assert {share.here for of_clip in given for of_one in of_clip for share in of_one} & {0.0, 1.0}


def test_the_two_numbers_are_those_that_a_hand_computes() -> None:
    horse, often = WordShare(here=0.6 - SMOOTHING, usual=0.02 - SMOOTHING), WordShare(here=0.5, usual=0.5)
    assert log_ratio([horse, often]) == pytest.approx(math.log(30))
    assert log_ratio([]) == 0
    weights = [math.log(1 / 0.02), math.log(1 / (0.5 + SMOOTHING))]
    expected = (weights[0] * horse.here + weights[1] * 0.5) / sum(weights)
    assert informed_share([horse, often]) == pytest.approx(expected)
    assert informed_share([WordShare(here=1.0, usual=1.0)]) == informed_share([]) == 0


def test_of_two_sentences_as_probable_the_one_is_said_whose_words_are_to_be_expected(evidence: WordEvidence) -> None:
    beam = [Hypothesis((word,), (), math.log(0.4), ()) for word in (3, 9)]
    of_both = [
        MinimumRisk(typical=np.zeros(SIZE, np.float32), evidence=replace(evidence, usual=usual), power=1.0)
        for usual in np.array([[0, 0.5, 0.1, 0], [0, 0.1, 0.5, 0]], np.float32)
    ]
    means = np.array([[1.0] * SIZE, [-1.0] * SIZE], np.float32)
    for minimum_risk in of_both:
        for of_clip in minimum_risk.compared(lambda _, sentences: [0.0] * len(sentences), means, [beam, beam]):
            ratios = [log_ratio(one.shares) for one in of_clip]
            assert minimum_risk.order(of_clip)[0] == np.argmax(ratios)
            deaf = replace(minimum_risk, evidence_weight=0.0)
            assert deaf.order(of_clip) == [0, 1]


def test_a_fit_finds_the_words_that_features_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each clip has 200 captions, whose words are drawn with probabilities that are linear in two of its features."""
    monkeypatch.setattr(word_evidence, "RANK", 2)
    rng, names = np.random.default_rng(0), ["always", "horse", "car", "never"]
    vocabulary = Vocabulary(names)
    features = rng.normal(size=(120, SIZE)).astype(np.float32) * 3 + 5

    def probabilities(features: np.ndarray) -> np.ndarray:
        standard = (features - 5) / 3
        horse, car = 0.3 + 0.08 * standard[:, 0], 0.2 + 0.04 * standard[:, 1]
        return np.clip(np.column_stack([np.ones_like(car), horse, car, np.zeros_like(car)]), 0, 1)

    captions = [
        [" ".join(name for name, p in zip(names, of_clip, strict=True) if rng.random() < p) for _ in range(200)]
        for of_clip in probabilities(features)
    ]
    fitted = fit_word_evidence(features, captions, vocabulary)
    always, horse, car, _ = vocabulary.encode(" ".join(names))
    assert fitted.words.tolist() == [always, horse, car]
    assert fitted.directions.shape == (SIZE, 2)
    new = rng.normal(size=(50, SIZE)).astype(np.float32) * 3 + 5
    of_clips = fitted.shares(new, [[(always, horse, car)]] * 50)
    found = np.array([[share.here for share in of_clip[0]] for of_clip in of_clips])
    np.testing.assert_allclose(found, probabilities(new)[:, :3], atol=0.04)
    monkeypatch.setattr(word_evidence, "WORDS", 2)
    assert fit_word_evidence(features, captions, vocabulary).words.tolist() == [always, horse]


def test_a_checkpoint_keeps_it_and_refuses_a_damaged_one(
    evidence: WordEvidence, small_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoints.load(small_checkpoint)
    size = checkpoint.model.decoder.config.feature_size
    whole = replace(evidence, directions=np.resize(evidence.directions, (size, RANK)))
    typical = np.zeros(size, np.float32)
    checkpoints.save(replace(checkpoint, minimum_risk=MinimumRisk(typical=typical, evidence=whole)), tmp_path / "a.pt")
    checkpoints.save(checkpoints.load(tmp_path / "a.pt"), tmp_path / "b.pt")
    read = checkpoints.load(tmp_path / "b.pt").minimum_risk
    assert read is not None
    assert read.evidence is not None
    for field in fields(WordEvidence):
        kept, given = getattr(read.evidence, field.name), getattr(whole, field.name)
        np.testing.assert_allclose(kept, given, rtol=1e-3, atol=1e-6)
        assert kept.dtype == given.dtype
    with pytest.raises(ValueError, match="is for 6 features"):
        MinimumRisk(typical=typical, evidence=evidence)
    for change, message in [
        ({"center": np.zeros(3, np.float32)}, r"center of \(3,\), not \(2,\)"),
        ({"usual": np.full(WORDS, np.nan, np.float32)}, "usual that are not finite"),
        ({"words": np.arange(3)}, r"words of \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(evidence, **change)


def test_a_file_with_damaged_evidence_is_refused_in_one_line(small_checkpoint: Path, tmp_path: Path) -> None:
    contents = torch.load(small_checkpoint, weights_only=True)
    size = contents["decoder"]["feature_size"]
    for stored in (3, {"words": 3}, {"words": torch.zeros(1)}, {"other": torch.zeros(1)}):
        damaged = {"typical": torch.zeros(size), "evidence": stored}
        torch.save({**contents, "minimum_risk": damaged}, tmp_path / "damaged.pt")
        with pytest.raises(CheckpointError, match="is damaged or not from this version") as caught:
            checkpoints.load(tmp_path / "damaged.pt")
        assert "\n" not in str(caught.value)
