"""Clips that look strange but are valid: each must get a caption."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from tests import clips
from tests.hostile.damage import containers
from tests.hostile.file import HostileFile

_CODECS = {  # codec: container, picture format, size, options
    "libx265": ("mp4", "yuv420p", (96, 64), {"x265-params": "log-level=none"}),
    "libvpx": ("webm", "yuv420p", (96, 64), {"deadline": "realtime"}),
    "libvpx-vp9": ("mp4", "yuv420p", (96, 64), {"deadline": "realtime", "cpu-used": "8"}),
    "libsvtav1": ("mp4", "yuv420p", (96, 64), {"preset": "12"}),
    "mpeg4": ("mov", "yuv420p", (96, 64), {}),
    "mpeg2video": ("mpegts", "yuv420p", (96, 64), {}),
    "mpeg1video": ("mpeg", "yuv420p", (96, 64), {}),
    "h263": ("3gp", "yuv420p", (176, 144), {}),
    "mjpeg": ("avi", "yuvj420p", (96, 64), {}),
    "flv": ("flv", "yuv420p", (96, 64), {}),
    "wmv1": ("asf", "yuv420p", (96, 64), {}),
    "wmv2": ("asf", "yuv420p", (96, 64), {}),
    "gif": ("gif", "rgb8", (96, 64), {}),
}
_PICTURE_FORMATS = {
    "libx264": (
        *("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "nv12", "nv16", "gray"),
        *("yuv420p10le", "yuv422p10le", "yuv444p10le", "gray10le"),
    ),
    "libx265": ("yuv420p10le", "yuv444p12le", "gbrp", "gray"),
    "libvpx-vp9": ("yuva420p", "yuv444p", "gbrp", "yuv422p"),
    "mjpeg": ("yuvj422p", "yuvj444p"),
    "gif": ("gray", "bgr8", "rgb4_byte"),
}
_HOSTILE_TEXTS = {
    "newlines": "a\r\nb\nHTTP/1.1 200 OK\r\n\r\n",
    "markup": "<script>alert(1)</script>",
    "formats": "%s%s%n{0}${jndi:ldap://127.0.0.1/x}",
    "escapes": "\x1b[2J\x07\x08",
    "directions": "\u202egnp.4pm\u2066\ufeff\u0000",
    "a megabyte": "x" * 2**20,
}


def files() -> Iterator[HostileFile]:
    for name, body in (*_kinds(), *_shapes(), *_times(), *_streams()):
        yield HostileFile(name, "accept", body)


def _kinds() -> Iterator[tuple[str, bytes]]:
    for codec, (container, pixels, size, options) in _CODECS.items():
        yield (
            f"{codec} in {container}",
            clips.video(20, codec=codec, container=container, pixels=pixels, size=size, **options),
        )
    for codec, formats in _PICTURE_FORMATS.items():
        container, _, size, options = _CODECS.get(codec, ("mp4", "", (96, 64), {}))
        for pixels in formats:
            body = clips.video(8, codec=codec, container=container, pixels=pixels, size=size, **options)
            yield f"{codec} as {pixels}", body


def _shapes() -> Iterator[tuple[str, bytes]]:
    for size in ((16, 16), (2, 2), (1000, 2), (2, 1000), (4096, 16), (98, 66)):
        yield f"{size[0]} x {size[1]}", clips.video(5, size=size)
    yield "odd numbers of pixels", clips.video(5, size=(97, 63), pixels="yuv444p")
    for name, matrix in (
        ("a quarter turn", (0, 1, -1, 0)),
        ("a half turn", (-1, 0, 0, -1)),
        ("a three-quarter turn", (0, -1, 1, 0)),
        ("a mirror", (-1, 0, 0, 1)),
        ("a matrix of zeros", (0, 0, 0, 0)),
        ("a huge matrix", (32767, 32767, 32767, 32767)),
    ):
        yield f"displayed with {name}", clips.with_display_matrix(clips.video(5), matrix)
    yield "interlaced", clips.video(20, flags="+ildct+ilme", x264__params="tff=1")
    yield "interlaced mpeg2", clips.video(20, codec="mpeg2video", container="mpegts", flags="+ildct+ilme")
    yield "a size that changes midway", containers()["ts"] + clips.video(container="mpegts", size=(160, 120))
    for matrix in ("YCgCo", "ICtCp", "bt2020c", "chroma-derived-nc", "smpte2085", "GBR", "fcc", "undef"):
        yield f"the colour matrix {matrix}", clips.video(5, **{"x264-params": f"colormatrix={matrix}"})
    yield "pixels that are not square", clips.video(5, aspect=Fraction(32, 9))


def _times() -> Iterator[tuple[str, bytes]]:
    yield "one frame", clips.video(1)
    yield "two frames", clips.video(2)
    yield "a variable frame rate", clips.video(20, moments=[number * number for number in range(20)])
    yield "a gap of an hour", clips.video(20, moments=[*range(10), *range(90_000, 90_010)])
    yield "a late first frame", clips.video(20, moments=range(5000, 5020))
    yield "one frame a minute", clips.video(20, moments=range(0, 30_000, 1500))
    yield "negative times", clips.video(20, moments=range(-5, 15))
    yield "no key frame but the first", clips.video(120, g="1000")
    yield "every frame a key frame", clips.video(30, g="1")
    yield "open groups of pictures", clips.video(60, g="12", bf="3", x264__params="open-gop=1")
    yield "many B frames", clips.video(60, bf="16", b_strategy="2")
    yield "a start in the middle", containers()["ts"][188 * 40 :] + clips.video(60, container="mpegts", g="10")
    yield "garbage before the packets", bytes(range(1, 71)) + containers()["ts"]


def _streams() -> Iterator[tuple[str, bytes]]:
    yield "40 streams", _of_streams(videos=40)
    yield "sound first", _of_streams(videos=1, sounds=3)
    audio = _of_streams(videos=1, sounds=1)  # Matroska: TrackType 2 is sound, 17 is subtitles
    yield "subtitles", audio.replace(b"\x83\x81\x02", b"\x83\x81\x11").replace(b"A_AAC", b"S_SSA")
    for name, text in _HOSTILE_TEXTS.items():
        yield f"a title with {name}", _titled(text)
    clip = _titled("a title that is not text")
    yield "a title that is not text", clip.replace(b"title that", b"\xff\xfe\xc3\x28! that")


def _of_streams(*, videos: int, sounds: int = 0) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        audio = [out.add_stream("aac", rate=8000) for _ in range(sounds)]
        video = [out.add_stream("mpeg4", rate=25) for _ in range(videos)]
        for stream in video:
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(5):
            for stream in video:
                frame = av.VideoFrame.from_ndarray(clips.pattern(number, 32, 32), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                out.mux(stream.encode(frame))
            for sound in audio:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate = 8000
                out.mux(sound.encode(silence))
        for stream in (*video, *audio):
            out.mux(stream.encode())
    return file.getvalue()


def _titled(title: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        out.metadata["title"] = title.replace("\0", "")
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.metadata["language"] = title[:64].replace("\0", "")
        for number in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(clips.pattern(number, 32, 32), format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()
