"""Bytes -> clips of 16 RGB frames with their times.

Which frames: the frame list of a video is what its decoder outputs, in presentation order. The list is cut into 16
equal slices, and the middle frame of each is taken (with fewer than 16 frames, some are taken twice). The packets'
timestamps name these frames, so only the runs of packets that a wanted frame depends on are decoded. If the output
differs from the timestamps, everything is decoded and counted, so the result is the same. Damage in a part that no
wanted frame depends on is never seen: there the timestamps alone define the frame list. Where a clip begins with
pictures that may depend on others before them, its first group is decoded to see which are shown.

The segments of a video are cut from its frame list in the same way, each as a clip of its own. Only scenes need every
frame decoded, to find where they begin.

A GPU may decode a large video. Unless it outputs exactly the frames of the timestamps, the software decodes the video
as if there were no GPU. Both give the same pixels for an intact stream. A GPU conceals damage in its own way, and does
not report it.

Knows nothing of networks, batches or servers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import dropwhile
from typing import TypeAlias, cast

import av
import numpy as np
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.video import VideoStream
from numpy.typing import NDArray

from etenet.errors import EmptyBody, NotAVideo, TooLarge, TooManyPixels, UndecodableVideo
from etenet.video import not_videos
from etenet.video.clip import FRAMES_PER_CLIP, Clip, ClipInfo
from etenet.video.clock import Clock, as_browsers_play
from etenet.video.deinterlacing import FIELD_ORDERS, Window, Windows
from etenet.video.ffmpeg import CODEC_WHITELIST, DECODERS, LENIENT_METADATA, OPEN_OPTIONS
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.nvdec import GPU_CODECS, GPU_PICTURES, GpuDecoding, accelerator
from etenet.video.packet_runs import TimedPacket, doubtful_head, runs, without_hidden
from etenet.video.pictures import Resizer, check_memory
from etenet.video.presentation import Presentation, presentation
from etenet.video.scenes import COMPARED_PX, SceneChanges
from etenet.video.segments import Cut, Segment
from etenet.video.streams import film, without_covers

VideoPacket: TypeAlias = "av.Packet[VideoStream]"

_CODECS_THAT_SKIP = ("h264", "hevc")  # can skip frames that no other depends on; the others stay bit-exact
# Their decoders invent what is missing before the first key frame; the others show nothing.
_CODECS_THAT_INVENT = ("mpeg4", "h263", "flv1", "wmv1", "wmv2")
_BROADCAST = ("mpegts", "mpeg")
_USUAL_RATE = 25  # frames per second, where a file says nothing


@dataclass(frozen=True, slots=True)
class _Still:
    """One decoded frame, upright and resized."""

    pts: int
    pixels: NDArray[np.uint8]


def middle_of_slices(length: int, slices: int = FRAMES_PER_CLIP) -> list[int]:
    """Indices of the middle element of each of `slices` equal slices of a list.

    >>> middle_of_slices(32, 4)
    [4, 12, 20, 28]
    """
    return [(2 * number + 1) * length // (2 * slices) for number in range(slices)]


def sample_frames(body: bytes, *, resize_px: int, limits: DecodeLimits | None = None) -> Clip:
    """16 equally spaced frames of a video file, each resized to resize_px x resize_px.

    Raises the `CaptionError` that says what is wrong with the file.
    """
    (whole,) = sample_segments(body, Cut(), resize_px=resize_px, limits=limits)
    return whole


def sample_segments(
    body: bytes, cut: Cut, *, resize_px: int, limits: DecodeLimits | None = None, gpu: GpuDecoding | None = None
) -> list[Clip]:
    """The same for each segment of a video, which is decoded once. `BadOption` if it cannot be cut like this.

    `MemoryError` if there is not enough memory; the caller that set a limit reports it.
    """
    limits = limits or DecodeLimits()
    if not body:
        raise EmptyBody("the body is empty; send the video itself, for example with curl -T clip.mp4")
    if len(body) > limits.max_body_bytes:
        raise TooLarge(f"the video has {len(body)} bytes, the limit is {limits.max_body_bytes}; send a shorter clip")
    if still := not_videos.still_image(body):
        raise still
    stopwatch = Stopwatch()
    with closing(_open(body)) as container:
        sampler = _Sampler(container, resize_px=resize_px, limits=limits, stopwatch=stopwatch)
        if gpu and sampler.suits(gpu, cut):
            with suppress(Exception):  # a driver may fail in any way; the software then says what is wrong
                return sample_on_gpu(
                    body, cut, device=gpu.device, resize_px=resize_px, limits=limits, stopwatch=stopwatch
                )
        return sampler.sample(cut)


def sample_on_gpu(
    body: bytes, cut: Cut, *, device: int, resize_px: int, limits: DecodeLimits, stopwatch: Stopwatch
) -> list[Clip]:
    """The same from a GPU's decoder. Raises anything unless that outputs the frames of the timestamps in time."""
    with closing(_open(body, accelerator(device))) as container:
        return _Sampler(container, resize_px=resize_px, limits=limits, stopwatch=stopwatch, on_gpu=True).sample(cut)


def _open(body: bytes, hwaccel: HWAccel | None = None) -> InputContainer:
    try:
        container: InputContainer = av.open(
            io.BytesIO(body), "r", options=OPEN_OPTIONS, hwaccel=hwaccel, **LENIENT_METADATA
        )
        return container
    except (av.FFmpegError, ValueError, MemoryError) as error:
        if hwaccel:
            raise
        raise not_videos.refusal(body) from error


class _Untrusted(Exception):
    """A GPU's decoder gave something else than expected."""


class _Sampler:
    """An open video and how it is sampled."""

    def __init__(
        self,
        container: InputContainer,
        *,
        resize_px: int,
        limits: DecodeLimits,
        stopwatch: Stopwatch,
        on_gpu: bool = False,
    ) -> None:
        self.container, self.limits, self.resize_px = container, limits, resize_px
        self.stopwatch, self.on_gpu = stopwatch, on_gpu
        streams = without_covers(container.streams.video)
        if not streams:
            raise NotAVideo("the file has no video stream (is it audio only?); send one with pictures")
        self.demuxed: dict[int, list[VideoPacket]] = {}  # by the index of the stream
        self.stream = streams[0]
        if len(streams) > 1:
            self.demuxed = self._demux(streams)
            self.stream = film(streams, {index: len(packets) for index, packets in self.demuxed.items()})
        if self.stream.codec_context is None:
            raise NotAVideo(f"the video's codec is unknown; we read {', '.join(DECODERS)}")
        self.codec = self.stream.codec_context.codec.canonical_name
        if self.codec not in DECODERS:
            raise NotAVideo(f"the video's codec is {self.codec}; we read {', '.join(DECODERS)}")
        shown = Presentation() if on_gpu else presentation(container, self.stream.index)
        if shown.needs_dolby_vision:
            raise UndecodableVideo(
                "only Dolby Vision decoders can show the colours of this video (a profile without a base layer, as 5); "
                "send it as HDR10, HLG or SDR"
            )
        self.resizer = Resizer(shown.crop)
        self.context, self.tick_s = self.stream.codec_context, float(self.stream.time_base or 1)
        rate = self.stream.guessed_rate or self.stream.average_rate or _USUAL_RATE
        self.clock = Clock(
            tick_s=self.tick_s,
            frame_ticks=max(1, round(1 / (float(rate) * self.tick_s))),
            is_broadcast=container.format.name in _BROADCAST,
        )
        self.size_px = self.context.width, self.context.height
        self._check_pixels(*self.size_px)
        self.context.options = {"max_pixels": str(limits.max_pixels), "codec_whitelist": CODEC_WHITELIST}
        self.interlaced = self.context.field_order in FIELD_ORDERS  # or a frame that says so has come
        # How a decoder conceals damage depends on its number of threads, and a clip must always look the same.
        self.context.thread_count = 1
        if on_gpu and not self.context.is_hwaccel:
            raise _Untrusted("this build of FFmpeg decodes it in software")

    def suits(self, gpu: GpuDecoding, cut: Cut) -> bool:
        """Whether the GPU shall decode it. Not for scenes: every frame would have to come back from the GPU."""
        can = self.codec in GPU_CODECS and self.context.pix_fmt in GPU_PICTURES
        can = can and not (self.interlaced or self.resizer.crop)
        return can and math.prod(self.size_px) >= gpu.from_pixels and not cut.segment

    def sample(self, cut: Cut) -> list[Clip]:
        packets = (self.demuxed or self._demux([self.stream]))[self.stream.index]
        if not packets:
            raise UndecodableVideo(
                "the video stream holds no data; the file is damaged, cut short, or only the start of a streamed one"
            )
        if self.container.format.name == "gif":
            as_browsers_play(packets)
        self.clock.go_on(packets)
        if self.codec in _CODECS_THAT_INVENT:
            packets = list(dropwhile(lambda packet: not packet.is_keyframe, packets)) or packets
        interlaced_from_the_start = self.interlaced
        segments = self._by_timestamps(packets, cut)
        if not segments and self.interlaced and not interlaced_from_the_start:
            segments = self._by_timestamps(packets, cut)
        if not segments and self.on_gpu:
            raise _Untrusted("the frames differ from the timestamps")
        segments = segments or self._by_counting(packets, cut)
        first_pts, end_pts = self.span
        width_px, height_px = self.resizer.crop.of(*self.size_px)
        aspect = width_px / height_px * float(self.context.sample_aspect_ratio or 1)
        decode_ms = self.stopwatch.elapsed_ms
        return [
            Clip(
                np.ascontiguousarray([still.pixels for still in stills]),
                ClipInfo(
                    times_s=tuple((still.pts - first_pts) * self.tick_s for still in stills),
                    distinct_frames=len(set(_sixteen(segment.frames))),
                    codec=self.codec,
                    width_px=width_px,
                    height_px=height_px,
                    shown_aspect=1 / aspect if self.resizer.turned else aspect,
                    duration_s=(end_pts - first_pts) * self.tick_s,
                    picture_start_s=self._since_start_of_file(first_pts),
                    start_s=segment.start_s,
                    end_s=segment.end_s,
                    decode_ms=decode_ms,
                    on_gpu=self.on_gpu,
                ),
            )
            for segment, stills in segments
        ]

    def _segments(self, cut: Cut, shown_pts: Sequence[int], end_pts: int, scenes_pts: Iterable[int]) -> list[Segment]:
        """The segments of a frame list whose frames are shown at these times, up to the end."""
        first_pts, _ = self.span = shown_pts[0], end_pts
        times_s = [(pts - first_pts) * self.tick_s for pts in shown_pts]
        scenes_s = ((pts - first_pts) * self.tick_s for pts in scenes_pts)
        duration_s = (end_pts - first_pts) * self.tick_s
        return cut.segments(times_s, duration_s, scenes_s, most=self.limits.max_segments)

    def _demux(self, streams: Sequence[VideoStream]) -> dict[int, list[VideoPacket]]:
        """The packets of each stream, by its index."""
        packets: dict[int, list[VideoPacket]] = {stream.index: [] for stream in streams}
        # If the rest of the file is damaged, the part before it is captioned. PyAV raises IndexError for packets of a
        # stream that the header did not list.
        with suppress(av.FFmpegError, MemoryError, IndexError):
            for count, packet in enumerate(self.container.demux(list(streams))):
                self.stopwatch.check(self.limits)
                if packet.size:
                    packets[packet.stream_index].append(cast("VideoPacket", packet))
                if count > self.limits.max_packets:
                    raise UndecodableVideo(
                        f"the video has more than {self.limits.max_packets} packets; send a shorter clip"
                    )
        return packets

    def _by_timestamps(self, packets: Sequence[VideoPacket], cut: Cut) -> list[tuple[Segment, list[_Still]]] | None:
        """The 16 frames of each segment that the packets' timestamps name.

        None if the timestamps are wrong, and if the first frame that is flagged as interlaced has come.
        """
        timed = [TimedPacket(p, p.pts, not p.is_discard, p.is_keyframe) for p in packets if p.pts is not None]
        if len(timed) < len(packets):
            return None
        if head := doubtful_head(timed):
            delivered_pts = {frame.pts for frame in self._decode([packet.data for packet in head])}
            timed = without_hidden(timed, head, delivered_pts)
        timeline = sorted(packet.pts for packet in timed if packet.shown)
        if len(set(timeline)) < len(timeline) or not timeline:
            return None
        end_pts = max(packet.pts + (packet.data.duration or 0) for packet in timed if packet.shown)
        with closing(self._scenes(self._packets_from(cut.start_s, timed, timeline[0]), cut, timeline[0])) as scenes_pts:
            segments = self._segments(cut, timeline, end_pts, scenes_pts)
        windows = self._windows(segments, len(timeline))
        places = {timeline[place]: place for place in windows.needed}
        wanted = frozenset(places)
        stills: dict[int, _Still] = {}
        for run, first_shown in runs(timed, wanted):
            expected = sorted(packet.pts for packet in run if packet.shown and packet.pts >= first_shown)
            delivered: dict[int, None] = {}
            try:
                for frame in self._decode_run(run, wanted):
                    # How damage is concealed depends on the frames decoded before.
                    if frame.pts is None or frame.is_corrupt or frame.pts in delivered:
                        return None
                    if self.interlaced and not windows.with_neighbours:
                        return None
                    if frame.pts >= first_shown:
                        delivered[frame.pts] = None
                    if frame.pts in wanted:
                        for place, window in windows.add(places[frame.pts], frame):
                            stills[place] = self._still(window, timeline[place])
            except av.FFmpegError as error:
                check_memory(error, self.size_px)
                return None
            if self.codec in _CODECS_THAT_SKIP:
                key_pts = {packet.pts for packet in run if packet.starts_group}
                expected = [pts for pts in expected if pts in delivered or pts in key_pts]
            if list(delivered) != expected:
                return None
        if stills.keys() < windows.wanted:
            return None
        return [(segment, [stills[place] for place in _sixteen(segment.frames)]) for segment in segments]

    def _by_counting(self, packets: Sequence[VideoPacket], cut: Cut) -> list[tuple[Segment, list[_Still]]]:
        """The 16 frames of each segment, by decoding everything twice: once to count, once to take."""
        shown = [packet for packet in packets if not packet.is_discard]
        shown_pts = self.clock.times([frame.pts for frame in self._decode(packets)], shown)
        if not shown_pts:
            raise UndecodableVideo(f"no frame of the {self.codec} video could be decoded; the file is damaged")
        lengths = {packet.pts: packet.duration or 0 for packet in shown}
        end_pts = shown_pts[-1] + lengths.get(shown_pts[-1], self.clock.frame_ticks)
        with closing(self._scenes(packets, cut, shown_pts[0], shown_pts)) as scenes_pts:
            segments = self._segments(cut, shown_pts, end_pts, scenes_pts)
        windows = self._windows(segments, len(shown_pts))
        stills = {
            place: self._still(window, shown_pts[place])
            for number, frame in enumerate(self._decode(packets))
            for place, window in windows.add(number, frame)
        }
        if stills.keys() < windows.wanted:
            raise UndecodableVideo(f"the {self.codec} video decodes differently each time; the file is damaged")
        return [(segment, [stills[place] for place in _sixteen(segment.frames)]) for segment in segments]

    def _windows(self, segments: Sequence[Segment], length: int) -> Windows:
        wanted = (place for segment in segments for place in _sixteen(segment.frames))
        return Windows(wanted, length, with_neighbours=self.interlaced)

    def _packets_from(
        self, start_s: float, packets: Sequence[TimedPacket[VideoPacket]], first_pts: int
    ) -> list[VideoPacket]:
        """The packets from the last key frame at or before `start_s` on."""
        keys = [n for n, p in enumerate(packets) if p.starts_group and (p.pts - first_pts) * self.tick_s <= start_s]
        return [packet.data for packet in packets[keys[-1] if keys else 0 :]]

    def _scenes(
        self, packets: Iterable[VideoPacket], cut: Cut, first_pts: int, shown_pts: Sequence[int] = ()
    ) -> Generator[int]:
        """The pts at which scenes begin, up to the end of the cut; by `shown_pts` where the frames' own are wrong."""
        changes = SceneChanges()
        for number, frame in enumerate(self._decode(packets)):
            pts = shown_pts[number] if number < len(shown_pts) else _pts(frame, number)
            if (pts - first_pts) * self.tick_s > cut.end_s:
                return
            if changes.begins_with(self.resizer.as_coded(frame, COMPARED_PX)):
                yield pts

    def _decode_run(self, run: Sequence[TimedPacket[VideoPacket]], wanted: Collection[int]) -> Iterator[av.VideoFrame]:
        """Frames in presentation order, without those that are neither wanted nor needed by another."""
        try:
            for packet in run:
                self.stopwatch.check(self.limits)
                if self.codec in _CODECS_THAT_SKIP:
                    may_be_cut_short = packet is run[-1]
                    self.context.skip_frame = "DEFAULT" if packet.pts in wanted or may_be_cut_short else "NONREF"
                yield from self._checked(self.context.decode(packet.data))
            yield from self._checked(self.context.decode(None))
        finally:
            self.context.skip_frame = "DEFAULT"
            self.context.flush_buffers()

    def _decode(self, packets: Iterable[VideoPacket]) -> Iterator[av.VideoFrame]:
        """Frames in presentation order. A packet that cannot be decoded is left out."""
        try:
            for packet in (*packets, None):
                self.stopwatch.check(self.limits)
                try:
                    frames = self.context.decode(packet)
                except av.FFmpegError as error:
                    check_memory(error, self.size_px)
                    continue
                yield from self._checked(frames)
        finally:
            self.context.flush_buffers()

    def _checked(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        for frame in frames:
            self._check_pixels(frame.width, frame.height)
            # A GPU returns what is cropped at the left and at the top as part of the picture.
            if self.on_gpu and (frame.width, frame.height) != self.size_px:
                raise _Untrusted(f"a frame has {frame.width} x {frame.height} pixels")
            if frame.interlaced_frame:
                self.interlaced = True
                if self.on_gpu:
                    raise _Untrusted("a frame is interlaced")
            yield frame

    def _still(self, window: Window, pts: int) -> _Still:
        return _Still(pts, self.resizer.upright(window, self.resize_px))

    def _since_start_of_file(self, pts: int) -> float:
        """Seconds from where the file's clock starts, with whichever stream comes first; 0 if that is unknown."""
        starts_us = self.container.start_time
        return 0.0 if starts_us is None else max(0.0, pts * self.tick_s - starts_us / av.time_base)

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise TooManyPixels(
                f"a frame has {width} x {height} pixels, the limit is {self.limits.max_pixels} in all; scale it down"
            )


def _sixteen(frames: range) -> list[int]:
    return [frames[place] for place in middle_of_slices(len(frames))]


def _pts(frame: av.VideoFrame, number: int) -> int:
    return number if frame.pts is None else frame.pts
