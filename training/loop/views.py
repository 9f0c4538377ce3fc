"""The views of a clip: all of its frames as they are, or mirrored, or a part of them. All frames of a clip share one.

An encoder that learns sees a new view at every look. The features of a frozen one are cached, so a clip has a fixed
number of views then, which are numbered. Number 0 is the clip as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from training.data.datasets import DatasetClip


class Crop(NamedTuple):
    """A part of all frames of a clip, in shares of their height and width."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True, slots=True)
class View:
    """In a `mirrored` one left and right are swapped."""

    crop: Crop | None = None
    mirrored: bool = False


WHOLE = View()


def numbered_view(clip: DatasetClip, number: int, *, smallest_crop: float) -> View:
    """Always the same for a clip and a number. Those with an odd number are mirrored."""
    if number == 0:
        return WHOLE
    rng = np.random.default_rng([number, clip.part, clip.row])
    return View(drawn_crop(smallest_crop, rng), mirrored=number % 2 == 1)


def drawn_crop(smallest: float, rng: np.random.Generator) -> Crop | None:
    """At least the share `smallest` of height and of width. They are drawn apart, so that shapes vary too."""
    if smallest == 1:
        return None
    height, width = rng.uniform(smallest, 1.0, 2)
    top, left = rng.random(2) * (1 - height, 1 - width)
    return Crop(top, left, height, width)


def seen(frames: Tensor, view: View) -> Tensor:
    """Frames (L, px, px, 3) uint8 as the view shows them, at the same size. A crop is cut to the nearest pixel."""
    if view.crop:
        size_px = frames.shape[1]
        top, left, height, width = (round(share * size_px) for share in view.crop)
        part = frames[:, top : top + height, left : left + width].movedim(-1, 1).float()
        whole = nn.functional.interpolate(part, (size_px, size_px), mode="bilinear")
        frames = whole.round_().to(frames.dtype).movedim(1, -1)
    return frames.flip(-2) if view.mirrored else frames
