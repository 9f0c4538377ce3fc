"""Packets -> frames in presentation order, within the limits. Knows no file, nor which frames are wanted, or why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeAlias

import av
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext

from etenet.errors import TooManyPixels
from etenet.video.deinterlacing import FIELD_ORDERS
from etenet.video.ffmpeg import CODEC_WHITELIST
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.packet_runs import TimedPacket
from etenet.video.pictures import check_memory

VideoPacket: TypeAlias = "av.Packet[VideoStream]"

_CODECS_THAT_SKIP = ("h264", "hevc")  # can skip frames that no other depends on; the others stay bit-exact
_CODECS_WITH_FIELDS = ("h264",)  # whose packets may hold one field of a frame, as those of AVCHD do
_CODECS_THAT_INVENT = ("mpeg4", "h263", "flv1", "wmv1", "wmv2")  # what a frame depends on; the others show nothing


class Decoder:
    """A decoder of a stream, for one thread.

    `size_px` is what the header says until a frame has come, then the size of the first. `interlaced`: the header says
    so, or a frame that has come. `skips`: frames that are neither wanted nor needed by another are left out of a run.
    `invents`: without the key frame before it, a frame is shown all the same, and wrong. `pair_s`: how long a frame is
    shown that comes in two packets, a field each; 0 if the codec has none, or does not say.
    """

    def __init__(self, context: VideoCodecContext, *, limits: DecodeLimits, stopwatch: Stopwatch) -> None:
        self.limits, self.stopwatch = limits, stopwatch
        self._context = context
        self.skips = context.codec.canonical_name in _CODECS_THAT_SKIP
        self.invents = context.codec.canonical_name in _CODECS_THAT_INVENT
        pairs = context.codec.canonical_name in _CODECS_WITH_FIELDS
        self.pair_s = float(1 / context.framerate) if pairs and context.framerate else 0.0
        self.size_px = context.width, context.height
        self._has_frame = False
        self._check_pixels(*self.size_px)
        context.options = {"max_pixels": str(limits.max_pixels), "codec_whitelist": CODEC_WHITELIST}
        self.interlaced = context.field_order in FIELD_ORDERS
        # How a decoder conceals damage depends on its number of threads, and a clip must always look the same.
        context.thread_count = 1

    @property
    def pixel_aspect(self) -> float:
        """The width of a pixel over its height."""
        return float(self._context.sample_aspect_ratio or 1)

    def decode(self, packets: Iterable[VideoPacket]) -> Iterator[av.VideoFrame]:
        """A packet that cannot be decoded is left out."""
        try:
            for packet in (*packets, None):
                self.stopwatch.check(self.limits)
                try:
                    frames = self._context.decode(packet)
                except av.FFmpegError as error:
                    check_memory(error, self.size_px)
                    continue
                yield from self._checked(frames)
        finally:
            self._context.flush_buffers()

    def decode_run(self, run: Sequence[TimedPacket[VideoPacket]], wanted: Collection[int]) -> Iterator[av.VideoFrame]:
        """The same, without frames that are neither wanted nor needed by another. Raises `av.FFmpegError`."""
        try:
            for packet in run:
                self.stopwatch.check(self.limits)
                if self.skips:
                    may_be_cut_short = packet is run[-1]
                    self._context.skip_frame = "DEFAULT" if packet.pts in wanted or may_be_cut_short else "NONREF"
                yield from self._checked(self._context.decode(packet.data))
            yield from self._checked(self._context.decode(None))
        finally:
            self._context.skip_frame = "DEFAULT"
            self._context.flush_buffers()

    def _checked(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        for frame in frames:
            self._check_pixels(frame.width, frame.height)
            if not self._has_frame:
                self.size_px, self._has_frame = (frame.width, frame.height), True
            if frame.interlaced_frame:
                self.interlaced = True
            yield frame

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise TooManyPixels(
                f"a frame has {width} x {height} pixels, the limit is {self.limits.max_pixels} in all; scale it down"
            )
