"""The film of an open file: the stream that a player shows, its packets on one clock, and its decoders.

Whatever is demuxed here stays within the limits. Knows nothing of which frames are wanted, or why.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import dropwhile
from typing import cast

import av
from av.container import InputContainer
from av.video import VideoStream

from etenet.errors import EmptyBody, NotAVideo, TooLarge, UndecodableVideo
from etenet.video import not_videos
from etenet.video.clock import Clock, as_browsers_play
from etenet.video.decoder import Decoder, VideoPacket
from etenet.video.ffmpeg import DECODERS, LENIENT_METADATA, OPEN_OPTIONS
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.presentation import presentation
from etenet.video.streams import film_of, without_covers

_BROADCAST = ("mpegts", "mpeg")
_USUAL_RATE = 25  # frames per second, where a file says nothing


@contextmanager
def open_film(body: bytes, *, limits: DecodeLimits, stopwatch: Stopwatch) -> Iterator[Film]:
    """The film of a video file. Raises the `CaptionError` that says what is wrong with the file."""
    if not body:
        raise EmptyBody("the body is empty; send the video itself, for example with curl -T clip.mp4")
    if len(body) > limits.max_body_bytes:
        raise TooLarge(f"the video has {len(body)} bytes, the limit is {limits.max_body_bytes}; send a shorter clip")
    if still := not_videos.still_image(body):
        raise still
    with closing(_container(body)) as container:
        yield Film(container, limits=limits, stopwatch=stopwatch)


def _container(body: bytes) -> InputContainer:
    try:
        container: InputContainer = av.open(io.BytesIO(body), "r", options=OPEN_OPTIONS, **LENIENT_METADATA)
        return container
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        raise not_videos.refusal(body) from error


class Film:
    """The stream, its clock and its crop are known at once, its packets once they are asked for."""

    def __init__(self, container: InputContainer, *, limits: DecodeLimits, stopwatch: Stopwatch) -> None:
        self.limits, self.stopwatch = limits, stopwatch
        self._container = container
        streams = without_covers(container.streams.video)
        if not streams:
            raise NotAVideo("the file has no video stream (is it audio only?); send one with pictures")
        self._demuxed: dict[int, list[VideoPacket]] = {}  # by the index of the stream
        self._stream = streams[0]
        if len(streams) > 1:
            self._demuxed = self._demux(streams)
            self._stream = film_of(streams, {index: len(packets) for index, packets in self._demuxed.items()})
        if self._stream.codec_context is None:
            raise _unread("unknown")
        self.codec = self._stream.codec_context.codec.canonical_name
        if self.codec not in DECODERS:
            raise _unread(self.codec)
        shown = presentation(container, self._stream.index)
        if shown.needs_dolby_vision:
            raise UndecodableVideo(
                "only Dolby Vision decoders can show the colours of this video (a profile without a base layer, as 5); "
                "send it as HDR10, HLG or SDR"
            )
        self.crop = shown.crop
        self.tick_s = float(self._stream.time_base or 1)
        rate = self._stream.guessed_rate or self._stream.average_rate or _USUAL_RATE
        self.clock = Clock(
            tick_s=self.tick_s,
            frame_ticks=max(1, round(1 / (float(rate) * self.tick_s))),
            is_broadcast=container.format.name in _BROADCAST,
            stores_dts=container.format.name == "flv",
        )
        self.decoder = Decoder(self._stream.codec_context, limits=limits, stopwatch=stopwatch)

    def another_decoder(self) -> Decoder | None:
        """Of the same stream, for another thread: it gives the same frames. None where PyAV cannot make one.

        PyAV gives a stream one decoder. A stream that is copied from it has one of its own, with all that the container
        says about the pictures; opening the file again would cost as much as some frames. Nothing is written.
        """
        with av.open(io.BytesIO(), "w", format="null") as nowhere:
            copy = nowhere.add_stream_from_template(self._stream, opaque=True)
        try:
            copy.codec_context.codec_tag = self._stream.codec_context.codec_tag  # of which some encoders' faults depend
        except UnicodeDecodeError:
            return None
        return Decoder(copy.codec_context, limits=self.limits, stopwatch=self.stopwatch)

    @property
    def pixel_aspect(self) -> float:
        """The width of a pixel over its height, as the container says, or else the codec."""
        return float(self._stream.sample_aspect_ratio or self.decoder.pixel_aspect)

    def since_start_of_file(self, pts: int) -> float:
        """Seconds from where the file's clock starts, with whichever stream comes first; 0 if that is unknown."""
        starts_us = self._container.start_time
        return 0.0 if starts_us is None else max(0.0, pts * self.tick_s - starts_us / av.time_base)

    def packets(self) -> list[VideoPacket]:
        """In the order of decoding, on one clock. There is at least one."""
        packets = (self._demuxed or self._demux([self._stream]))[self._stream.index]
        if not packets:
            raise UndecodableVideo(
                "the video stream holds no data; the file is damaged, cut short, or only the start of a streamed one: "
                "send all of it"
            )
        if "enc_key_id" in self._stream.metadata or any(
            packet.is_keyframe and packet.has_sidedata("encryption_info") for packet in packets
        ):
            raise not_videos.encrypted()  # WebM's, and MP4's, which some decoders would make a picture of
        if self._container.format.name == "gif":
            as_browsers_play(packets)
        self.clock.go_on(packets)
        if self.decoder.invents:
            packets = list(dropwhile(lambda packet: not packet.is_keyframe, packets)) or packets
        return packets

    def _demux(self, streams: Sequence[VideoStream]) -> dict[int, list[VideoPacket]]:
        """The packets of each stream, by its index."""
        packets: dict[int, list[VideoPacket]] = {stream.index: [] for stream in streams}
        try:
            for count, packet in enumerate(self._container.demux(list(streams))):
                self.stopwatch.check(self.limits)
                if packet.size:
                    packets[packet.stream_index].append(cast("VideoPacket", packet))
                if count > self.limits.max_packets:
                    raise UndecodableVideo(
                        f"the video has more than {self.limits.max_packets} packets; send a shorter clip"
                    )
        except MemoryError:
            raise
        except (av.FFmpegError, IndexError):
            pass  # the part before the damage is captioned. IndexError: a stream that the header did not list
        return packets


def _unread(codec: str) -> NotAVideo:
    return NotAVideo(f"the video's codec is {codec}; etenet reads {', '.join(DECODERS)}; {not_videos.CONVERT}")
