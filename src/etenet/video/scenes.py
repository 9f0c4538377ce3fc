"""Frames of a video in a row -> with which of them another scene begins, by FFmpeg's own scene score.

Source: FFmpeg's filter `select`, the variable `scene`: how much two frames differ, beyond what the two before them did.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat
from numpy.typing import NDArray

COMPARED_PX = 64  # both sides of what is compared: noise is gone, and it takes no time
CHANGED = 0.3  # of 1; FFmpeg advises 0.3 to 0.5


class SceneChanges:
    """Is shown the frames of a video, in order."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=COMPARED_PX, height=COMPARED_PX, format=VideoFormat("rgb24"), time_base=Fraction(1, 1000)
        )
        chosen = self._graph.add("select", f"gt(scene,{CHANGED})")
        self._graph.link_nodes(source, chosen, self._graph.add("buffersink")).configure()
        self._shown = 0

    def begins_with(self, pixels: NDArray[np.uint8]) -> bool:
        """pixels (COMPARED_PX, COMPARED_PX, 3), RGB."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        frame.pts, frame.time_base = self._shown, Fraction(1, 1000)
        self._shown += 1
        self._graph.push(frame)
        try:
            self._graph.pull()
        except av.BlockingIOError:
            return False
        return True
