"""Features -> the best sentences: the search of `search.py` with the decoder as its step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etenet import metrics
from etenet.model.decoder import Decoder, State, Step
from etenet.model.search import Hypothesis, Sentences, Words, beam_search, greedy_search
from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID

WORDS = Words(sos=SOS_ID, eos=EOS_ID, never=(UNKNOWN_ID,))


@torch.inference_mode()
def generate(
    decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int, words: Words = WORDS
) -> list[list[Hypothesis]]:
    """features (B, L, D) -> the sentences of each clip, best first. A beam of width 1 is a greedy search."""
    if beam_size > 1:
        sentences = beam(decoder, features, beam_size=beam_size, max_words=max_words, words=words)
        return sentences.hypotheses(words.eos)
    step, state = _steps(decoder, features, sentences=1)
    return greedy_search(step, state, clips=len(features), max_words=max_words, words=words, device=features.device)


def beam(
    decoder: Decoder,
    features: Tensor,
    *,
    beam_size: int,
    max_words: int,
    words: Words = WORDS,
    may_stop: bool = True,
) -> Sentences:
    """The sentences on the device of the features. `may_stop` as in `beam_search`."""
    step, state = _steps(decoder, features, sentences=beam_size)
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


def _steps(decoder: Decoder, features: Tensor, *, sentences: int) -> tuple[Callable[[Tensor, State], Step], State]:
    """The decoder as a search needs it: its step, and the state before the first word."""
    memory = decoder.prepare(features)

    def step(previous_words: Tensor, state: State) -> Step:
        metrics.STEPS.inc()
        return decoder.step(previous_words, state, memory)

    return step, decoder.first_state(memory, sentences)
