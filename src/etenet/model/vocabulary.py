"""Text <-> words <-> ids. Knows nothing of tensors, models or files.

Only splitting text needs nltk, which training does and serving does not: nltk is imported when the first text is split,
because it brings its whole tree, and scipy and scikit-learn where they are installed (2 s).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

SOS, EOS, UNKNOWN = "<SOS>", "<EOS>", "<UNK>"
SOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2

# What Treebank's rules split: the end of a contraction from its word, and these words in two.
_CONTRACTION_ENDS = frozenset(["n't", "'s", "'m", "'d", "'ll", "'re", "'ve"])
_HALVES = frozenset(
    [
        *(("can", "not"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("wan", "na")),
        *(("more", "'n"), ("d", "'ye"), ("'t", "is"), ("'t", "was")),
    ]
)


def words(text: str) -> list[str]:
    """Lower case, Treebank tokens, tokens of punctuation only dropped.

    >>> words("A man isn't singing.")
    ['a', 'man', 'is', "n't", 'singing']
    """
    tokens = _tokenizer().tokenize(text.lower())
    return [token for token in tokens if any(character.isalnum() for character in token)]


def sentence(tokens: Sequence[str]) -> str:
    """Words as a person would write them: the inverse of `words`, up to case and punctuation."""
    parts = list(tokens[:1])
    for before, token in pairwise(tokens):
        is_joined = token in _CONTRACTION_ENDS or (before, token) in _HALVES
        parts.append(token if is_joined else f" {token}")
    return "".join(parts)


@cache
def _tokenizer() -> Any:
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


class Vocabulary:
    """The words that a model knows. Ids 0, 1, 2 are <SOS>, <EOS>, <UNK>; words follow, most frequent first."""

    def __init__(self, known_words: Iterable[str]) -> None:
        self.known_words = tuple(known_words)
        if len(set(self.known_words)) != len(self.known_words):
            repeated = [word for word, count in Counter(self.known_words).items() if count > 1]
            raise ValueError(f"a vocabulary names each word once; repeated: {repeated[:5]}")
        if special := {SOS, EOS, UNKNOWN} & set(self.known_words):
            raise ValueError(f"{sorted(special)} are added by the vocabulary itself; leave them out")
        if blank := [word for word in self.known_words if word.split() != [word]]:
            raise ValueError(f"a word is not empty and has no blanks; these are none: {blank[:5]}")
        "".join(self.known_words).encode()  # a lone surrogate could not be sent

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, minimum_count: int = 1) -> Vocabulary:
        """Words that occur at least `minimum_count` times, most frequent first, ties in alphabetical order."""
        return cls.from_counts(Counter(word for caption in captions for word in words(caption)), minimum_count)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], minimum_count: int = 1) -> Vocabulary:
        """The same from word counts."""
        frequent = [word for word, count in counts.items() if count >= minimum_count]
        return cls(sorted(frequent, key=lambda word: (-counts[word], word)))

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        return (SOS, EOS, UNKNOWN, *self.known_words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self._tokens)}

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.known_words == other.known_words

    def __hash__(self) -> int:
        return hash(self.known_words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.known_words)} words)"

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, unknown ones as <UNK>, without <SOS> and <EOS>."""
        return [self._ids.get(word, UNKNOWN_ID) for word in words(text)]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The words behind ids, up to the first <EOS>."""
        tokens: list[str] = []
        for number in ids:
            if number == EOS_ID:
                break
            tokens.append(self._tokens[number])
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to a sentence, up to the first <EOS>."""
        return sentence(self.tokens(ids))
