"""FFmpeg's filters on a few frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
from av.filter import Graph


def filtered(frames: Sequence[av.VideoFrame], name: str, arguments: str) -> Iterator[av.VideoFrame]:
    """What a filter makes of consecutive frames of one size and format. Takes no more of them than it needs.

    Raises `av.FFmpegError` if the filter cannot be applied to such frames.
    """
    graph = Graph()
    graph.threads = 1  # a sandboxed process may start none
    first = frames[0]
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 1000))
    graph.link_nodes(source, graph.add(name, arguments), graph.add("buffersink")).configure()
    for frame in (*frames, None):
        graph.vpush(frame)
        try:
            while True:
                yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            continue
