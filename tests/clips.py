"""Clips that tests render: moving patterns in which every frame differs."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from etenet.video.filters import filtered


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


def spoil(file: Path) -> None:
    """Make it unreadable, though it looks unchanged: whoever reads it again will notice."""
    found = file.stat()
    file.write_bytes(bytes(found.st_size))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def video(
    count: int = 40,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    pictures: Sequence[NDArray[np.uint8]] = (),
    fields: str = "prog",
    moments: Sequence[int] | None = None,
    movflags: str = "",
    aspect: Fraction | None = None,
    **options: str,
) -> bytes:
    """`count` patterns, or the given `pictures`, at 25 per second or at the given `moments` (in units of 1/25 s).

    `aspect` is that of a pixel.
    `fields`: "prog", or "tff" or "bff" to flag frames as interlaced (FFmpeg's filter `setfield`).
    """
    file, muxing = io.BytesIO(), {"movflags": movflags} if movflags else {}
    with same_scheduling(), av.open(file, "w", format=container, options=muxing) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = Fraction(1, 25)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(len(pictures) or count):
            picture = pictures[number] if pictures else pattern(number, *size)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            (frame,) = filtered([frame], "setfield", fields)
            frame.pts, frame.time_base = (moments[number] if moments else number), Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def after_the_first_key_frame() -> bytes:
    """A broadcast, joined late. FFmpeg gives up before the next key frame and says 0 x 0 pixels."""
    packet = 188  # bytes; ISO/IEC 13818-1
    return video(250, container="mpegts", g="200", preset="ultrafast", sc_threshold="0")[20 * packet :]


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


def with_sound(*, picture_starts_s: float, container: str, clock_starts_s: float = 0.0) -> bytes:
    """Two seconds of pictures, and sound from the start of the file to their end. It is 10 ms early (priming)."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        sound = out.add_stream("mp2", rate=48000, layout="mono")
        stream = out.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(round(48000 / 1152 * (picture_starts_s + 2))):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts = 48000, round(48000 * clock_starts_s) + 1152 * number
            samples.time_base = Fraction(1, 48000)
            out.mux(sound.encode(samples))
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(pattern(number, 96, 64), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number + round(25 * (clock_starts_s + picture_starts_s)), Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        out.mux(sound.encode())
    return file.getvalue()


def with_crop(mp4: bytes, size: tuple[int, int], *, left: int, right: int, top: int, bottom: int) -> bytes:
    """The same .mp4, of a video of this size, with a clean aperture (ISO/IEC 14496-12, 12.1.4)."""
    shown = size[0] - left - right, 1, size[1] - top - bottom, 1
    return _with_box(mp4, b"clap", struct.pack(">8i", *shown, left - right, 2, top - bottom, 2))


def with_pixel_aspect(mp4: bytes, aspect: Fraction) -> bytes:
    """The same .mp4, whose container says which shape pixels have (ISO/IEC 14496-12, 12.1.4)."""
    return _with_box(mp4, b"pasp", struct.pack(">2i", aspect.numerator, aspect.denominator))


def with_dolby_vision(mp4: bytes, profile: int, compatibility: int) -> bytes:
    """The same .mp4 with a configuration record (Dolby Vision Streams Within the ISOBMFF, 3.2)."""
    level, has_metadata, has_base_layer = 6, 1 << 2, 1
    bits = profile << 9 | level << 3 | has_metadata | has_base_layer
    return _with_box(mp4, b"dvcC", struct.pack(">BBHB19x", 1, 0, bits, compatibility << 4))


def _with_box(mp4: bytes, name: bytes, content: bytes) -> bytes:
    """The same .mp4, whose index is at its end, with one more box in the description of its only stream."""
    box = struct.pack(">I4s", 8 + len(content), name) + content
    starts = [mp4.index(parent) - 4 for parent in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")]
    entry = starts[-1] + 16
    (size,) = struct.unpack_from(">I", mp4, entry)
    longer = bytearray(mp4)
    for start in (*starts, entry):
        struct.pack_into(">I", longer, start, struct.unpack_from(">I", mp4, start)[0] + len(box))
    return bytes(longer[: entry + size] + box + longer[entry + size :])


def remuxed(body: bytes, container: str) -> bytes:
    """The same packets, and what the container says about them, in another container."""
    file = io.BytesIO()
    options = {"strict": "unofficial"}  # for Dolby Vision
    with av.open(io.BytesIO(body)) as source, av.open(file, "w", format=container, options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return file.getvalue()
