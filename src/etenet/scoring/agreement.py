"""Whether a cheaper form of a network still says what the exact form says. Knows captions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from etenet.errors import counted
from etenet.scoring.scores import Captions, Scorer

LEAST_AGREEMENT = 0.98  # of the captions, where no references say how good they are
MOST_LOST_POINTS = 0.5  # of CIDEr, where they do

_POINTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The captions of both forms for the same clips, compared.

    `as_good` counts captions that differ and whose own CIDEr is not lower. `cider_points` are those of the exact form
    and of the other one. Both need references.
    """

    clips: int
    same: int
    as_good: int = 0
    cider_points: tuple[float, float] | None = None

    @property
    def share(self) -> float:
        """Of the clips, those with the same caption or one that is as good."""
        return (self.same + self.as_good) / self.clips

    def reaches(self, least: float | None) -> bool:
        """Whether the share is at least so large, and CIDEr at most `MOST_LOST_POINTS` lower.

        None stands for `LEAST_AGREEMENT` without references; with them CIDEr decides alone.
        """
        if self.cider_points:
            exact, cheaper = self.cider_points
            return exact - cheaper <= MOST_LOST_POINTS and self.share >= (least or 0)
        return self.share >= (LEAST_AGREEMENT if least is None else least)

    def __str__(self) -> str:
        share = f"{self.same} of {counted(self.clips, 'held-out clip')} ({100 * self.same / self.clips:.1f} %)"
        text = f"{share} keep their caption"
        if self.cider_points:
            exact, cheaper = self.cider_points
            text += f", {self.as_good} get one as good; CIDEr {cheaper:.1f} instead of {exact:.1f}"
        return text


def compare(exact: Mapping[str, str], cheaper: Mapping[str, str], references: Captions | None = None) -> Agreement:
    """Captions of the same clips, at least one. Raises `UsageError` if references lack a clip."""
    changed = [clip for clip, caption in exact.items() if cheaper[clip] != caption]
    clips, same = len(exact), len(exact) - len(changed)
    if references is None:
        return Agreement(clips=clips, same=same)
    scorer = Scorer(references, meteor=False)
    before, after = (
        scorer.score({clip: [caption] for clip, caption in captions.items()}) for captions in (exact, cheaper)
    )
    return Agreement(
        clips=clips,
        same=same,
        as_good=sum(after.per_clip[clip]["CIDEr"] >= before.per_clip[clip]["CIDEr"] for clip in changed),
        cider_points=(_POINTS * before.overall["CIDEr"], _POINTS * after.overall["CIDEr"]),
    )
