"""A decoded clip: 16 frames, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_CLIP = 16  # L of the paper


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """What is known about the frames of a clip. Times are seconds from the first frame of the video."""

    times_s: tuple[float, ...]  # of the frames
    distinct_frames: int
    codec: str
    width_px: int
    height_px: int
    shown_aspect: float  # width / height of the pictures as players show them, turned upright
    duration_s: float  # of the whole video
    picture_start_s: float  # of the first frame, in seconds from the start of the file, as players count
    start_s: float  # of the part that the frames are from
    end_s: float
    decode_ms: float  # for all segments of the video together


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, or one segment of it. frames (16, resize_px, resize_px, 3) uint8 RGB."""

    frames: NDArray[np.uint8]
    info: ClipInfo
