"""Clips that tests render: moving patterns in which every frame differs."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray


def pattern(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """An RGB picture (height, width, 3) that depends on its number, with a different colour in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    wave = np.stack([x * 3 + number * 11, y * 5 + number * 7, (x + y) * 2 - number * 13], axis=-1)
    picture = (wave % 256).astype(np.uint8)
    low, wide = max(1, height // 4), max(1, width // 4)
    for rows, columns, colour in (
        (slice(0, low), slice(0, wide), (255, 0, 0)),
        (slice(0, low), slice(-wide, None), (0, 255, 0)),
        (slice(-low, None), slice(0, wide), (0, 0, 255)),
        (slice(-low, None), slice(-wide, None), (255, 255, 0)),
    ):
        picture[rows, columns] = colour
    return picture


def video(
    count: int = 40,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    moments: Sequence[int] | None = None,
    movflags: str = "",
    **options: str,
) -> bytes:
    """`count` frames at 25 per second, or at the given `moments` (in units of 1/25 s)."""
    file, muxing = io.BytesIO(), {"movflags": movflags} if movflags else {}
    with same_scheduling(), av.open(file, "w", format=container, options=muxing) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(pattern(number, *size), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (moments[number] if moments else number), Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def film(parts: Sequence[bytes], *, part_s: float, size: tuple[int, int] = (320, 240)) -> bytes:
    """Videos joined without loss. Each begins `part_s` after the one before it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, part in enumerate(parts):
            with av.open(io.BytesIO(part)) as source:
                for frame in source.decode(video=0):
                    shown = frame.reformat(*size, format="yuv420p")
                    shown.pts, shown.time_base = round(1000 * (number * part_s + frame.time)), Fraction(1, 1000)
                    shown.pict_type = av.video.frame.PictureType.NONE
                    out.mux(stream.encode(shown))
        out.mux(stream.encode())
    return file.getvalue()


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 does: the thread that calls it keeps real-time scheduling (SCHED_FIFO, 99).

    A server started from that thread would inherit it and leave no time on its cores to other processes.
    """
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)


def audio_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    return file.getvalue()


def with_display_matrix(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The same .mp4 with the linear part (a, b, c, d) of its display matrix set (ISO/IEC 14496-12, 8.3.2)."""
    at = mp4.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[at + 36 :]


def png() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pattern(0, 32, 32), format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()
