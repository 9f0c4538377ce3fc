"""Greedy and beam search over any `step`, for all clips and beams at once.

Knows no network: a step takes the previous words and a state, and returns log probabilities, the next state and
attention weights. Nothing is copied to the host until the sentences are complete, except one flag per word that says
whether any sentence still grows.

Every sentence has at least one word and an end. After `max_words` words only the end may follow, with the probability
that the network gives it, so all sentences are comparable and there is always a result.

Shapes: B clips, K beams, V words, L frames, T words of the longest sentence, its end included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from etenet.model.hypothesis import Hypothesis, Words, best_first

StateT = TypeVar("StateT", bound="SearchState")
StateT_co = TypeVar("StateT_co", bound="SearchState", covariant=True)


class SearchState(Protocol):
    """What a step carries from word to word."""

    def select(self, sentences: Tensor, /) -> Any:
        """The state of these sentences (B, K) of each clip."""


class SearchStep(Protocol[StateT_co]):
    """What a step returns."""

    @property
    def log_probs(self) -> Tensor: ...  # (B, K, V)
    @property
    def state(self) -> StateT_co: ...
    @property
    def attention(self) -> Tensor: ...  # (B, K, L)


StepFunction = Callable[[Tensor, StateT], SearchStep[StateT]]  # previous words (B, K) and the state before them


@dataclass(frozen=True, slots=True)
class Sentences:
    """The result of a search, on its device: K sentences per clip, in no order."""

    words: Tensor  # (B, K, T), as is the next
    log_probs: Tensor
    attention: Tensor  # (B, K, T, L)
    totals: Tensor  # (B, K); -inf if there is no such sentence

    def hypotheses(self, eos: int) -> list[list[Hypothesis]]:
        """The same on the host, best first."""
        parts = (self.words, self.log_probs, self.attention, self.totals)
        return [best_first(*of_clip, eos=eos) for of_clip in zip(*(part.tolist() for part in parts), strict=True)]


@dataclass(slots=True)
class _Trace:
    """The choice at each word, and the beam (`parent`) that it extends."""

    parent: list[Tensor] = field(default_factory=list)  # (B, K) each, as are the next two
    word: list[Tensor] = field(default_factory=list)
    log_prob: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)  # (B, K, L) each, of the parents

    def sentences(self, totals: Tensor) -> Sentences:
        """Follow each beam back to its first word."""
        beam = torch.arange(totals.shape[1], device=totals.device).expand_as(totals)
        choices: list[tuple[Tensor, Tensor, Tensor]] = []
        for parent, word, log_prob, attention in zip(
            *(reversed(history) for history in (self.parent, self.word, self.log_prob, self.attention)), strict=True
        ):
            choices.append((word.gather(1, beam), log_prob.gather(1, beam), _gather_beams(attention, beam)))
            beam = parent.gather(1, beam)
        words, log_probs, attention = (torch.stack(part, dim=2) for part in zip(*reversed(choices), strict=True))
        return Sentences(words, log_probs, attention, totals)


def _gather_beams(values: Tensor, beams: Tensor) -> Tensor:
    """values (B, K, X), beams (B, K') -> (B, K', X)."""
    return values.gather(1, beams[..., None].expand(-1, -1, values.shape[-1]))


def _allowed(log_probs: Tensor, words: Words, *, position: int, max_words: int) -> Tensor:
    """Log probabilities with forbidden words at -inf: no end before the first word, nothing but the end at the last."""
    if position == max_words:
        end = torch.full_like(log_probs, -math.inf)
        end[..., words.eos] = log_probs[..., words.eos]
        return end
    allowed = log_probs.clone()
    for word in (words.sos, *words.never, *([] if position else [words.eos])):
        allowed[..., word] = -math.inf
    return allowed


def beam_search(
    step: StepFunction[StateT],
    state: StateT,
    *,
    clips: int,
    beam_size: int,
    max_words: int,
    words: Words,
    device: torch.device | str = "cpu",
    may_stop: bool = True,
) -> Sentences:
    """The `beam_size` most probable sentences of each clip that a beam of that width finds.

    `state` is that of `beam_size` equal beams per clip. A beam that ends keeps its place and is never extended
    again; the others compete for the remaining places. Fewer than `beam_size` sentences are returned if fewer exist.
    With `may_stop` the search ends when all sentences have ended, which costs one synchronisation per word.
    """
    totals = torch.full((clips, beam_size), -math.inf, device=device)
    totals[:, 0] = 0.0  # all beams start equal, so only one may be extended
    ended = torch.zeros_like(totals, dtype=torch.bool)
    previous_words = torch.full_like(totals, words.sos, dtype=torch.long)
    trace = _Trace()
    for position in range(max_words + 1):
        output = step(previous_words, state)
        allowed = _allowed(output.log_probs, words, position=position, max_words=max_words)
        # The best of a clip are among the best of each beam, so that all that follows is small.
        log_probs, word = allowed.topk(min(beam_size, allowed.shape[-1]), sorted=False)
        # An ended beam has one candidate, itself, which outranks every other and so keeps its place.
        rank = (totals[..., None] + log_probs).masked_fill(ended[..., None], -math.inf)
        rank[..., 0].masked_fill_(ended, math.inf)
        word = word.masked_fill(ended[..., None], words.eos)
        best, candidate = rank.flatten(1).topk(beam_size, sorted=False)
        parent, previous_words = candidate // rank.shape[-1], word.flatten(1).gather(1, candidate)
        had_ended = best == math.inf
        totals = torch.where(had_ended, totals.gather(1, parent), best)
        chosen_log_probs = log_probs.flatten(1).gather(1, candidate).masked_fill(had_ended, 0.0)
        impossible = totals == -math.inf  # fewer sentences exist than there are beams
        ended = (previous_words == words.eos) & ~impossible
        state = output.state.select(parent)
        trace.parent.append(parent)
        trace.word.append(previous_words)
        trace.log_prob.append(chosen_log_probs)
        trace.attention.append(_gather_beams(output.attention, parent))
        if may_stop and bool((ended | impossible).all()):
            break
    return trace.sentences(totals)


def greedy_search(
    step: StepFunction[StateT],
    state: StateT,
    *,
    clips: int,
    max_words: int,
    words: Words,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """For each clip the sentence of the most probable word at each step. `state` holds one sentence per clip."""
    totals = torch.zeros(clips, 1, device=device)
    ended = torch.zeros_like(totals, dtype=torch.bool)
    previous_words = torch.full_like(totals, words.sos, dtype=torch.long)
    parent, trace = torch.zeros_like(previous_words), _Trace()
    for position in range(max_words + 1):
        output = step(previous_words, state)
        log_probs, word = _allowed(output.log_probs, words, position=position, max_words=max_words).max(dim=-1)
        previous_words, chosen_log_probs = word.masked_fill(ended, words.eos), log_probs.masked_fill(ended, 0.0)
        totals, ended, state = totals + chosen_log_probs, previous_words == words.eos, output.state
        trace.parent.append(parent)
        trace.word.append(previous_words)
        trace.log_prob.append(chosen_log_probs)
        trace.attention.append(output.attention)
        if bool(ended.all()):
            break
    return trace.sentences(totals).hypotheses(words.eos)
