"""How likely a sentence is to be good, from the beam that it was found in: a logistic regression with a few numbers.

`training.calibrate` fits the numbers on clips that the network was not trained on, and the checkpoint carries them.
Knows neither frames nor words, only what a search leaves behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etenet.model.config import WIDEST_BEAM, check_number, check_whole
from etenet.model.hypothesis import Hypothesis
from etenet.model.word_evidence import informed_share

VERSION = 3
FEATURES = ("mean_log_prob", "opening_log_prob", "beam_log_prob", "gain", "informed_share")
FEATURES_OF_VERSION = {2: FEATURES[:-1], VERSION: FEATURES}  # which can be read
OPENING_WORDS = 2  # usually "a man", "a group": who or what it is


def features_of(sentence: Hypothesis, others: Sequence[Hypothesis]) -> dict[str, float]:
    """By the names of `FEATURES`: what is known of a sentence beside other sentences for the same clip.

    mean_log_prob      over all words and the end
    opening_log_prob   of the first `OPENING_WORDS`
    beam_log_prob      of all these sentences together
    gain               log_prob above that for a typical clip; 0 if that is unknown
    informed_share     of the words, by a regression on the clip's features; 0 if that is unknown
    """
    highest = max(one.log_prob for one in (sentence, *others))
    together = sum(math.exp(one.log_prob - highest) for one in (sentence, *others))
    typical = sentence.typical_log_prob
    return {
        "mean_log_prob": sentence.log_prob / len(sentence.word_log_probs),
        "opening_log_prob": sum(sentence.word_log_probs[:OPENING_WORDS]),
        "beam_log_prob": highest + math.log(together),
        "gain": 0.0 if typical is None else sentence.log_prob - typical,
        "informed_share": informed_share(sentence.shares),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Of one checkpoint. `weights` has a number for each feature; `beam_size` is that of the beams it is for.

    The features of a sentence depend on how many others it is compared with. So a narrower beam gives no confidence,
    and of a wider one only the `beam_size` - 1 most probable others count.
    """

    weights: Mapping[str, float]
    bias: float
    beam_size: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if set(self.weights) != set(FEATURES_OF_VERSION.get(self.version, ())):
            raise ValueError(f"its confidence has version {self.version}, this etenet reads 2 to {VERSION}")
        for value in (*self.weights.values(), self.bias):
            check_number("a weight of its confidence", value)
        check_whole("the beam size of its confidence", self.beam_size, 1, WIDEST_BEAM)

    def confidence(self, sentence: Hypothesis, beam: Sequence[Hypothesis]) -> float:
        """The probability that a sentence of a beam (best first) is good: between 0 and 1, with 4 digits."""
        others = [other for other in beam if other is not sentence][: self.beam_size - 1]
        features = features_of(sentence, others)
        logit = self.bias + sum(weight * features[name] for name, weight in self.weights.items())
        return round(0.5 + 0.5 * math.tanh(0.5 * logit), 4)
