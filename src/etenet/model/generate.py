"""Features -> the best sentences, by the search of `search.py` with the decoder as its step.

On a GPU all words of all sentences of a batch can be one recording, without a look at the host: it always goes on to
the longest sentence allowed, as to ask whether all have ended would cost more than the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etenet.model.decoder import Decoder, State, Step
from etenet.model.search import Hypothesis, Sentences, Words, beam_search, greedy_search


@torch.inference_mode()
def search(
    decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int, words: Words
) -> list[list[Hypothesis]]:
    """features (B, L, D) -> the sentences of each clip, best first; one by greedy search if the beam is 1 wide."""
    if beam_size > 1:
        found = beam(decoder, features, beam_size=beam_size, max_words=max_words, words=words, may_stop=True)
        return found.hypotheses(words.eos)
    step, state = _steps(decoder, features, beam_size)
    return greedy_search(step, state, clips=len(features), max_words=max_words, words=words, device=features.device)


def _steps(decoder: Decoder, features: Tensor, sentences: int) -> tuple[Callable[[Tensor, State], Step], State]:
    """The decoder as a search wants it: a step, and the state before the first."""
    memory = decoder.remember(features)

    def step(last_words: Tensor, state: State) -> Step:
        return decoder.step(last_words, state, memory)

    return step, decoder.first_state(memory, sentences)


def beam(
    decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int, words: Words, may_stop: bool
) -> Sentences:
    step, state = _steps(decoder, features, beam_size)
    return beam_search(
        step,
        state,
        clips=len(features),
        beam_size=beam_size,
        max_words=max_words,
        words=words,
        device=features.device,
        may_stop=may_stop,
    )
