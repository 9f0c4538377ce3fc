"""H.264 whose frames are coded as two fields, as camcorders write it and no encoder at hand does.

Each macroblock holds its samples as they are (I_PCM), so there is nothing to predict or transform. Source: ITU-T H.264,
clauses 7.3 (syntax) and 9.1 (Exp-Golomb codes).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
from numpy.typing import NDArray

from tests.numbered import RATE, picture

WIDE, HIGH = 6, 4  # macroblocks of a frame
GROUP = 12  # frames from one key frame to the next
TIME_BASE = Fraction(1, 90_000)
FRAME_TICKS = TIME_BASE.denominator // RATE
MAIN_PROFILE, LEVEL_3 = 77, 30
SPS, PPS, SLICE, KEY_SLICE = 7, 8, 1, 5
P_SLICE, I_SLICE = 5, 7
PCM = {I_SLICE: 25, P_SLICE: 30}  # mb_type


class Bits:
    """Of a NAL unit, the most significant first."""

    def __init__(self) -> None:
        self._bits: list[str] = []

    def fixed(self, width: int, *values: int) -> Bits:
        self._bits += [f"{value:0{width}b}" for value in values]
        return self

    def golomb(self, *values: int) -> Bits:
        for value in values:
            digits = f"{value + 1:b}"
            self._bits.append("0" * (len(digits) - 1) + digits)
        return self

    def aligned(self) -> Bits:
        self._bits.append("0" * (-sum(map(len, self._bits)) % 8))
        return self

    def nal(self, kind: int, *, is_reference: bool = True) -> bytes:
        bits = "".join(self.fixed(1, 1).aligned()._bits)
        body = int(bits, 2).to_bytes(len(bits) // 8)
        for zero in (b"\0\0\3", b"\0\0\0", b"\0\0\1", b"\0\0\2"):
            body = body.replace(zero, b"\0\0\3" + zero[2:])
        return b"\0\0\0\1" + bytes([2 * is_reference << 5 | kind]) + body


def _headers() -> bytes:
    sps = Bits().fixed(8, MAIN_PROFILE, 0, LEVEL_3).golomb(0, 4, 2, 2).fixed(1, 0).golomb(WIDE - 1, HIGH // 2 - 1)
    sps.fixed(1, 0, 0, 1, 0, 1, 0, 0, 0, 0).fixed(1, 1).fixed(32, 1, 2 * RATE).fixed(1, 1, 0, 0, 0, 0)
    pps = Bits().golomb(0, 0).fixed(1, 0, 0).golomb(0, 0, 0).fixed(1, 0).fixed(2, 0).golomb(0, 0, 0).fixed(1, 0, 0, 0)
    return sps.nal(SPS) + pps.nal(PPS)


def _slice(
    planes: Sequence[NDArray[np.uint8]], number: int, *, frame_num: int, field: int | None, intra: bool
) -> bytes:
    """Of a frame, or of its top (0) or bottom (1) field. Odd frames but key frames are no reference."""
    is_key, kind = intra and not field, I_SLICE if intra else P_SLICE
    is_reference = intra or number % 2 == 0
    bits = Bits().golomb(0, kind, 0).fixed(8, frame_num)
    bits.fixed(1, 0) if field is None else bits.fixed(1, 1, field)
    if is_key:
        bits.golomb(number // GROUP % 2)
    if not intra:
        bits.fixed(1, 0, 0)
    if is_reference:
        bits.fixed(1, *(0, 0) if is_key else (0,))
    bits.golomb(0)
    planes = [plane if field is None else plane[field::2] for plane in planes]
    for row in range(len(planes[0]) // 16):
        for column in range(WIDE):
            bits.golomb(PCM[kind]) if intra else bits.golomb(0, PCM[kind])
            bits.aligned()
            for plane, px in zip(planes, (16, 8, 8), strict=True):
                block = plane[row * px : (row + 1) * px, column * px : (column + 1) * px]
                bits.fixed(8, *np.maximum(block, 1).ravel().tolist())
    return bits.nal(KEY_SLICE if is_key else SLICE, is_reference=is_reference)


@lru_cache
def frames(count: int, *, every_nth_whole: int = 0) -> list[list[bytes]]:
    """The access units of numbered frames: two fields of each, or one whole picture of every n-th frame."""
    listed, frame_num = [], 0
    for number in range(count):
        intra = number % GROUP == 0
        frame_num = 0 if intra else frame_num
        pixels = picture(number, (WIDE * 16, HIGH * 16))
        planar = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in planar.planes]
        whole = bool(every_nth_whole) and number % every_nth_whole == 0
        units = [
            _slice(planes, number, frame_num=frame_num, field=field, intra=intra)
            for field in ((None,) if whole else (0, 1))
        ]
        listed.append([_headers() + units[0], *units[1:]] if intra else units)
        frame_num += intra or number % 2 == 0
    return listed


def muxed(units: Sequence[Sequence[bytes]], container: str, *, fields_apart: bool) -> bytes:
    """A packet for each field, or only for each frame (so does AVCHD; FFmpeg takes it apart again)."""
    everything = b"".join(unit for frame in units for unit in frame)
    file = io.BytesIO()
    with av.open(io.BytesIO(everything), format="h264") as source, av.open(file, "w", format=container) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.time_base = TIME_BASE
        for number, frame in enumerate(units):
            for place, data in enumerate(frame if fields_apart else [b"".join(frame)]):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, TIME_BASE
                packet.pts = packet.dts = number * FRAME_TICKS + place * FRAME_TICKS // 2
                packet.duration = FRAME_TICKS // len(frame) if fields_apart else FRAME_TICKS
                packet.is_keyframe = number % GROUP == 0 and place == 0
                out.mux(packet)
    return file.getvalue()
