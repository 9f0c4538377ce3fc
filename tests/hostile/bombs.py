"""Small files that grow large when they are decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from tests import clips
from tests.hostile.file import HostileFile

_LARGEST = 65535


def files() -> Iterator[HostileFile]:
    for width, height in ((_LARGEST, _LARGEST), (_LARGEST, 200), (4097, 2304), (30000, 30000)):
        yield HostileFile(
            f"a gif of {width} x {height}", "reject" if width * height > 4096 * 2304 else "either", gif(width, height)
        )
    yield HostileFile("a gif of 5,000 frames", "either", gif(16, 16, frames=5000))
    yield HostileFile("a png of 30000 x 30000", "reject", png(30000, 30000))
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(jpeg, "jpeg")
    yield HostileFile("a jpeg of 65500 x 65500", "reject", _jpeg_of(jpeg.getvalue(), 65500, 65500))
    for container in ("avi", "mov"):
        mjpeg = clips.video(3, codec="mjpeg", container=container, pixels="yuvj420p")
        yield HostileFile(f"mjpeg of 65500 x 65500 in {container}", "reject", _jpeg_of(mjpeg, 65500, 65500))
        yield HostileFile(f"mjpeg of 4097 x 2304 in {container}", "reject", _jpeg_of(mjpeg, 4097, 2304))
    vp8 = clips.video(3, codec="libvpx", container="webm", deadline="realtime")
    yield HostileFile("vp8 of 16383 x 16383", "reject", _vp8_of(vp8, 16383, 16383))
    yield HostileFile(
        "y4m of 65535 x 65535", "reject", b"YUV4MPEG2 W65535 H65535 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(4096)
    )
    yield HostileFile("zeros", "reject", bytes(8 << 20))
    yield HostileFile("compressed zeros", "reject", zlib.compress(bytes(64 << 20), 9))
    yield HostileFile("one small clip, 400 times", "either", clips.video(2, container="mpegts") * 400)
    yield HostileFile("twenty seconds of decoding", "reject", still_that_must_be_decoded(4096, 2304, frames=4000))


def gif(width: int, height: int, frames: int = 3) -> bytes:
    """GIF89a: a large screen, and pictures that fill it with one colour (LZW codes: clear, end)."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    picture = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return screen + (picture + b"\x02\x02\x44\x01\x00") * frames + b";"


def still_that_must_be_decoded(width: int, height: int, frames: int) -> bytes:
    """MPEG-4 in AVI: a black picture, then many pictures of "no change", each of which needs the one before."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height = width, height
        black = av.VideoFrame.from_ndarray(np.zeros((height, width), np.uint8), format="gray").reformat(
            format="yuv420p"
        )
        black.pts = 0
        (picture,) = stream.encode(black)
        black.pts = 1
        (unchanged,) = stream.encode(black)
        out.mux(picture)
        for number in range(1, frames):
            again = av.Packet(bytes(unchanged))
            again.stream, again.time_base, again.pts, again.dts = stream, unchanged.time_base, number, number
            out.mux(again)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes((width // 8 + 2) * height), 9))
        + chunk(b"IEND", b"")
    )


def _jpeg_of(holder: bytes, width: int, height: int) -> bytes:
    """The file with every start-of-frame marker claiming another size."""
    changed, at = bytearray(holder), -1
    while (at := holder.find(b"\xff\xc0\x00\x11\x08", at + 1)) >= 0:
        changed[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(changed)


def _vp8_of(holder: bytes, width: int, height: int) -> bytes:
    """The file with every key frame claiming another size (RFC 6386, 9.1)."""
    changed, at = bytearray(holder), -1
    while (at := holder.find(b"\x9d\x01\x2a", at + 1)) >= 0:
        changed[at + 3 : at + 7] = struct.pack("<HH", width, height)
    return bytes(changed)
