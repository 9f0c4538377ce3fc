"""Bytes -> clips of 16 RGB frames with their times.

Which frames: the frame list of a video is what its decoder outputs, in presentation order. The list is cut into 16
equal slices, and the middle frame of each is taken (with fewer than 16 frames, some are taken twice). The packets'
timestamps name these frames, so only the runs of packets that a wanted frame depends on are decoded. If the output
differs from the timestamps, everything is decoded and counted, so the result is the same. Damage in a part that no
wanted frame depends on is never seen: there the timestamps alone define the frame list. Where a clip begins with
pictures that may depend on others before them, its first group is decoded to see which are shown.

The segments of a video are cut from its frame list in the same way, each as a clip of its own. Only scenes need every
frame decoded, to find where they begin.

Runs do not depend on each other: where a process has idle threads, they decode some of them (`sharing.py`).

Knows nothing of networks, batches or servers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import dataclass, replace

import av
import numpy as np
from numpy.typing import NDArray

from etenet.errors import UndecodableVideo
from etenet.video.clip import FRAMES_PER_CLIP, Clip, ClipInfo
from etenet.video.decoder import Decoder, VideoPacket
from etenet.video.deinterlacing import Window, Windows
from etenet.video.film import Film, open_film
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.not_videos import CONVERT
from etenet.video.packet_runs import Run, TimedPacket, doubtful_head, runs, timed_packets, without_hidden
from etenet.video.pictures import Resizer, check_memory
from etenet.video.scenes import COMPARED_PX, SceneChanges
from etenet.video.segments import Cut, Segment
from etenet.video.sharing import Helpers, shared_out


@dataclass(frozen=True, slots=True)
class _Still:
    """One decoded frame, upright and resized."""

    pts: int
    pixels: NDArray[np.uint8]
    turned: bool  # by a quarter


def middle_of_slices(length: int, slices: int = FRAMES_PER_CLIP) -> list[int]:
    """Indices of the middle element of each of `slices` equal slices of a list.

    >>> middle_of_slices(32, 4)
    [4, 12, 20, 28]
    """
    return [(2 * number + 1) * length // (2 * slices) for number in range(slices)]


def sample_frames(
    body: bytes, *, resize_px: int, limits: DecodeLimits | None = None, helpers: Helpers | None = None
) -> Clip:
    """16 equally spaced frames of a video file, each resized to resize_px x resize_px.

    Raises the `CaptionError` that says what is wrong with the file. With `helpers` the process must do nothing else
    meanwhile, because all its processor time counts; the frames are the same.
    """
    (whole,) = sample_segments(body, Cut(), resize_px=resize_px, limits=limits, helpers=helpers)
    return whole


def sample_segments(
    body: bytes, cut: Cut, *, resize_px: int, limits: DecodeLimits | None = None, helpers: Helpers | None = None
) -> list[Clip]:
    """The same for each segment of a video, which is decoded once. `BadOption` if it cannot be cut like this."""
    limits, stopwatch = limits or DecodeLimits(), Stopwatch(of_process=helpers is not None)
    try:
        with open_film(body, limits=limits, stopwatch=stopwatch) as film:
            return _Sampler(film, resize_px, helpers).sample(cut)
    except MemoryError as error:
        raise limits.too_much_memory() from error


class _Sampler:
    """A film and how it is sampled."""

    def __init__(self, film: Film, resize_px: int, helpers: Helpers | None) -> None:
        self.film, self.resize_px, self.helpers = film, resize_px, helpers
        self.decoder, self.resizer = film.decoder, Resizer(film.crop)

    def sample(self, cut: Cut) -> list[Clip]:
        film = self.film
        packets = film.packets()
        sampled = (self._by_timestamps(timed, cut) for timed in self._timed(packets))
        segments = next(filter(None, sampled), None) or self._by_counting(packets, cut)
        first_pts, end_pts = self.span
        width_px, height_px = film.crop.of(*self.decoder.size_px)
        aspect = width_px / height_px * film.pixel_aspect
        turned = segments[-1][1][-1].turned
        decode_ms = film.stopwatch.elapsed_ms
        return [
            Clip(
                np.ascontiguousarray([still.pixels for still in stills]),
                ClipInfo(
                    times_s=tuple((still.pts - first_pts) * film.tick_s for still in stills),
                    distinct_frames=len(set(_sixteen(segment.frames))),
                    codec=film.codec,
                    width_px=width_px,
                    height_px=height_px,
                    shown_aspect=1 / aspect if turned else aspect,
                    duration_s=(end_pts - first_pts) * film.tick_s,
                    picture_start_s=film.since_start_of_file(first_pts),
                    start_s=segment.start_s,
                    end_s=segment.end_s,
                    decode_ms=decode_ms,
                ),
            )
            for segment, stills in segments
        ]

    def _segments(self, cut: Cut, shown_pts: Sequence[int], end_pts: int, scenes_pts: Iterable[int]) -> list[Segment]:
        """The segments of a frame list whose frames are shown at these times, up to the end."""
        first_pts, _ = self.span = shown_pts[0], end_pts
        times_s = [(pts - first_pts) * self.film.tick_s for pts in shown_pts]
        scenes_s = ((pts - first_pts) * self.film.tick_s for pts in scenes_pts)
        duration_s = (end_pts - first_pts) * self.film.tick_s
        return cut.segments(times_s, duration_s, scenes_s, most=self.film.limits.max_segments)

    def _timed(self, packets: Sequence[VideoPacket]) -> Iterator[list[TimedPacket[VideoPacket]]]:
        """What packets may hold and when it is shown, as long as nobody has found that true: frames, or fields as well.

        All once more if the first frame that is flagged as interlaced has come meanwhile.
        """
        frames = timed_packets(packets)
        if frames and not self.decoder.interlaced:
            yield frames
        fields = timed_packets(packets, pair_ticks=self.decoder.pair_s / self.film.tick_s)
        if fields and fields != frames:
            if not self.decoder.interlaced:
                yield fields
            if self.decoder.interlaced:
                yield fields
        if frames and self.decoder.interlaced:
            yield frames

    def _by_timestamps(
        self, timed: Sequence[TimedPacket[VideoPacket]], cut: Cut
    ) -> list[tuple[Segment, list[_Still]]] | None:
        """The 16 frames of each segment that the packets' timestamps name.

        None if the timestamps are wrong, and if the first frame that is flagged as interlaced has come.
        """
        if head := doubtful_head(timed):
            delivered_pts = {frame.pts for frame in self.decoder.decode([packet.data for packet in head])}
            timed = without_hidden(timed, head, delivered_pts)
        timeline = sorted(packet.pts for packet in timed if packet.shown)
        if len(set(timeline)) < len(timeline) or not timeline:
            return None
        end_pts = max(packet.ends for packet in timed if packet.shown)
        with closing(self._scenes(self._packets_from(cut.start_s, timed, timeline[0]), cut, timeline[0])) as scenes_pts:
            segments = self._segments(cut, timeline, end_pts, scenes_pts)
        windows = self._windows(segments, len(timeline))
        wanted = frozenset(timeline[place] for place in windows.needed)
        stills = self._of_runs(list(runs(timed, wanted)), windows, timeline)
        if stills is None or stills.keys() < windows.wanted:
            return None
        return [(segment, [stills[place] for place in _sixteen(segment.frames)]) for segment in segments]

    def _of_runs(
        self, todo: Sequence[Run[VideoPacket]], windows: Windows, timeline: Sequence[int]
    ) -> dict[int, _Still] | None:
        """The wanted frames by their places; None if a run gives other frames than its timestamps say."""
        own = _Taker(self.decoder, self.resizer, self.resize_px, windows, timeline)
        if self.helpers and (count := self._most_helpers(todo, windows)):
            with suppress(MemoryError):  # this decoder alone may have enough
                return self._with_helpers(own, todo, self.helpers.executor, count)
        return own.take(todo)

    def _most_helpers(self, todo: Sequence[Run[VideoPacket]], windows: Windows) -> int:
        """How many can help. All decoders together take as much memory as one may for the largest frames."""
        if not self.helpers or windows.with_neighbours:  # which reach from run to run
            return 0
        if any(packet.data.has_sidedata("new_extradata") for run in todo for packet in run.packets):
            return 0  # what the container says about pictures changes, and a decoder must have seen it
        width_px, height_px = self.decoder.size_px
        fitting = self.film.limits.max_pixels // max(1, width_px * height_px)
        return max(0, min(self.helpers.count, len(todo) - 1, fitting - 1))

    def _with_helpers(
        self, own: _Taker, todo: Sequence[Run[VideoPacket]], executor: Executor, count: int
    ) -> dict[int, _Still] | None:
        decoders = [decoder for _ in range(count) if (decoder := self.film.another_decoder())]
        others = [own.with_another(decoder, Resizer(self.film.crop)) for decoder in decoders]
        first, *rest = todo  # by the first frame of which the film's size is known
        longest_first = sorted(rest, key=lambda run: len(run.packets), reverse=True)
        parts = shared_out([first, *longest_first], own.take, [other.take for other in others], executor)
        self.decoder.interlaced |= any(decoder.interlaced for decoder in decoders)
        return None if parts is None else {place: still for part in parts for place, still in part.items()}

    def _by_counting(self, packets: Sequence[VideoPacket], cut: Cut) -> list[tuple[Segment, list[_Still]]]:
        """The 16 frames of each segment, by decoding everything twice: once to count, once to take."""
        shown = [packet for packet in packets if not packet.is_discard]
        shown_pts = self.film.clock.times([frame.pts for frame in self.decoder.decode(packets)], shown)
        if not shown_pts:
            raise UndecodableVideo(
                f"no frame of the {self.film.codec} video could be decoded; the file is damaged: send it again whole"
            )
        lengths = {packet.pts: packet.duration or 0 for packet in shown}
        average = (shown_pts[-1] - shown_pts[0]) // (len(shown_pts) - 1) if len(shown_pts) > 1 else 0
        end_pts = shown_pts[-1] + lengths.get(shown_pts[-1], average or self.film.clock.frame_ticks)
        with closing(self._scenes(packets, cut, shown_pts[0], shown_pts)) as scenes_pts:
            segments = self._segments(cut, shown_pts, end_pts, scenes_pts)
        windows = self._windows(segments, len(shown_pts))
        stills = {
            place: self._still(window, shown_pts[place])
            for number, frame in enumerate(self.decoder.decode(packets))
            for place, window in windows.add(number, frame)
        }
        if stills.keys() < windows.wanted:
            raise UndecodableVideo(
                f"the {self.film.codec} video decodes differently each time; the file is damaged: {CONVERT}"
            )
        return [(segment, [stills[place] for place in _sixteen(segment.frames)]) for segment in segments]

    def _windows(self, segments: Sequence[Segment], length: int) -> Windows:
        wanted = (place for segment in segments for place in _sixteen(segment.frames))
        return Windows(wanted, length, with_neighbours=self.decoder.interlaced)

    def _packets_from(
        self, start_s: float, packets: Sequence[TimedPacket[VideoPacket]], first_pts: int
    ) -> list[VideoPacket]:
        """The packets from the last key frame at or before `start_s` on."""
        keys = [
            n for n, p in enumerate(packets) if p.starts_group and (p.pts - first_pts) * self.film.tick_s <= start_s
        ]
        return [packet.data for packet in packets[keys[-1] if keys else 0 :]]

    def _scenes(
        self, packets: Iterable[VideoPacket], cut: Cut, first_pts: int, shown_pts: Sequence[int] = ()
    ) -> Generator[int]:
        """The pts at which scenes begin, up to the end of the cut; by `shown_pts` where the frames' own are wrong."""
        changes = SceneChanges()
        for number, frame in enumerate(self.decoder.decode(packets)):
            pts = shown_pts[number] if number < len(shown_pts) else _pts(frame, number)
            if (pts - first_pts) * self.film.tick_s > cut.end_s:
                return
            if changes.begins_with(self.resizer.as_coded(frame, COMPARED_PX)):
                yield pts

    def _still(self, window: Window, pts: int) -> _Still:
        return _Still(pts, *self.resizer.upright(window, self.resize_px))


@dataclass(frozen=True, slots=True)
class _Taker:
    """Takes the wanted frames out of runs, with a decoder and a scaler of its own, in one thread."""

    decoder: Decoder
    resizer: Resizer
    resize_px: int
    windows: Windows
    timeline: Sequence[int]  # pts, by the places that the windows name

    def with_another(self, decoder: Decoder, resizer: Resizer) -> _Taker:
        """For another thread, where windows have no neighbours."""
        windows = Windows(self.windows.wanted, len(self.timeline), with_neighbours=False)
        return replace(self, decoder=decoder, resizer=resizer, windows=windows)

    def take(self, todo: Iterable[Run[VideoPacket]]) -> dict[int, _Still] | None:
        """By their places; None as soon as a run gives other frames than its timestamps say."""
        places = {self.timeline[place]: place for place in self.windows.needed}
        stills: dict[int, _Still] = {}
        for run, first_shown in todo:
            expected = sorted(packet.pts for packet in run if packet.shown and packet.pts >= first_shown)
            delivered: dict[int, None] = {}
            try:
                for frame in self.decoder.decode_run(run, places):
                    # How damage is concealed depends on the frames decoded before.
                    if frame.pts is None or frame.is_corrupt or frame.pts in delivered:
                        return None
                    if self.decoder.interlaced and not self.windows.with_neighbours:
                        return None
                    if self.decoder.invents and frame.pts == run[0].pts and not frame.key_frame:
                        return None  # some files say that each frame is a key frame
                    if frame.pts >= first_shown:
                        delivered[frame.pts] = None
                    if frame.pts in places:
                        for place, window in self.windows.add(places[frame.pts], frame):
                            stills[place] = _Still(self.timeline[place], *self.resizer.upright(window, self.resize_px))
            except av.FFmpegError as error:
                check_memory(error, self.decoder.size_px)
                return None
            if self.decoder.skips:
                key_pts = {packet.pts for packet in run if packet.starts_group}
                expected = [pts for pts in expected if pts in delivered or pts in key_pts]
            if list(delivered) != expected:
                return None
        return stills


def _sixteen(frames: range) -> list[int]:
    return [frames[place] for place in middle_of_slices(len(frames))]


def _pts(frame: av.VideoFrame, number: int) -> int:
    return number if frame.pts is None else frame.pts
