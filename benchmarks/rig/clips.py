"""Clips of any length and size, rendered here: waves that drift one way, grain that drifts another way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

FRAMES_PER_S = 25
_GROUP = 50  # frames, two seconds


def drifting(seconds: float, width: int, height: int) -> bytes:
    """H.264 in MP4. Two seconds are encoded once and then repeated, so a long clip takes no longer than a short one."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FRAMES_PER_S, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        group = [packet for frame in _two_seconds(width, height) for packet in stream.encode(frame)]
        group += stream.encode()
        unit = group[0].time_base
        length = int(Fraction(_GROUP, FRAMES_PER_S) / unit)
        for turn in range(max(1, round(seconds * FRAMES_PER_S / _GROUP))):
            for packet in group:
                assert packet.pts is not None
                assert packet.dts is not None
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, unit, packet.is_keyframe
                copy.pts, copy.dts = packet.pts + turn * length, packet.dts + turn * length
                out.mux(copy)
    return file.getvalue()


def _two_seconds(width: int, height: int) -> Iterator[av.VideoFrame]:
    y, x = np.mgrid[0:height, 0:width]
    waves = (90 + 50 * np.sin(x / 23) + 30 * np.sin(y / 17)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 12, (height, width), dtype=np.uint8)
    for number in range(_GROUP):
        picture = np.roll(waves, (2 * number, -3 * number), axis=(0, 1)) + np.roll(noise, 7 * number, axis=1)
        frame = av.VideoFrame.from_ndarray(picture, format="gray").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_S)
        yield frame
