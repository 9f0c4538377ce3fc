"""The search against brute force, on small random languages that need no network."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.model import search
from etenet.model.hypothesis import Hypothesis, Words
from etenet.model.search import greedy_search
from etenet.runtime import search as array_search

V, SOS, EOS = 5, 0, 1
WORDS = Words(sos=SOS, eos=EOS)


def beam_search(step: Any, start: Any, *, words: Words, **shape: Any) -> list[list[Hypothesis]]:
    """By the search on torch, after the search on NumPy arrays has found the same."""
    found = search.beam_search(step, start, words=words, **shape).hypotheses(words.eos)
    for beam, of_torch in zip(on_arrays(step, start, words=words, **shape), found, strict=True):
        assert [one.words for one in beam] == [one.words for one in of_torch]
        for one, other in zip(beam, of_torch, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob)
            assert one.word_log_probs == pytest.approx(other.word_log_probs)
            assert one.attention == other.attention
    return found


def on_arrays(step: Any, start: Any, **shape: Any) -> list[list[Hypothesis]]:
    """The search on NumPy arrays, with a step on torch."""

    @dataclass(frozen=True)
    class State:
        on_torch: Any

        def select(self, beams: NDArray[np.intp]) -> State:
            return State(self.on_torch.select(torch.from_numpy(beams)))

    def arrays(words: NDArray[np.intp], state: State) -> tuple[NDArray[Any], State, NDArray[Any]]:
        output = step(torch.from_numpy(words), state.on_torch)
        return output.log_probs.numpy().copy(), State(output.state), output.attention.numpy()

    return array_search.beam_search(arrays, State(start), **shape)


@dataclass(frozen=True)
class History:
    """prefix (B, K, T), the words so far: the state of a language whose next word depends on all words before it."""

    prefix: Tensor

    def select(self, sentences: Tensor) -> History:
        return History(self.prefix.gather(1, sentences[..., None].expand(-1, -1, self.prefix.shape[-1])))


@dataclass(frozen=True)
class Output:
    log_probs: Tensor
    state: History
    attention: Tensor


class Language:
    """Random probabilities of the next word, the same whenever the clip and the words before are the same."""

    def __init__(self, clips: int, *, seed: int = 0, end_bias: float = 0.0) -> None:
        self.clips, self.seed, self.end_bias = clips, seed, end_bias

    def log_probs(self, clip: int, prefix: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, clip, prefix)) % 2**31)
        scores = torch.randn(V, generator=generator, dtype=torch.float64) * 2
        scores[EOS] += self.end_bias
        return scores.log_softmax(-1)

    def step(self, words: Tensor, state: History) -> Output:
        prefix = torch.cat([state.prefix, words[..., None]], dim=-1)
        log_probs = torch.stack(
            [
                torch.stack([self.log_probs(clip, tuple(beam)) for beam in beams])
                for clip, beams in enumerate(prefix.tolist())
            ]
        )
        attention = prefix[..., -1:].double().expand(-1, -1, 3)  # shows which word the step was given
        return Output(log_probs, History(prefix), attention)

    def start(self, beams: int) -> History:
        return History(torch.zeros(self.clips, beams, 0, dtype=torch.long))

    def probability_of(self, clip: int, words: tuple[int, ...]) -> float:
        prefix, total = (SOS,), 0.0
        for word in (*words, EOS):
            total += self.log_probs(clip, prefix)[word].item()
            prefix += (word,)
        return total

    def every_sentence(self, clip: int, max_words: int) -> list[tuple[float, tuple[int, ...]]]:
        """All sentences of one to max_words words with their probabilities, best first."""
        allowed = [word for word in range(V) if word not in (SOS, EOS)]
        sentences = (words for length in range(1, max_words + 1) for words in itertools.product(allowed, repeat=length))
        return sorted(((self.probability_of(clip, words), words) for words in sentences), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_the_space_finds_the_best_sentences(seed: int) -> None:
    language, max_words = Language(2, seed=seed), 3
    everything = [language.every_sentence(clip, max_words) for clip in range(2)]
    width = len(everything[0])
    beams = beam_search(
        language.step, language.start(width), clips=2, beam_size=width, max_words=max_words, words=WORDS
    )
    for hypotheses, expected in zip(beams, everything, strict=True):
        assert [hypothesis.words for hypothesis in hypotheses] == [words for _, words in expected]
        assert [hypothesis.log_prob for hypothesis in hypotheses] == pytest.approx([total for total, _ in expected])


@pytest.mark.parametrize("seed", range(10))
def test_a_beam_of_one_is_greedy_search(seed: int) -> None:
    language = Language(3, seed=seed)
    beam = beam_search(language.step, language.start(1), clips=3, beam_size=1, max_words=6, words=WORDS)
    greedy = greedy_search(language.step, language.start(1), clips=3, max_words=6, words=WORDS)
    assert beam == greedy
    for clip, (sentence,) in enumerate(greedy):
        prefix: tuple[int, ...] = (SOS,)
        while len(prefix) <= 6:
            scores = language.log_probs(clip, prefix)
            scores[SOS] = -math.inf
            if len(prefix) == 1:
                scores[EOS] = -math.inf
            if (word := int(scores.argmax())) == EOS:
                break
            prefix += (word,)
        assert sentence.words == prefix[1:]


@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_the_beams_are_those_of_a_plain_loop(beam_size: int) -> None:
    """The oracle keeps beams in lists: ended beams stay, the others compete for the places that are left."""
    for seed in range(10):
        language, max_words = Language(1, seed=seed, end_bias=0.5), 5
        ended: list[tuple[float, tuple[int, ...]]] = []
        live: list[tuple[float, tuple[int, ...]]] = [(0.0, (SOS,))]
        for position in range(max_words + 1):
            candidates = [
                (total + language.log_probs(0, prefix)[word].item(), (*prefix, word))
                for total, prefix in live
                for word in range(V)
                if word != SOS and (word == EOS) <= (position > 0) and (word == EOS) >= (position == max_words)
            ]
            best = sorted(candidates, reverse=True)[: beam_size - len(ended)]
            ended += [beam for beam in best if beam[1][-1] == EOS]
            live = [beam for beam in best if beam[1][-1] != EOS]
        (hypotheses,) = beam_search(
            language.step, language.start(beam_size), clips=1, beam_size=beam_size, max_words=max_words, words=WORDS
        )
        expected = sorted(ended, reverse=True)
        assert [hypothesis.words for hypothesis in hypotheses] == [prefix[1:-1] for _, prefix in expected]


def test_ended_beams_stay_ended_and_every_log_prob_is_the_sum_of_its_words() -> None:
    language = Language(4, seed=3, end_bias=1.0)
    for clip, hypotheses in enumerate(
        beam_search(language.step, language.start(5), clips=4, beam_size=5, max_words=6, words=WORDS)
    ):
        assert len({hypothesis.words for hypothesis in hypotheses}) == 5
        for hypothesis in hypotheses:
            assert EOS not in hypothesis.words
            assert 1 <= len(hypothesis.words) <= 6
            assert hypothesis.log_prob == pytest.approx(language.probability_of(clip, hypothesis.words))
            assert sum(hypothesis.word_log_probs) == pytest.approx(hypothesis.log_prob)
            assert [weights[0] for weights in hypothesis.attention] == [SOS, *hypothesis.words[:-1]]


def test_sentences_that_never_end_are_cut_at_the_maximum_length() -> None:
    language = Language(1, end_bias=-50.0)
    (hypotheses,) = beam_search(language.step, language.start(3), clips=1, beam_size=3, max_words=4, words=WORDS)
    assert [len(hypothesis.words) for hypothesis in hypotheses] == [4, 4, 4]


def test_a_clip_gets_the_same_sentences_alone_and_in_a_batch() -> None:
    language = Language(6, seed=9, end_bias=0.3)
    batch = beam_search(language.step, language.start(4), clips=6, beam_size=4, max_words=6, words=WORDS)
    for clip in range(6):
        alone = Language(1, seed=9, end_bias=0.3)
        alone.log_probs = lambda _, prefix, clip=clip: language.log_probs(clip, prefix)  # type: ignore[method-assign]
        (hypotheses,) = beam_search(alone.step, alone.start(4), clips=1, beam_size=4, max_words=6, words=WORDS)
        assert hypotheses == batch[clip]


def test_excluded_words_are_in_no_sentence() -> None:
    language = Language(2)
    words = Words(sos=SOS, eos=EOS, never=(2, 3))
    beams = beam_search(language.step, language.start(5), clips=2, beam_size=5, max_words=3, words=words)
    assert {hypothesis.words for hypotheses in beams for hypothesis in hypotheses} == {(4,), (4, 4), (4, 4, 4)}


def test_probabilities_that_are_nan_give_no_sentence() -> None:
    def step(words: Tensor, state: History) -> Output:
        return Output(torch.full((*words.shape, V), math.nan), state, torch.zeros(*words.shape, 3))

    language = Language(1)
    assert beam_search(step, language.start(2), clips=1, beam_size=2, max_words=3, words=WORDS) == [[]]
    assert greedy_search(step, language.start(1), clips=1, max_words=3, words=WORDS) == [[]]


def test_a_length_penalty_divides_by_a_power_of_the_length() -> None:
    language = Language(1)
    ((hypothesis,),) = beam_search(language.step, language.start(1), clips=1, beam_size=1, max_words=5, words=WORDS)
    length = len(hypothesis.words) + 1
    assert hypothesis.score(0.7) == pytest.approx(hypothesis.log_prob / length**0.7)
