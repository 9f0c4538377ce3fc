"""The reward is CIDEr-D, the gradient is REINFORCE's, and training on them raises the reward."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer

from etenet.errors import UsageError
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID, Vocabulary
from training.data.datasets import EncodedCaptions
from training.loop import self_critical
from training.loop.loss import sentence_losses
from training.loop.reward import MOST_WORDS, CiderD
from training.loop.self_critical import greedy_rewards, mixed_losses, rewards_of, sample, self_critical_losses

Sentence = list[int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are so small that a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(sentences: list[Sentence]) -> tuple[np.ndarray, np.ndarray]:
    """Sentences with an <EOS> each, padded by a word that must not count, and their lengths."""
    ended = [[*sentence, EOS_ID] for sentence in sentences]
    lengths = np.array([len(sentence) for sentence in ended])
    words = np.array([sentence + [3] * (lengths.max() - len(sentence)) for sentence in ended])
    return words, lengths


def by_pycocoevalcap(references: dict[str, list[Sentence]], candidates: dict[str, Sentence]) -> list[float]:
    def text(sentence: Sentence) -> str:
        return " ".join(map(str, [*sentence, EOS_ID]))

    scorer = CiderScorer()
    for clip, of_clip in references.items():
        scorer += (text(candidates[clip]), [text(reference) for reference in of_clip])
    return list(scorer.compute_score()[1])


@pytest.mark.parametrize("clips", [1, 2, 30])
def test_the_reward_is_cider_d_as_pycocoevalcap_computes_it(clips: int) -> None:
    chance = random.Random(clips)

    def sentence(most: int = 9) -> Sentence:
        return [chance.choice([3, 4, 5, 6, 6, 6, 6, 7, 8]) for _ in range(chance.randint(0, most))]

    references = {f"v{n}": [sentence() for _ in range(chance.randint(1, 5))] for n in range(clips)}
    reward = CiderD(references, vocabulary_size=12)
    for _ in range(5):
        candidates = {clip: [*sentence(14), *([9] if chance.random() < 0.3 else [])] for clip in references}
        words, lengths = padded(list(candidates.values()))
        order = list(range(clips))
        chance.shuffle(order)
        scores = reward.score([f"v{n}" for n in order], words[order], lengths[order])
        expected = by_pycocoevalcap(references, candidates)
        assert scores == pytest.approx([expected[n] for n in order], abs=1e-12)


def test_a_sentence_that_breaks_off_is_worth_less() -> None:
    vocabulary = Vocabulary(["a", "dog", "runs", "on", "grass", "cat", "sleeps"])
    reward = CiderD.from_captions({"v": ["a dog runs on a grass", "a dog runs"], "w": ["a cat sleeps"]}, vocabulary)
    whole, lengths = padded([vocabulary.encode(text) for text in ("a dog runs on a grass", "a dog runs on a")])
    scores = reward.score(["v", "v"], whole, lengths)
    without_end = reward.score(["v", "v"], whole, lengths - 1)
    assert scores[0] > without_end[0]
    assert scores[0] - scores[1] > without_end[0] - without_end[1]


def test_a_vocabulary_too_large_for_the_reward_is_named() -> None:
    with pytest.raises(UsageError, match=r"has 55109 words, the reward takes 55108; .* --minimum-count"):
        CiderD({"v": [[3]]}, MOST_WORDS + 1)


TWO = CiderD({"v": [[3, 4], [3, 3]], "w": [[4, 3]]}, 5)  # words 3 and 4 beside the special three


def toy(vocabulary_size: int = 5, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    sizes = DecoderConfig(
        feature_size=4, vocabulary_size=vocabulary_size, hidden_size=6, embedding_size=5, attention_size=3
    )
    return Decoder(sizes).double()


def log_prob(decoder: Decoder, features: torch.Tensor, sentence: Sentence) -> torch.Tensor:
    """Of a sentence of one clip, over the words that a sample may have at each place."""
    memory, total = decoder.prepare(features), torch.zeros((), dtype=features.dtype)
    state, previous = decoder.first_state(memory), SOS_ID
    for place, word in enumerate(sentence):
        step = decoder.step(torch.tensor([[previous]]), state, memory)
        possible = [w for w in range(decoder.config.vocabulary_size) if w not in (SOS_ID, UNKNOWN_ID)]
        possible = [w for w in possible if place or w != EOS_ID]
        total = total + step.log_probs[0, 0, word] - step.log_probs[0, 0, possible].logsumexp(0)
        state, previous = step.state, word
    return total


def gradient(decoder: Decoder, value: torch.Tensor) -> torch.Tensor:
    decoder.zero_grad()
    torch.autograd.backward(value)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in decoder.parameters()])


@pytest.mark.parametrize("baseline", ["greedy", "mean of the other samples"])
def test_the_gradient_is_that_of_reinforce(baseline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, features = toy(), torch.randn(2, 3, 4, dtype=torch.float64)
    drawn = sample(decoder, features, sentences=4, max_words=3)
    monkeypatch.setattr(self_critical, "sample", lambda *_, **__: drawn)
    losses = self_critical_losses(
        decoder,
        features,
        ["v", "w"],
        TWO,
        sentences=4,
        baseline=baseline,  # type: ignore[arg-type]
        max_words=3,
    )
    rewards = rewards_of(drawn, ["v", "w"], TWO)
    torch.testing.assert_close(losses.detach(), -rewards.mean(1, keepdim=True))
    computed = gradient(decoder, losses.sum())
    greedy = greedy_rewards(decoder, features, ["v", "w"], TWO, max_words=3)
    expected = torch.zeros((), dtype=torch.float64)
    for clip, k in itertools.product(range(2), range(4)):
        ids = drawn.words[clip, k][drawn.mask[clip, k]].tolist()
        others = [rewards[clip, j] for j in range(4) if j != k]
        against = greedy[clip] if baseline == "greedy" else sum(others) / 3
        advantage = rewards[clip, k] - against
        expected = expected - advantage * log_prob(decoder, features[clip : clip + 1], ids) / 4
    assert rewards.std() > 0
    torch.testing.assert_close(computed, gradient(decoder, expected), rtol=1e-9, atol=1e-12)


def test_over_many_samples_it_is_the_gradient_of_the_expected_reward() -> None:
    """All sentences of at most two words, by their probabilities, against 50,000 samples."""
    decoder, features = toy(), torch.randn(1, 3, 4, dtype=torch.float64)
    words = (3, 4)
    sentences = [[*s, EOS_ID] for n in (1, 2) for s in itertools.product(words, repeat=n)]
    sentences += [list(s) for s in itertools.product(words, repeat=3)]  # cut: these have no end
    lengths = np.array([len(sentence) for sentence in sentences])
    ids = np.array([sentence + [EOS_ID] * (3 - len(sentence)) for sentence in sentences])
    rewards = TWO.score(["v"] * len(sentences), ids, lengths)
    probabilities = torch.stack([log_prob(decoder, features, sentence) for sentence in sentences]).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    exact = gradient(decoder, -(probabilities * torch.from_numpy(rewards)).sum())
    torch.manual_seed(1)
    losses = self_critical_losses(
        decoder, features, ["v"], TWO, sentences=50_000, baseline="mean of the other samples", max_words=2
    )
    sampled = gradient(decoder, losses.sum())
    assert (sampled - exact).norm() < 0.05 * exact.norm()


def test_teacher_forcing_adds_its_gradient_and_leaves_the_value() -> None:
    decoder, features = toy(), torch.randn(2, 3, 4, dtype=torch.float64)
    captions = EncodedCaptions.encode([["a b"], ["b"]], Vocabulary(["a", "b"]), 3)

    def mixed(weight: float) -> torch.Tensor:
        torch.manual_seed(2)
        return mixed_losses(
            decoder,
            features,
            (["v", "w"], captions),
            TWO,
            teacher_forcing=weight,
            attention_penalty=0.5,
            sentences=4,
            baseline="mean of the other samples",
            max_words=3,
        )

    forced = sentence_losses(decoder, features, captions, attention_penalty=0.5)
    torch.testing.assert_close(mixed(0.3), mixed(0.0))
    expected = gradient(decoder, mixed(0.0).sum()) + 0.3 * gradient(decoder, forced.sum())
    torch.testing.assert_close(gradient(decoder, mixed(0.3).sum()), expected, rtol=1e-9, atol=1e-12)


def test_samples_have_an_end_or_are_cut_and_hold_no_special_word() -> None:
    drawn = sample(toy(9), torch.randn(3, 2, 4, dtype=torch.float64), sentences=50, max_words=4)
    assert drawn.words.shape[-1] <= 5
    lengths = set()
    for words, mask in zip(drawn.words.flatten(0, 1).tolist(), drawn.mask.flatten(0, 1).tolist(), strict=True):
        kept = [word for word, inside in zip(words, mask, strict=True) if inside]
        assert mask == [True] * len(kept) + [False] * (len(mask) - len(kept))
        assert not {SOS_ID, UNKNOWN_ID} & set(kept)
        assert kept[0] != EOS_ID
        assert EOS_ID not in kept[:-1]
        assert kept[-1] == EOS_ID or len(kept) == 5
        lengths.add(len(kept))
    assert len(lengths) > 2


@pytest.mark.parametrize("baseline", ["greedy", "mean of the other samples"])
def test_training_on_the_reward_raises_it(baseline: str) -> None:
    decoder, features = toy(9).float(), torch.eye(4)[:, None].repeat(1, 2, 1)
    clips = ["p", "q", "r", "s"]
    reward = CiderD({"p": [[3, 4]], "q": [[5, 6, 7]], "r": [[8]], "s": [[3, 8, 8]]}, 9)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.02)
    torch.manual_seed(3)
    rewards = []
    for _ in range(60):
        losses = self_critical_losses(
            decoder,
            features,
            clips,
            reward,
            sentences=5,
            baseline=baseline,  # type: ignore[arg-type]
            max_words=4,
        )
        rewards.append(-losses.mean().item())
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean())
        optimizer.step()
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 1
