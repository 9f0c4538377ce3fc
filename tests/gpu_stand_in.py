"""A stand-in for a GPU's decoder in PyAV, built on FFmpeg's software decoder.

Frames come back as NV12 or P010 with their metadata. `alter` may change the frames that come back; `before` runs before
a file is opened. The stand-in records how files were opened, how codecs were set, and how often they were called.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import av
from av.codec.hwaccel import HWAccel

Frames = list[av.VideoFrame]
_open = av.open


class StandIn:
    def __init__(
        self, alter: Callable[[Frames], Any] = lambda frames: frames, before: Callable[[], object] = lambda: None
    ) -> None:
        self.alter, self.before = alter, before
        self.accelerators: list[HWAccel] = []
        self.keywords: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.decode_calls = 0

    def open(self, file: io.BytesIO, *mode: str, hwaccel: HWAccel | None = None, **keywords: Any) -> Any:
        """Replaces `av.open`."""
        if hwaccel is None:
            return _open(file, *mode, **keywords)
        self.before()
        self.accelerators.append(hwaccel)
        self.keywords.append(keywords)
        return _Container(_open(file, *mode, **keywords), self)


class Context:
    is_hwaccel = True
    pix_fmt = "cuda"

    def __init__(self, real: av.VideoCodecContext, stand_in: StandIn) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_stand_in", stand_in)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._stand_in.settings[name] = value
        setattr(self._real, name, value)

    def decode(self, packet: av.Packet | None) -> Any:
        self._stand_in.decode_calls += 1
        return self._stand_in.alter([_downloaded(frame) for frame in self._real.decode(packet)])


class _Stream:
    def __init__(self, real: av.VideoStream, stand_in: StandIn) -> None:
        self.real = real
        self.codec_context = Context(real.codec_context, stand_in)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _Container:
    def __init__(self, real: Any, stand_in: StandIn) -> None:
        self._real, self.streams = real, self
        self.video = [_Stream(stream, stand_in) for stream in real.streams.video]
        self.close, self.start_time = real.close, real.start_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def demux(self, streams: list[_Stream]) -> Iterator[Any]:
        return self._real.demux([stream.real for stream in streams])


def _downloaded(frame: av.VideoFrame) -> av.VideoFrame:
    return frame.reformat(format="p010le" if "10" in frame.format.name else "nv12", threads=1)
