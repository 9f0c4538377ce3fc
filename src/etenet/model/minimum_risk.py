"""Which sentence of a beam to say: the one that agrees best with the probable others, not the most probable one.

Minimum Bayes risk decoding (Kumar and Byrne, NAACL 2004): a sentence's worth is its expected similarity to what may be
right, here to the sentences of its own beam by their probabilities. Before that, a share of the log probability that a
sentence has for a typical clip is taken off (Li et al., arXiv 1510.03055), because "a man is talking" is probable
whatever is shown. On 662 held-out videos of MSR-VTT both together raised CIDEr from .359 to .379. A regression may give
its opinion, too (`word_evidence.py`). A sentence that the network says of many training clips, a habit, counts less: it
says that of whatever it does not understand.

Sentences that say two words in a row twice, such as "a horse is riding a horse", come last. (Paulus et al., arXiv
1705.04304, never say three twice; a caption is shorter than a summary.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from etenet.model.config import check_number
from etenet.model.hypothesis import Hypothesis
from etenet.model.vocabulary import EOS_ID
from etenet.model.word_evidence import WordEvidence, log_ratio

LONGEST_NGRAM = 4
REPEATED = 2  # words in a row that no sentence should have twice
POWER = 0.5  # of the probabilities: a beam holds few sentences, and the best of them too much of the probability
PRIOR_WEIGHT = 0.25
EVIDENCE_WEIGHT = 0.4
HABIT_WEIGHT = 0.5
RARE = 0.0075  # a sentence that is said of no larger share of the clips is no habit

LogProbs = Callable[[NDArray[np.float32], Sequence[Sequence[int]]], list[float]]
"""Of each sentence, its end included, for a clip whose frames all have this feature (D,)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MinimumRisk:
    """Of one checkpoint. `typical` are the mean features of many clips."""

    typical: NDArray[np.float32]  # (D,)
    power: float = POWER
    prior_weight: float = PRIOR_WEIGHT
    evidence: WordEvidence | None = None
    evidence_weight: float = EVIDENCE_WEIGHT
    habits: Mapping[tuple[int, ...], float] = field(default_factory=dict)  # a sentence -> share of clips it is said of
    habit_weight: float = HABIT_WEIGHT

    def __post_init__(self) -> None:
        if self.typical.dtype != np.float32 or not np.isfinite(self.typical).all():
            raise ValueError("its typical features are no numbers, or not finite")
        check_number("power", self.power, 0)
        check_number("prior_weight", self.prior_weight)
        check_number("evidence_weight", self.evidence_weight)
        check_number("habit_weight", self.habit_weight)
        for share in self.habits.values():
            check_number("habits", share, 0, 1)
        if self.evidence and self.evidence.feature_size != len(self.typical):
            raise ValueError(f"its word evidence is for {self.evidence.feature_size} features, not {len(self.typical)}")

    def compared(
        self, log_probs: LogProbs, means: NDArray[np.float32], beams: Sequence[Sequence[Hypothesis]]
    ) -> list[list[Hypothesis]]:
        """The beams of B clips with mean features (B, D), each sentence with what `order` needs."""
        sentences = sorted({hypothesis.words for beam in beams for hypothesis in beam})
        typical = dict(zip(sentences, log_probs(self.typical, sentences), strict=True)) if sentences else {}
        compared = [[replace(one, typical_log_prob=typical[one.words]) for one in beam] for beam in beams]
        if not self.evidence:
            return compared
        shares = self.evidence.shares(means, [[one.words for one in beam] for beam in compared])
        return [
            [replace(one, shares=of_one) for one, of_one in zip(beam, of_beam, strict=True)]
            for beam, of_beam in zip(compared, shares, strict=True)
        ]

    def order(self, beam: Sequence[Hypothesis]) -> list[int]:
        """The numbers of the sentences of a beam that was `compared`, the one to say first."""
        logs = [self.power * self._log_weight(one) for one in beam]
        weights = [math.exp(log - max(logs)) for log in logs]
        ngrams = [_ngrams(one.words) for one in beam]
        worth = [
            sum(weight * _similarity(of_one, other) for weight, other in zip(weights, ngrams, strict=True))
            for of_one in ngrams
        ]
        repeats = [any(count > 1 for count in of_one[REPEATED - 1].values()) for of_one in ngrams]
        return sorted(range(len(beam)), key=lambda number: (repeats[number], -worth[number]))

    def _log_weight(self, one: Hypothesis) -> float:
        prior, evidence = one.typical_log_prob or 0.0, log_ratio(one.shares)
        habit = math.log(max(self.habits.get(one.words, 0.0) / RARE, 1.0))
        return one.log_prob - self.prior_weight * prior + self.evidence_weight * evidence - self.habit_weight * habit


def habits(said: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Of what a checkpoint says of each of many clips, the sentences of more than `RARE` of them."""
    shares = {words: count / len(said) for words, count in Counter(said).items()}
    return {words: share for words, share in shares.items() if share > RARE}


def _ngrams(words: Sequence[int]) -> list[Counter[tuple[int, ...]]]:
    """The n-grams of each order up to `LONGEST_NGRAM`; the end of the sentence counts as a word."""
    ended = [*words, EOS_ID]
    return [
        Counter(tuple(ended[at : at + order]) for at in range(len(ended) - order + 1))
        for order in range(1, LONGEST_NGRAM + 1)
    ]


def _similarity(one: Sequence[Counter[tuple[int, ...]]], other: Sequence[Counter[tuple[int, ...]]]) -> float:
    """The mean over the orders of the F1 score of shared n-grams; 1 where neither sentence has any."""
    scores = []
    for mine, theirs in zip(one, other, strict=True):
        total = mine.total() + theirs.total()
        scores.append(2 * (mine & theirs).total() / total if total else 1.0)
    return sum(scores) / len(scores)
