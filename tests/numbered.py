"""Clips whose pictures carry their number and a colour in each corner, muxed in all the ways that files come.

Eight squares in the middle, two rows of four, are the bits of the number, the most significant last, bright = 1.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from tests.clips import same_scheduling

RATE = 25
SIZE = (96, 64)
CORNERS = ((220, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20))

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": (
        "libx264",
        {"preset": "ultrafast", "x264-params": "keyint=12:bframes=3:b-pyramid=none:scenecut=0:b-adapt=0"},
    ),
    "h264, open": (
        "libx264",
        {"preset": "ultrafast", "x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0:b-adapt=0"},
    ),
    "h264, pyramid": (
        "libx264",
        {"preset": "ultrafast", "x264-params": "keyint=15:bframes=5:b-pyramid=normal:open-gop=1:scenecut=0:b-adapt=0"},
    ),
    "h264, refresh": ("libx264", {"preset": "ultrafast", "x264-params": "keyint=20:intra-refresh=1:bframes=0"}),
    "hevc": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:bframes=3:open-gop=0:scenecut=0"},
    ),
    "hevc, open": (
        "libx265",
        {
            "preset": "ultrafast",
            "x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=4:open-gop=1:scenecut=0:b-adapt=0",
        },
    ),
    "hevc, radl": (
        "libx265",
        {
            "preset": "ultrafast",
            "x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=4:open-gop=0:radl=2:scenecut=0",
        },
    ),
    "mpeg2video": ("mpeg2video", {"bf": "2", "g": "12", "qmax": "4"}),
    "mpeg4": ("mpeg4", {"bf": "2", "g": "12", "qmax": "4"}),
    "h263": ("h263", {"g": "12", "qmax": "4"}),
    "vp8": ("libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"g": "12", "preset": "8", "crf": "15"}),
    "mjpeg": ("mjpeg", {"qmax": "4"}),
}


def picture(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """An RGB picture (height, width, 3)."""
    width, height = size
    drawn = np.full((height, width, 3), 128, np.uint8)
    drawn[:, :, 1] = np.linspace(90, 160, width, dtype=np.uint8)
    low, wide = height // 4, width // 4
    for rows, columns, colour in zip(
        (slice(0, low), slice(0, low), slice(-low, None), slice(-low, None)),
        (slice(0, wide), slice(-wide, None)) * 2,
        CORNERS,
        strict=True,
    ):
        drawn[rows, columns] = colour
    for bit, (x, y, right, bottom) in enumerate(_squares(width, height)):
        drawn[y:bottom, x:right] = 235 if number >> bit & 1 else 20
    return drawn


def number_in(pixels: NDArray[np.uint8]) -> int:
    """The number of a picture of any size."""
    height, width, _ = pixels.shape
    bright = [
        pixels[
            (3 * y + bottom) // 4 : (y + 3 * bottom) // 4 + 1, (3 * x + right) // 4 : (x + 3 * right) // 4 + 1
        ].mean()
        > 128
        for x, y, right, bottom in _squares(width, height)
    ]
    return sum(1 << bit for bit in range(8) if bright[bit])


def _squares(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each bit's."""
    corners = [(column * width // 4, row * height // 4) for row in (1, 2) for column in range(4)]
    return [(x, y, x + width // 4, y + height // 4) for x, y in corners]


@lru_cache(maxsize=64)
def encoded(
    kind: str, count: int = 60, *, first: int = 0, size: tuple[int, int] = SIZE, container: str = "mp4"
) -> bytes:
    """Pictures from number `first` on, at 25 per second."""
    codec, options = ENCODERS[kind]
    file = io.BytesIO()
    with same_scheduling(), av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(first, first + count):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts = number - first
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """A video stream of a file, from packet `skip` on, on a clock that begins at `offset_s`."""

    source: bytes
    skip: int = 0
    offset_s: float = 0.0
    flags: Disposition | None = None


def muxed(container: str, *tracks: Track, **options: str) -> bytes:
    file, packets = io.BytesIO(), []
    with av.open(file, "w", format=container, options=options) as out:
        for track in tracks:
            with av.open(io.BytesIO(track.source)) as given:
                taken = given.streams.video[0]
                stream = out.add_stream_from_template(taken, opaque=True)
                if track.flags is not None:
                    stream.disposition = track.flags
                every = [packet for packet in given.demux(taken) if packet.size]
                begins = every[track.skip].dts or 0
                for packet in every[track.skip :]:
                    shift = round(track.offset_s / packet.time_base) - begins
                    assert packet.pts is not None
                    assert packet.dts is not None
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packets.append((packet.dts * packet.time_base, packet, stream))
        for _, packet, stream in sorted(packets, key=lambda each: each[0]):
            packet.stream = stream
            out.mux(packet)
    return file.getvalue()


def with_edit_list(mp4: bytes, frames: int) -> bytes:
    """The same .mp4, of which the last entry of its edit list skips so many frames more (ISO/IEC 14496-12, 8.6.6)."""
    at = mp4.index(b"elst") + 8
    (entries,) = struct.unpack(">i", mp4[at : at + 4])
    at += 4 + 12 * (entries - 1)
    duration, media_time = struct.unpack(">ii", mp4[at : at + 8])
    with av.open(io.BytesIO(mp4)) as container:
        tick_s = container.streams.video[0].time_base
    assert tick_s is not None
    edited = struct.pack(">ii", duration - round(frames * 1000 / RATE), media_time + round(frames / RATE / tick_s))
    return mp4[:at] + edited + mp4[at + 8 :]


def with_edits(mp4: bytes, *edits: tuple[float, float]) -> bytes:
    """The same .mp4, whose index is at its end, with these parts in this order: start and length in seconds."""
    with av.open(io.BytesIO(mp4)) as container:
        tick_s = container.streams.video[0].time_base
    assert tick_s is not None
    at = mp4.index(b"elst") - 4
    (size,) = struct.unpack_from(">I", mp4, at)
    begins = struct.unpack_from(">i", mp4, at + size - 8)[0]
    entries = (struct.pack(">IiI", round(1000 * long_s), begins + round(s / tick_s), 1 << 16) for s, long_s in edits)
    box = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits)) + b"".join(entries)
    longer = bytearray(mp4)
    for parent in (b"moov", b"trak", b"edts"):
        start = mp4.index(parent) - 4
        struct.pack_into(">I", longer, start, struct.unpack_from(">I", mp4, start)[0] + len(box) - size)
    return bytes(longer[:at] + box + longer[at + size :])


def flv_whose_clock_steps(flv: bytes, packets: int, by_ms: int) -> bytes:
    """The same .flv, whose clock changes after so many packets. Source: Adobe Flash Video File Format, E.3 and E.4."""
    stepped, at, count = bytearray(flv), 13, 0
    while at < len(flv):
        (size,) = struct.unpack(">I", b"\0" + flv[at + 1 : at + 4])
        if count >= packets:
            (ms,) = struct.unpack(">I", flv[at + 7 : at + 8] + flv[at + 4 : at + 7])
            after = struct.pack(">I", ms + by_ms)
            stepped[at + 4 : at + 8] = after[1:] + after[:1]
        count += flv[at] == 9 and flv[at + 12] != 0  # pictures, not the header of H.264
        at += size + 15
    return bytes(stepped)


def matroska_without_pts(transport_stream: bytes, fourcc: bytes, *, skip: int = 0) -> bytes:
    """The packets in a track for Video for Windows: its times are those of decoding (Matroska, V_MS/VFW/FOURCC)."""
    with av.open(io.BytesIO(transport_stream)) as given:
        packets = [packet for packet in given.demux(video=0) if packet.size][skip:]
    header = struct.pack("<IiiHH4sIiiII", 40, *SIZE, 1, 24, fourcc, 0, 0, 0, 0, 0)
    track = _element(
        "AE",
        *(_element(name, bytes([1])) for name in ("D7", "73C5", "83")),
        _element("86", b"V_MS/VFW/FOURCC"),
        _element("63A2", header),
        _element("E0", _element("B0", bytes([SIZE[0]])), _element("BA", bytes([SIZE[1]]))),
    )
    blocks = [
        _element("A3", b"\x81" + struct.pack(">hB", number * 1000 // RATE, 0x80 * packet.is_keyframe) + bytes(packet))
        for number, packet in enumerate(packets)
    ]
    info = _element("1549A966", _element("2AD7B1", struct.pack(">I", 1_000_000)))
    cluster = _element("1F43B675", _element("E7", bytes([0])), *blocks)
    return _element("1A45DFA3", _element("4282", b"matroska")) + _element(
        "18538067", info, _element("1654AE6B", track), cluster
    )


def encrypted_webm() -> bytes:
    """A track of noise behind signal bytes that say so. Source: WebM Encryption, 4.1 and 4.4."""
    encryption = _element("5035", _element("47E1", b"\5"), _element("47E2", b"0123456789abcdef"))
    encoding = _element("6240", _element("5031", b"\0"), _element("5032", b"\1"), _element("5033", b"\1"), encryption)
    track = _element(
        "AE",
        *(_element(name, bytes([1])) for name in ("D7", "73C5", "83")),
        _element("86", b"V_VP9"),
        _element("E0", _element("B0", bytes([SIZE[0]])), _element("BA", bytes([SIZE[1]]))),
        _element("6D80", encoding),
    )
    noise = np.random.default_rng(0).bytes(500)
    blocks = [_element("A3", b"\x81" + struct.pack(">hB", 40 * number, 0x80) + b"\1" + noise) for number in range(9)]
    info = _element("1549A966", _element("2AD7B1", struct.pack(">I", 1_000_000)))
    cluster = _element("1F43B675", _element("E7", bytes([0])), *blocks)
    return _element("1A45DFA3", _element("4282", b"webm")) + _element(
        "18538067", info, _element("1654AE6B", track), cluster
    )


def _element(name: str, *contents: bytes) -> bytes:
    body = b"".join(contents)
    return bytes.fromhex(name) + (1 << 56 | len(body)).to_bytes(8, "big") + body
