"""CIDEr-D of many sentences at once, over the ids of their words: the reward of self-critical training.

Source: Vedantam, Zitnick, Parikh, CVPR 2015, as `pycocoevalcap` computes it (clipped counts, a Gaussian of the
difference in length with sigma 6, times 10), for which a test holds the two together. Each n-gram of the references
gets a number and its tf-idf weights once; a call looks up the n-grams of all its sentences with binary searches.

A sentence's <EOS> counts as a word of it. Without that, a sentence that breaks off at "a" loses nothing (Rennie et al.,
arXiv 1612.00563, section 5). Knows no network, no text and no randomness.

Shapes: N clips, R references per clip (the most), S sentences, T words of the longest.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from etenet.errors import UsageError
from etenet.model.vocabulary import EOS_ID, Vocabulary

LONGEST_NGRAM = 4
SIGMA = 6.0
SCALE = 10.0
MOST_WORDS = 55_108  # in the vocabulary, so that an int64 holds four of them

Ids = NDArray[np.int64]
Weights = NDArray[np.float64]
ClipT = TypeVar("ClipT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Grams:
    """The n-grams of one order in all references: their idf, and their tf-idf weights in each reference."""

    numbers: Ids  # (G,) sorted: the words of an n-gram as one number
    idf: Weights  # (G,)
    unknown_idf: float  # of an n-gram in no reference
    pairs: Ids  # (P,) sorted: clip * G + n-gram, for the n-grams of each clip
    starts: Ids  # (P + 1,) where the references with the n-gram of a pair begin in the next two
    references: Ids  # number of the reference within its clip
    weights: Weights
    norms: Weights  # (N, R), of the references' vectors; 1 where there is no reference or its vector is zero


class CiderD(Generic[ClipT]):
    """Scores sentences against the references of their clips. Document frequencies are those of all these clips."""

    def __init__(self, references: Mapping[ClipT, Sequence[Sequence[int]]], vocabulary_size: int) -> None:
        """Clip -> its references, each the ids of its words without <EOS>."""
        if vocabulary_size > MOST_WORDS:
            raise UsageError(
                f"the vocabulary has {vocabulary_size} words, the reward takes {MOST_WORDS}; prepare the data with a "
                "larger --minimum-count"
            )
        self._vocabulary_size = vocabulary_size
        self._clips = {clip: number for number, clip in enumerate(references)}
        counts = np.array([len(of_clip) for of_clip in references.values()])
        words, lengths = ended([sentence for of_clip in references.values() for sentence in of_clip])
        of_clip, number = np.repeat(np.arange(len(counts)), counts), _within(counts)
        self._exists = np.arange(counts.max()) < counts[:, None]  # (N, R)
        self._lengths = np.zeros(self._exists.shape)  # (N, R)
        self._lengths[of_clip, number] = lengths
        self._grams = [
            _grams_of(*self._counted(words, lengths, order), of_clip, number, self._exists.shape)
            for order in range(1, LONGEST_NGRAM + 1)
        ]

    @classmethod
    def from_captions(cls, captions: Mapping[ClipT, Sequence[str]], vocabulary: Vocabulary) -> CiderD[ClipT]:
        """Clip -> its captions. Words that the vocabulary lacks are one word, which no sentence has."""
        encoded = {clip: [vocabulary.encode(caption) for caption in of_clip] for clip, of_clip in captions.items()}
        return cls(encoded, len(vocabulary))

    def score(self, clips: Sequence[ClipT], words: Ids, lengths: Ids) -> Weights:
        """The clip of each of S sentences, ids (S, T), their numbers of words, <EOS> included -> scores (S,)."""
        clip = np.array([self._clips[name] for name in clips])
        similarity = np.zeros((len(clip), self._exists.shape[1]))  # (S, R)
        for order, grams in enumerate(self._grams, start=1):
            similarity += _cosines(grams, *self._counted(words, lengths, order), clip)
        apart = lengths[:, None] - self._lengths[clip]
        similarity *= np.exp(-(apart**2) / (2 * SIGMA**2)) * self._exists[clip]
        result: Weights = SCALE / LONGEST_NGRAM * similarity.sum(1) / self._exists[clip].sum(1)
        return result

    def _counted(self, words: Ids, lengths: Ids, order: int) -> tuple[Ids, Ids, Ids]:
        """The n-grams of sentences (S, T): (sentence, number of the n-gram, count), each pair once, sorted."""
        places = max(words.shape[1] - order + 1, 0)
        numbers = np.zeros((len(words), places), dtype=np.int64)
        for word in range(order):
            numbers = numbers * self._vocabulary_size + words[:, word : word + places]
        sentence, place = np.nonzero(np.arange(places) <= (lengths - order)[:, None])
        number = numbers[sentence, place]
        by_sentence = np.lexsort((number, sentence))
        sentence, number = sentence[by_sentence], number[by_sentence]
        first = np.flatnonzero(np.r_[True, (np.diff(sentence) != 0) | (np.diff(number) != 0)][: len(sentence)])
        return sentence[first], number[first], np.diff(np.r_[first, len(sentence)])


def ended(sentences: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """S sentences without their ends -> ids (S, T), filled up with <EOS>, and their numbers of words with one <EOS>."""
    lengths = np.array([len(sentence) + 1 for sentence in sentences])
    words = np.full((len(sentences), lengths.max()), EOS_ID)
    for row, sentence in enumerate(sentences):
        words[row, : len(sentence)] = sentence
    return words, lengths


def _grams_of(
    reference: Ids, number: Ids, count: Ids, of_clip: Ids, number_in_clip: Ids, shape: tuple[int, ...]
) -> _Grams:
    """From the counted n-grams of all references, and the clip and the number in it of each reference."""
    numbers, gram = np.unique(number, return_inverse=True)
    pair = of_clip[reference] * len(numbers) + gram
    by_pair = np.argsort(pair, kind="stable")
    pairs, starts = np.unique(pair[by_pair], return_index=True)
    frequency = np.bincount(pairs % max(len(numbers), 1), minlength=len(numbers))  # clips with the n-gram
    idf = np.log(shape[0]) - np.log(np.maximum(frequency, 1))
    weights = count * idf[gram]
    squares = np.zeros(shape)
    np.add.at(squares, (of_clip[reference], number_in_clip[reference]), weights**2)
    return _Grams(
        numbers=numbers,
        idf=idf,
        unknown_idf=float(np.log(shape[0])),
        pairs=pairs,
        starts=np.r_[starts, len(pair)],
        references=number_in_clip[reference][by_pair],
        weights=weights[by_pair],
        norms=_norms(squares),
    )


def _cosines(grams: _Grams, sentence: Ids, number: Ids, count: Ids, clip: Ids) -> Weights:
    """The counted n-grams of S sentences and the clip of each -> similarity to each reference (S, R)."""
    gram, known = _found(grams.numbers, number)
    weight = count * np.where(known, grams.idf[gram] if len(grams.idf) else 0.0, grams.unknown_idf)
    norms = _norms(np.bincount(sentence, weight**2, minlength=len(clip)))
    pair, shared = _found(grams.pairs, clip[sentence] * len(grams.numbers) + gram)
    shared &= known
    sentence, weight, pair = sentence[shared], weight[shared], pair[shared]
    references = grams.starts[pair + 1] - grams.starts[pair]  # that have the n-gram
    at = np.repeat(grams.starts[pair], references) + _within(references)
    reference_weight = grams.weights[at]
    product = np.minimum(np.repeat(weight, references), reference_weight) * reference_weight
    shape = (len(clip), grams.norms.shape[1])
    bins = np.repeat(sentence, references) * shape[1] + grams.references[at]
    sums = np.bincount(bins, product, minlength=shape[0] * shape[1]).reshape(shape)
    cosines: Weights = sums / (norms[:, None] * grams.norms[clip])
    return cosines


def _found(among: Ids, wanted: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """Where sorted `among` has each wanted value, and whether it has it."""
    if not len(among):
        return np.zeros_like(wanted), np.zeros(len(wanted), dtype=bool)
    at = np.searchsorted(among, wanted).clip(max=len(among) - 1)
    return at, among[at] == wanted


def _norms(squares: NDArray[Any]) -> Weights:
    """Lengths of vectors, 1 for those of length 0: pycocoevalcap divides by neither."""
    norms: Weights = np.sqrt(squares)
    return np.where(norms > 0, norms, 1.0)


def _within(counts: Ids) -> Ids:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
