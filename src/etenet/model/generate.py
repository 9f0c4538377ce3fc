"""Features -> the best sentences: the search of `search.py` with the decoder as its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from etenet import metrics
from etenet.model.decoder import Decoder, State, Step
from etenet.model.hypothesis import WORDS, Hypothesis
from etenet.model.search import Sentences, beam_search, greedy_search
from etenet.model.vocabulary import EOS_ID, SOS_ID


@torch.inference_mode()
def generate(decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
    """features (B, L, D) -> the sentences of each clip, best first. A beam of width 1 is a greedy search."""
    if beam_size > 1:
        sentences = beam(decoder, features, beam_size=beam_size, max_words=max_words)
        return sentences.hypotheses(WORDS.eos)
    step, state = _steps(decoder, features, sentences=1)
    return greedy_search(step, state, clips=len(features), max_words=max_words, words=WORDS, device=features.device)


def beam(
    decoder: Decoder,
    features: Tensor,
    *,
    beam_size: int,
    max_words: int,
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
        words=WORDS,
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


@torch.inference_mode()
def log_probs(decoder: Decoder, feature: Tensor, sentences: Sequence[Sequence[int]]) -> list[float]:
    """Of each sentence, its end included, for a clip whose frames all have this feature (D,)."""
    device = decoder.embedding.weight.device
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    words = torch.full((len(sentences), int(lengths.max()) + 1), EOS_ID)
    for row, sentence in enumerate(sentences):
        words[row, : len(sentence)] = torch.tensor(sentence)
    is_word = (torch.arange(words.shape[1]) <= lengths[:, None]).to(device)
    words = words.to(device)
    previous = torch.cat([torch.full_like(words[:, :1], SOS_ID), words[:, :-1]], dim=1)
    memory = decoder.prepare(feature.to(device)[None, None])
    state = decoder.first_state(memory, len(sentences))
    outputs = []
    for position in range(words.shape[1]):
        output, state, _ = decoder.advance(previous[None, :, position], state, memory)
        outputs.append(output[0])
    logits = decoder.logits(torch.stack(outputs, dim=1)[is_word])  # none where a shorter sentence has ended
    of_words = logits.log_softmax(dim=-1).gather(-1, words[is_word][:, None])[:, 0]
    totals: list[float] = of_words.new_zeros(words.shape).masked_scatter(is_word, of_words).sum(dim=-1).tolist()
    return totals
