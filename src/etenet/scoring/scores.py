"""Captions and references -> BLEU-1..4, METEOR, ROUGE-L and CIDEr, as the field computes them (pycocoevalcap 1.2).

That library's traps are closed here: a line break inside a caption shifts every later one in its tokenizer, which
also writes into its own package's folder; METEOR takes `|||` in a caption for the next caption, stops where decimals
have a comma, and its Java outlives us. References are scored as they are: they never go through a model's vocabulary.

Two conventions exist on MSVD: "ptb" for raw captions, "none" for references that are lower case and without
punctuation already. Knows no model and no file.
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

# Against hanging, not against being slow: METEOR alone took minutes to start on a machine that trained meanwhile.
_JAVA_START_DEADLINE_S = 900.0
_JAVA_SENTENCE_DEADLINE_S = 0.1


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of the whole set, and of each clip. The set's BLEU and METEOR are not the means of the clips'."""

    overall: Figures
    per_clip: dict[str, Figures]
    tokenizer: Tokenizer


class Scorer:
    """Scores any number of prediction sets against references that are tokenised once.

    CIDEr weighs words by how rare they are among the references of all clips: figures of different sets do not
    compare, and one clip alone scores 0 (Vedantam et al., CVPR 2015). METEOR starts a Java program that takes 1.2 GB
    and seconds of processor time each time; `meteor=False` leaves it out.
    """

    def __init__(self, references: Captions, *, tokenizer: Tokenizer = "ptb", meteor: bool = True) -> None:
        self.tokenizer = tokenizer
        self.meteor = meteor
        tokenized = tokenize(references, tokenizer)
        # A reference without a word would still count among the references in CIDEr, and match an empty caption.
        self.references = {clip: [said for said in sentences if said] for clip, sentences in tokenized.items()}
        if wordless := [clip for clip, sentences in self.references.items() if not sentences]:
            raise UsageError(f"there is no reference with a word in it for {named(wordless)}; leave these clips out")

    def score(self, predictions: Captions) -> Scores:
        """Score one caption per clip; the clips must be those that have references."""
        self._check(predictions)
        said = tokenize({clip: predictions[clip] for clip in self.references}, self.tokenizer)
        overall: Figures = {}
        per_clip: dict[str, Figures] = {clip: {} for clip in said}
        for measure, (figure, of_clips) in self._measure(said).items():
            overall[measure] = float(figure)
            for clip, of_clip in zip(said, of_clips, strict=True):
                per_clip[clip][measure] = float(of_clip)
        return Scores(overall, per_clip, self.tokenizer)

    def _check(self, predictions: Captions) -> None:
        if not predictions:
            raise UsageError("there is no prediction to score")
        if predictions.keys().isdisjoint(self.references):
            raise UsageError(
                f"predictions and references name no clip in common: {named(predictions)} in the one, "
                f"{named(self.references)} in the other; make the names the same"
            )
        if unknown := [clip for clip in predictions if clip not in self.references]:
            raise UsageError(f"no reference for {named(unknown)}; add references or leave these predictions out")
        if missing := [clip for clip in self.references if clip not in predictions]:
            raise UsageError(f"no prediction for {named(missing)}; caption these clips or leave their references out")
        if several := [clip for clip, sentences in predictions.items() if len(sentences) != 1]:
            raise UsageError(f"not exactly one prediction for {named(several)}; give one for each clip")

    def _measure(self, said: Tokenized) -> dict[str, tuple[float, Sequence[float]]]:
        """measure -> (figure of the set, figures of the clips)."""
        with _pycocoevalcap_needed():
            from pycocoevalcap.bleu.bleu import Bleu
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge

        bleu, bleu_of_clips = Bleu().compute_score(self.references, said, verbose=0)
        return {
            **{f"BLEU-{n}": of_n for n, of_n in enumerate(zip(bleu, bleu_of_clips, strict=True), start=1)},
            **({"METEOR": _meteor(self.references, said)} if self.meteor else {}),
            "ROUGE-L": Rouge().compute_score(self.references, said),
            "CIDEr": Cider().compute_score(self.references, said),
        }


def score(predictions: Captions, references: Captions, *, tokenizer: Tokenizer = "ptb") -> Scores:
    """`Scorer(references).score(predictions)`, for references that are needed once."""
    return Scorer(references, tokenizer=tokenizer).score(predictions)


def tokenize(captions: Captions, tokenizer: Tokenizer) -> Tokenized:
    """Captions as the measures read them: words parted by single spaces, on one line."""
    lines = {clip: [" ".join(sentence.split()) for sentence in sentences] for clip, sentences in captions.items()}
    if tokenizer == "none":
        return lines
    rest = iter(_ptb(list(chain.from_iterable(lines.values()))))
    return {clip: [next(rest) for _ in sentences] for clip, sentences in lines.items()}


def _ptb(lines: Sequence[str]) -> list[str]:
    """Stanford's PTBTokenizer as COCO uses it: lower case, punctuation dropped."""
    with _pycocoevalcap_needed():
        from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    tokenized = java.output(
        "the PTB tokenizer",
        ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
        "".join(f"{line}\n" for line in lines),
        deadline_s=_deadline_s(len(lines)),
    )
    # Not splitlines(): a caption may hold what Python takes for the end of a line and Java does not.
    *sentences, end = tokenized.split("\n")
    if end or len(sentences) != len(lines):
        raise JavaError(f"the PTB tokenizer gave {len(sentences)} sentences for {len(lines)}: none can be relied on")
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in sentence.split() if word not in punctuation) for sentence in sentences]


def _meteor(references: Tokenized, said: Tokenized) -> tuple[float, list[float]]:
    """METEOR 1.5, English, normalised (Denkowski and Lavie, 2014): (figure of the set, figures of the clips)."""
    with _pycocoevalcap_needed():
        from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    deadline_s = _deadline_s(len(said) + sum(map(len, references.values())))
    with java.dialogue("METEOR", arguments, deadline_s=deadline_s) as program:
        statistics = [program.ask(_joined("SCORE", *references[clip], *said[clip])) for clip in said]
        answers = [program.ask(_joined("EVAL", *statistics)), *(program.next_line() for _ in said)]
    try:
        *of_clips, of_set = map(float, answers)
    except ValueError as error:
        raise JavaError(f"METEOR answered {error}") from error
    return of_set, of_clips


def _joined(*parts: str) -> str:
    """A line of METEOR's protocol. Parts must not look like several, and an empty last one stays a part."""
    return " ||| ".join(part.replace("|||", " ") for part in parts)


def _deadline_s(sentences: int) -> float:
    return _JAVA_START_DEADLINE_S + _JAVA_SENTENCE_DEADLINE_S * sentences


@contextmanager
def _pycocoevalcap_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError("scores need pycocoevalcap; install it with: pip install 'etenet[train]'") from error
