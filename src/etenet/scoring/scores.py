"""Captions and references -> BLEU-1..4, METEOR, ROUGE-L and CIDEr, as the field computes them (pycocoevalcap 1.2).

This module avoids that library's traps. In its tokenizer, a line break inside a caption shifts every later caption, and
it writes into its own package's folder. Its METEOR takes `|||` in a caption for the next caption, fails in locales with
a decimal comma, and its Java process outlives the caller. References never go through a model's vocabulary.

Two conventions exist on MSVD: "ptb" for raw captions, "none" for references that are already in lower case and without
punctuation. Knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from etenet import java
from etenet.errors import JavaError, UsageError, named

Tokenizer = Literal["ptb", "none"]
TOKENIZERS: tuple[Tokenizer, ...] = get_args(Tokenizer)
Captions = Mapping[str, Sequence[str]]  # video id -> sentences
Tokenized = dict[str, list[str]]  # the types that pycocoevalcap insists on
Figures = dict[str, float]  # measure -> fraction (CIDEr: up to 10)

# Against hanging, not against being slow: on a machine that was training, METEOR took minutes to start.
_JAVA_START_DEADLINE_S = 900.0
_JAVA_SENTENCE_DEADLINE_S = 0.1


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the whole set and of each clip. BLEU and METEOR of the set are not the means over its clips."""

    overall: Figures
    per_clip: dict[str, Figures]
    tokenizer: Tokenizer


class Scorer:
    """Scores any number of prediction sets against references that are tokenised once.

    CIDEr weighs words by how rare they are in the references of all clips, so scores of different sets cannot be
    compared, and a single clip scores 0 (Vedantam et al., CVPR 2015). Each call starts METEOR, a Java program that
    takes 1.2 GB and seconds of processor time; `meteor=False` leaves it out.
    """

    def __init__(self, references: Captions, *, tokenizer: Tokenizer = "ptb", meteor: bool = True) -> None:
        self.tokenizer = tokenizer
        self.meteor = meteor
        tokenized = tokenize(references, tokenizer)
        # CIDEr would count a reference without words as a reference, and an empty caption would match it.
        self.references = {clip: [words for words in sentences if words] for clip, sentences in tokenized.items()}
        if wordless := [clip for clip, sentences in self.references.items() if not sentences]:
            raise UsageError(f"no reference of {named(wordless)} has a word; remove these clips")

    def score(self, predictions: Captions) -> Scores:
        """Score one caption per clip. The clips must be the ones that have references."""
        self._check(predictions)
        captions = tokenize({clip: predictions[clip] for clip in self.references}, self.tokenizer)
        overall: Figures = {}
        per_clip: dict[str, Figures] = {clip: {} for clip in captions}
        for measure, (figure, of_clips) in self._measure(captions).items():
            overall[measure] = float(figure)
            for clip, of_clip in zip(captions, of_clips, strict=True):
                per_clip[clip][measure] = float(of_clip)
        return Scores(overall, per_clip, self.tokenizer)

    def _check(self, predictions: Captions) -> None:
        if not predictions:
            raise UsageError("there is no prediction to score; give one for each clip")
        if predictions.keys().isdisjoint(self.references):
            raise UsageError(
                f"predictions and references have no clip in common: {named(predictions)} against "
                f"{named(self.references)}; use the same names in both"
            )
        if unknown := [clip for clip in predictions if clip not in self.references]:
            raise UsageError(f"no reference for {named(unknown)}; add references or remove these predictions")
        if missing := [clip for clip in self.references if clip not in predictions]:
            raise UsageError(f"no prediction for {named(missing)}; caption these clips or remove their references")
        if several := [clip for clip, sentences in predictions.items() if len(sentences) != 1]:
            raise UsageError(f"not exactly one prediction for {named(several)}; give one per clip")

    def _measure(self, captions: Tokenized) -> dict[str, tuple[float, Sequence[float]]]:
        """measure -> (score of the set, scores of the clips)."""
        with _pycocoevalcap_needed():
            from pycocoevalcap.bleu.bleu import Bleu
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge

        bleu, bleu_of_clips = Bleu().compute_score(self.references, captions, verbose=0)
        return {
            **{f"BLEU-{n}": of_n for n, of_n in enumerate(zip(bleu, bleu_of_clips, strict=True), start=1)},
            **({"METEOR": _meteor(self.references, captions)} if self.meteor else {}),
            "ROUGE-L": Rouge().compute_score(self.references, captions),
            "CIDEr": Cider().compute_score(self.references, captions),
        }


def score(predictions: Captions, references: Captions, *, tokenizer: Tokenizer = "ptb") -> Scores:
    """`Scorer(references).score(predictions)`, for references that are used once."""
    return Scorer(references, tokenizer=tokenizer).score(predictions)


def tokenize(captions: Captions, tokenizer: Tokenizer) -> Tokenized:
    """Captions as the measures read them: words on one line, with single spaces between them."""
    lines = {clip: [" ".join(sentence.split()) for sentence in sentences] for clip, sentences in captions.items()}
    if tokenizer == "none":
        return lines
    rest = iter(_ptb(list(chain.from_iterable(lines.values()))))
    return {clip: [next(rest) for _ in sentences] for clip, sentences in lines.items()}


def _ptb(lines: Sequence[str]) -> list[str]:
    """Stanford's PTBTokenizer as COCO uses it: lower case, without punctuation."""
    with _pycocoevalcap_needed():
        from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    tokenized = java.output(
        "the PTB tokenizer",
        ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
        "".join(f"{line}\n" for line in lines),
        deadline_s=_deadline_s(len(lines)),
    )
    # Not splitlines(): a caption may contain what Python takes for the end of a line and Java does not.
    *sentences, end = tokenized.split("\n")
    if end or len(sentences) != len(lines):
        raise JavaError(f"the PTB tokenizer returned {len(sentences)} sentences for {len(lines)}; please report this")
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in sentence.split() if word not in punctuation) for sentence in sentences]


def _meteor(references: Tokenized, captions: Tokenized) -> tuple[float, list[float]]:
    """METEOR 1.5, English, normalised (Denkowski and Lavie, 2014): (score of the set, scores of the clips)."""
    with _pycocoevalcap_needed():
        from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    deadline_s = _deadline_s(len(captions) + sum(map(len, references.values())))
    with java.dialogue("METEOR", arguments, deadline_s=deadline_s) as program:
        statistics = [program.ask(_joined("SCORE", *references[clip], *captions[clip])) for clip in captions]
        replies = [program.ask(_joined("EVAL", *statistics)), *(program.next_line() for _ in captions)]
    try:
        *of_clips, of_set = map(float, replies)
    except ValueError as error:
        raise JavaError(f"METEOR returned no number ({error}); please report this") from error
    return of_set, of_clips


def _joined(*parts: str) -> str:
    """A line of METEOR's protocol. A part must not look like several; an empty last part still is one."""
    return " ||| ".join(part.replace("|||", " ") for part in parts)


def _deadline_s(sentences: int) -> float:
    return _JAVA_START_DEADLINE_S + _JAVA_SENTENCE_DEADLINE_S * sentences


@contextmanager
def _pycocoevalcap_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError("scores need pycocoevalcap; install it with: pip install 'etenet[train]'") from error
