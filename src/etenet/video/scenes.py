"""Consecutive frames -> the frames at which a new scene begins, by FFmpeg's own scene score.

Source: FFmpeg's filter `select`, variable `scene`: how much two frames differ, less how much the two before them did.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat
from numpy.typing import NDArray

COMPARED_PX = 64  # width and height of the compared pictures: small ones have little noise and cost little
SCENE_THRESHOLD = 0.3  # of 1; FFmpeg advises 0.3 to 0.5


class SceneChanges:
    """Takes the frames of a video in order."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=COMPARED_PX, height=COMPARED_PX, format=VideoFormat("rgb24"), time_base=Fraction(1, 1000)
        )
        select = self._graph.add("select", f"gt(scene,{SCENE_THRESHOLD})")
        self._graph.link_nodes(source, select, self._graph.add("buffersink")).configure()
        self._frames = 0

    def begins_with(self, pixels: NDArray[np.uint8]) -> bool:
        """Whether a scene begins with this frame. pixels (COMPARED_PX, COMPARED_PX, 3) RGB."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1, 1000)
        self._frames += 1
        self._graph.push(frame)
        try:
            self._graph.pull()
        except av.BlockingIOError:
            return False
        return True
