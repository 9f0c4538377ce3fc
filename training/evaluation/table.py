"""The paper's table: a row for each baseline and each step of training. Knows neither clips nor networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MEASURES = ("CIDEr", "METEOR", "BLEU-4", "ROUGE-L")
HEADINGS = ("", *MEASURES, "distinct captions", "most frequent caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`captions` by video. `checkpoint` is sha256:..., or None for a baseline."""

    name: str
    captions: Mapping[str, str]
    scores: Mapping[str, float]
    checkpoint: str | None = None

    @property
    def distinct_captions(self) -> int:
        return len(set(self.captions.values()))

    @property
    def most_frequent_share(self) -> float:
        """The share of the clips that have the most frequent caption."""
        ((_, count),) = Counter(self.captions.values()).most_common(1)
        return count / len(self.captions)

    @property
    def cells(self) -> tuple[str, ...]:
        """Under `HEADINGS`. Scores and shares are in percent."""
        scores = (f"{100 * self.scores[name]:.1f}" if name in self.scores else "-" for name in MEASURES)
        return (self.name, *scores, str(self.distinct_captions), f"{100 * self.most_frequent_share:.1f} %")

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "scores": dict(self.scores),
            "distinct_captions": self.distinct_captions,
            "most_frequent_share": self.most_frequent_share,
        }


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *(row.cells for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)
