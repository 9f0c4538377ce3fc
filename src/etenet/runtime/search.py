"""The beam search of `model/search.py` on NumPy arrays, for a CPU: the same beams, by the same rules.

Shapes: B clips, K beams, V words, L frames, T words of the longest sentence, its end included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from etenet.model.hypothesis import Hypothesis, Words, best_first

Floats = NDArray[np.floating[Any]]
Numbers = NDArray[np.intp]


class SearchState(Protocol):
    """What a step carries from word to word."""

    def select(self, beams: Numbers, /) -> Any:
        """The state of these beams (B, K) of each clip."""


StateT = TypeVar("StateT", bound=SearchState)

StepFunction = Callable[[Numbers, StateT], tuple[Floats, StateT, Floats]]
"""Previous words (B, K) and the state before them -> log probabilities (B, K, V), which the search may overwrite, the
next state, and attention (B, K, L)."""


def beam_search(
    step: StepFunction[StateT], state: StateT, *, clips: int, beam_size: int, max_words: int, words: Words
) -> list[list[Hypothesis]]:
    """The `beam_size` most probable sentences of each clip that a beam of that width finds, best first.

    `state` is that of `beam_size` equal beams per clip. A beam of width 1 is a greedy search.
    """
    totals: Floats = np.full((clips, beam_size), -np.inf, np.float32)
    totals[:, 0] = 0.0  # all beams start equal, so only one may be extended
    ended = np.zeros(totals.shape, np.bool_)
    previous_words = np.full(totals.shape, words.sos, np.intp)
    choices: list[tuple[Numbers, Numbers, Floats, Floats]] = []
    for position in range(max_words + 1):
        log_probs, state, attention = step(previous_words, state)
        _forbid(log_probs, words, position=position, max_words=max_words)
        # An ended beam has one candidate, itself, which outranks every other and so keeps its place.
        rank = log_probs + totals[..., None]
        rank[ended] = -np.inf
        rank[ended, words.eos] = np.inf
        candidate = _top(rank.reshape(clips, -1), beam_size)
        parent, previous_words = np.divmod(candidate, log_probs.shape[-1])
        best = np.take_along_axis(rank.reshape(clips, -1), candidate, axis=1)
        had_ended = best == np.inf
        totals = np.where(had_ended, np.take_along_axis(totals, parent, axis=1), best)
        chosen_log_probs = np.take_along_axis(log_probs.reshape(clips, -1), candidate, axis=1)
        impossible = totals == -np.inf  # fewer sentences exist than there are beams
        ended = (previous_words == words.eos) & ~impossible
        state = state.select(parent)
        choices.append((parent, previous_words, np.where(had_ended, 0.0, chosen_log_probs), _of(attention, parent)))
        if (ended | impossible).all():
            break
    return _sentences(choices, totals, eos=words.eos)


def _forbid(log_probs: Floats, words: Words, *, position: int, max_words: int) -> None:
    """Set forbidden words to -inf: no end before the first word, nothing but the end at the last."""
    if position == max_words:
        end = log_probs[..., words.eos].copy()
        log_probs[...] = -np.inf
        log_probs[..., words.eos] = end
    else:
        log_probs[..., [words.sos, *words.never, *([] if position else [words.eos])]] = -np.inf


def _top(rank: Floats, count: int) -> Numbers:
    """rank (B, N) -> the columns of the `count` largest of each row, largest first."""
    largest = np.argpartition(rank, rank.shape[1] - count, axis=1)[:, -count:]
    order = np.argsort(-np.take_along_axis(rank, largest, axis=1), axis=1)
    return np.take_along_axis(largest, order, axis=1)


def _of(values: Floats, beams: Numbers) -> Floats:
    """values (B, K, X), beams (B, K) -> (B, K, X)."""
    return values[np.arange(len(values))[:, None], beams]


def _sentences(
    choices: list[tuple[Numbers, Numbers, Floats, Floats]], totals: Floats, *, eos: int
) -> list[list[Hypothesis]]:
    """Follow each beam back to its first word."""
    beam = np.broadcast_to(np.arange(totals.shape[1]), totals.shape)
    followed = []
    for parent, word, log_prob, attention in reversed(choices):
        of_beam = (np.take_along_axis(values, beam, axis=1) for values in (word, log_prob))
        followed.append((*of_beam, _of(attention, beam)))
        beam = np.take_along_axis(parent, beam, axis=1)
    words, log_probs, weights = (np.stack(part, axis=2).tolist() for part in zip(*reversed(followed), strict=True))
    return [best_first(*of_clip, eos=eos) for of_clip in zip(words, log_probs, weights, totals.tolist(), strict=True)]
