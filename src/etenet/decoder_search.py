"""Features -> the best sentences, by the search of `search.py` with the decoder as its step.

On a GPU all words of all sentences of a batch can be one recording, without a look at the host: it always goes on to
the longest sentence allowed, as to ask whether all have ended would cost more than the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from etenet.config import FRAMES_PER_CLIP
from etenet.cuda_graph import Play, recorder
from etenet.decoder import Decoder, State, Step
from etenet.search import Hypothesis, Sentences, Words, beam_search, greedy_search

RECORDED_BEAM_SIZE = 5
RECORDED_CLIPS = (16, 8, 4, 2, 1)


@torch.inference_mode()
def search(
    decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int, words: Words
) -> list[list[Hypothesis]]:
    """features (B, L, D) -> the sentences of each clip, best first; one by greedy search if the beam is 1 wide."""
    if beam_size > 1:
        found = _beam(decoder, features, beam_size=beam_size, max_words=max_words, words=words, may_stop=True)
        return found.hypotheses(words.eos)
    step, state = _steps(decoder, features, beam_size)
    return greedy_search(step, state, clips=len(features), max_words=max_words, words=words, device=features.device)


class GpuSearch:
    """The same for sentences of `max_words` and `RECORDED_BEAM_SIZE`. One instance serves one thread at a time."""

    def __init__(self, decoder: Decoder, *, max_words: int, words: Words, device: torch.device) -> None:
        self.max_words, self._eos = max_words, words.eos

        def said(features: Tensor) -> Sentences:
            size = RECORDED_BEAM_SIZE
            return _beam(decoder, features, beam_size=size, max_words=max_words, words=words, may_stop=False)

        record = recorder(device)
        with torch.inference_mode():
            shape = FRAMES_PER_CLIP, decoder.config.feature_size
            self._play: dict[int, Play[Sentences]] = {
                clips: record(said, torch.zeros(clips, *shape, device=device)) for clips in RECORDED_CLIPS
            }

    def finds(self, beam_size: int, max_words: int) -> bool:
        return (beam_size, max_words) == (RECORDED_BEAM_SIZE, self.max_words)

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> list[list[Hypothesis]]:
        """features (B, L, D) -> the sentences of each clip, best first."""
        most = max(self._play)
        return [found for at in range(0, len(features), most) for found in self._found(features[at : at + most])]

    def _found(self, features: Tensor) -> list[list[Hypothesis]]:
        clips = min(size for size in self._play if size >= len(features))
        filled = functional.pad(features, (0, 0, 0, 0, 0, clips - len(features)))
        return self._play[clips](filled).hypotheses(self._eos)[: len(features)]


def _steps(decoder: Decoder, features: Tensor, sentences: int) -> tuple[Callable[[Tensor, State], Step], State]:
    """The decoder as a search wants it: a step, and the state before the first."""
    memory = decoder.remember(features)

    def step(last_words: Tensor, state: State) -> Step:
        return decoder.step(last_words, state, memory)

    return step, decoder.first_state(memory, sentences)


def _beam(
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
