"""What the captions of a clip are made of: cleaned sentences, their words, and the vocabulary of many clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from etenet.model.vocabulary import Vocabulary, words

BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def clean_caption(caption: str) -> str:
    """Make every run of white space (line breaks, no-break spaces) and byte order marks one space.

    In MSVD a byte order mark stands where a space should, as in "so cute while it's<BOM>eating". Lone surrogates, the
    halves of characters that a program cut in two, are left out: no file of UTF-8 can hold them.
    """
    whole = caption.encode(errors="ignore").decode()
    return " ".join(whole.replace(BYTE_ORDER_MARK, " ").split())


@dataclass(frozen=True, slots=True)
class Wording:
    """The captions of a clip, cleaned. Captions without a word are dropped."""

    captions: tuple[str, ...]
    word_counts: Counter[str]
    lengths: tuple[int, ...]  # in words, by caption
    dropped: int

    @classmethod
    def of(cls, captions: Sequence[str]) -> Wording:
        tokenized = [(caption, words(caption)) for caption in map(clean_caption, captions)]
        usable = [(caption, tokens) for caption, tokens in tokenized if tokens]
        return cls(
            captions=tuple(caption for caption, _ in usable),
            word_counts=Counter(word for _, tokens in usable for word in tokens),
            lengths=tuple(len(tokens) for _, tokens in usable),
            dropped=len(tokenized) - len(usable),
        )


def vocabulary_of(
    clips: Iterable[tuple[str, Wording]], *, splits: Literal["train", "all"] = "train", minimum_count: int = 1
) -> Vocabulary:
    """The words of (split, captions) pairs: of the training split, or of all."""
    counts: Counter[str] = Counter()
    for split, wording in clips:
        if splits == "all" or split == "train":
            counts.update(wording.word_counts)
    return Vocabulary.from_counts(counts, minimum_count)
