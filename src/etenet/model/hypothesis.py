"""What a search finds: sentences with their probabilities. Plain values, whatever computed them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """The ids that a search must know: start and end of a sentence, and the words that are never chosen."""

    sos: int
    eos: int
    never: tuple[int, ...] = ()


WORDS = Words(sos=SOS_ID, eos=EOS_ID, never=(UNKNOWN_ID,))  # of every `Vocabulary`


class WordShare(NamedTuple):
    """Of the captions of a clip, the share that has a word: as expected of this clip, and usually."""

    here: float
    usual: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sentence. `word_log_probs` has one entry per word and one for the end; `log_prob` is their sum."""

    words: tuple[int, ...]
    word_log_probs: tuple[float, ...]
    log_prob: float
    attention: tuple[tuple[float, ...], ...]  # per word, the weight of each frame
    typical_log_prob: float | None = None  # its log_prob for a typical clip, if that is known
    shares: tuple[WordShare, ...] = ()  # of its different words, if they are known

    def score(self, length_penalty: float = 0.0) -> float:
        """log_prob / length ** length_penalty; the length counts the end."""
        length = float(len(self.word_log_probs))
        return self.log_prob / math.pow(length, length_penalty)


def best_first(
    words: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    attention: Sequence[Sequence[Sequence[float]]],
    totals: Sequence[float],
    *,
    eos: int,
) -> list[Hypothesis]:
    """The sentences of one clip out of the words (K, T) of a search, `totals` (K,); -inf: there is no such sentence."""
    found = []
    for beam, total in enumerate(totals):
        if total > -math.inf:
            length = words[beam].index(eos)
            weights = tuple(tuple(frames) for frames in attention[beam][:length])
            found.append(Hypothesis(tuple(words[beam][:length]), tuple(log_probs[beam][: length + 1]), total, weights))
    return sorted(found, key=Hypothesis.score, reverse=True)
