"""A clip that FFmpeg's own command plays is sampled from the pictures that it shows, at the times at which it does.

The pictures carry their number. What must come is found in three ways: by a full decode, by the recipe of the clip,
which says when each picture was taken, and by the command where there is one.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from etenet.video import sampling
from etenet.video.clip import Clip
from etenet.video.clock import Clock
from etenet.video.segments import Cut
from tests import numbered
from tests.numbered import RATE, SIZE, Track

COUNT = 60  # pictures of a recording
CODECS = {
    "mp4": ("h264", "hevc", "mpeg2video", "mpeg4", "vp9", "av1", "mjpeg"),
    "matroska": ("h264", "hevc", "mpeg2video", "mpeg4", "vp8", "vp9", "av1", "mjpeg"),
    "webm": ("vp8", "vp9", "av1"),
    "mpegts": ("h264", "hevc", "mpeg2video", "mpeg4"),
    "mpeg": ("mpeg2video",),
    "avi": ("h264", "mpeg4", "mjpeg"),
    "flv": ("h264",),
}
CLOCKS = {
    "mp4": ("one", "edited"),
    "matroska": ("one", "back", "jump", "no pts"),
    "webm": ("one", "back", "jump"),
    "mpegts": ("one", "back", "jump"),
    "mpeg": ("one", "back", "jump"),
}
SOURCES = {"mpegts": "mpegts", "mpeg": "mpegts", "avi": "mpegts", "webm": "matroska"}
BROADCAST = ("mpegts", "mpeg")
TICK_S = {"avi": 1 / RATE}
FOURCC = {"h264": b"H264", "mpeg4": b"XVID"}
OTHER = 128  # the first number of another track
DEFAULT, PLAIN, COVER = Disposition.default, Disposition(0), Disposition.attached_pic


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a clip is made."""

    container: str
    kind: str
    skip: int = 0  # packets that are missing at its beginning
    offset_s: int = 0  # where its clock begins
    clock: str = "one"  # "back", "jump": a second recording follows; "edited": by an edit list
    edited_frames: int = 0

    @property
    def codec(self) -> str:
        return self.kind.partition(",")[0]

    def source(self, first: int) -> bytes:
        if self.codec in ("vp8", "mjpeg"):
            return numbered.encoded(self.kind, COUNT, first=first, container="matroska")
        container = "mpegts" if self.clock == "no pts" else SOURCES.get(self.container, "mp4")
        return numbered.encoded(self.kind, COUNT, first=first, container=container)

    def body(self) -> bytes:
        film = Track(source=self.source(0), skip=self.skip, offset_s=self.offset_s)
        match self.clock:
            case "edited":
                return numbered.with_edit_list(numbered.muxed(self.container, film), self.edited_frames)
            case "no pts":
                return numbered.matroska_without_pts(film.source, FOURCC[self.codec], skip=self.skip)
            case "back" | "jump":
                second_s = self.offset_s / 2 if self.clock == "back" else self.offset_s + 100
                second = Track(source=self.source(COUNT), offset_s=second_s)
                return numbered.muxed(self.container, film) + numbered.muxed(self.container, second)
        return numbered.muxed(self.container, film)

    def taken_s(self, number: int) -> float:
        """When a picture was taken. A broadcast has no gap where its clock jumps."""
        gap_s = 100 + (self.skip - COUNT) / RATE
        is_after_gap = self.clock == "jump" and self.container not in BROADCAST and number >= COUNT
        return number / RATE + (gap_s if is_after_gap else 0)

    @property
    def tolerance_s(self) -> float:
        """A tick. FFmpeg's demuxer of program streams guesses some times at their ends, wrong by up to two frames."""
        ends = 2 / RATE if self.container == "mpeg" and self.clock != "one" else 0
        return max(TICK_S.get(self.container, 0.001), ends) + 1e-4


def kinds(container: str, clock: str) -> list[str]:
    codecs = FOURCC if clock == "no pts" else CODECS[container]
    return [kind for kind in numbered.ENCODERS if kind.partition(",")[0] in codecs]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    container = draw(st.sampled_from(list(CODECS)))
    clock = draw(st.sampled_from(CLOCKS.get(container, ("one",))))
    kind = draw(st.sampled_from(kinds(container, clock)))
    starts_whole = kind == "mpeg4" or draw(st.booleans())
    return Recipe(
        container=container,
        kind=kind,
        clock=clock,
        skip=0 if starts_whole else draw(st.integers(1, 30)),
        offset_s=0 if container == "avi" else draw(st.integers(0, 9000)),
        edited_frames=draw(st.integers(1, 25)) if clock == "edited" else 0,
    )


def sampled(body: bytes) -> tuple[Clip, list[int]]:
    """A clip and the numbers of its pictures."""
    clip = sampling.sample_frames(body, resize_px=64)
    return clip, [numbered.number_in(frame) for frame in clip.frames]


def by_full_decode(body: bytes, stream: int = 0) -> list[int]:
    numbers = []
    with av.open(io.BytesIO(body)) as container:
        for packet in container.demux(video=stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            numbers += [numbered.number_in(frame.to_ndarray(format="rgb24")) for frame in frames]
    return numbers


def by_command(body: bytes, size: tuple[int, int] = SIZE) -> tuple[list[int], list[float]]:
    """The numbers of the frames that FFmpeg's own command shows, and their times from the first one."""
    command = "ffmpeg -nostdin -i - -fps_mode passthrough -vf showinfo -f rawvideo -pix_fmt rgb24 -"
    done = subprocess.run(command.split(), input=body, capture_output=True, check=False)
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, size[1], size[0], 3)
    times_s = [float(time_s) for time_s in re.findall(rb"pts_time:(\S+)", done.stderr)]
    return [numbered.number_in(frame) for frame in frames], [time_s - times_s[0] for time_s in times_s]


def check(recipe: Recipe) -> None:
    body = recipe.body()
    clip, numbers = sampled(body)
    shown = by_full_decode(body)
    places = sampling.middle_of_slices(len(shown))
    assert numbers == [shown[place] for place in places]
    assert clip.info.distinct_frames == min(16, len(shown))
    taken_s = [recipe.taken_s(number) - recipe.taken_s(shown[0]) for number in shown]
    np.testing.assert_allclose(clip.info.times_s, [taken_s[place] for place in places], atol=recipe.tolerance_s)
    np.testing.assert_allclose(clip.info.duration_s, taken_s[-1] + 1 / RATE, atol=1 / RATE + recipe.tolerance_s)
    # Debian's FFmpeg 5.1 shows grey pictures of HEVC before its first key frame, and all of AV1 despite an edit list.
    differs = (recipe.codec == "hevc" and recipe.skip) or (recipe.codec == "av1" and recipe.clock == "edited")
    if shutil.which("ffmpeg") and not differs:
        shown, times_s = by_command(body)
        assert numbers == [shown[place] for place in places]
        # Its clock restarts with that of a Matroska file, and it guesses the first time of a cut program stream.
        if not (recipe.clock == "back" and recipe.container not in BROADCAST) and recipe.container != "mpeg":
            np.testing.assert_allclose(clip.info.times_s, [times_s[place] for place in places], atol=recipe.tolerance_s)


def test_generated_clips_equal_a_full_decode_the_command_and_their_recipe(thorough: bool) -> None:
    drawn: set[Recipe] = set()

    @settings(max_examples=500 if thorough else 25, derandomize=True, database=None)
    @given(recipes())
    def each(recipe: Recipe) -> None:
        drawn.add(recipe)
        check(recipe)

    each()
    assert len(drawn) >= (400 if thorough else 20)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(container="mpegts", kind="h264", skip=6),
        Recipe(container="matroska", kind="h264, open", skip=9),
        Recipe(container="matroska", kind="h264, pyramid", skip=13),
        Recipe(container="mpegts", kind="h264, refresh", skip=20),
        Recipe(container="mp4", kind="hevc, open", skip=11),
        Recipe(container="mp4", kind="hevc, radl", skip=10),
        Recipe(container="mpeg", kind="mpeg2video", skip=3),
        Recipe(container="webm", kind="vp9", skip=5),
        Recipe(container="webm", kind="av1", skip=5),
        Recipe(container="mpegts", kind="h264", clock="back"),
        Recipe(container="mpegts", kind="hevc, open", clock="jump", offset_s=5),
        Recipe(container="mpegts", kind="mpeg2video", clock="back", offset_s=2000, skip=4),
        Recipe(container="mpeg", kind="mpeg2video", clock="jump"),
        Recipe(container="mpeg", kind="h264"),
        Recipe(container="mpeg", kind="hevc, open", offset_s=70),
        Recipe(container="webm", kind="vp8", clock="back"),
        Recipe(container="matroska", kind="h264", clock="back"),
        Recipe(container="matroska", kind="mpeg2video", clock="back", offset_s=70),
        Recipe(container="matroska", kind="h264, open", clock="no pts"),
        Recipe(container="avi", kind="h264", skip=4),
        Recipe(container="mp4", kind="h264, open", clock="edited", edited_frames=14),
    ],
    ids=lambda recipe: f"{recipe.kind} in {recipe.container}, {recipe.clock} clock, without {recipe.skip}",
)
def test_each_kind_of_head_and_clock_is_sampled_right(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.parametrize("kind", ["h264", "h264, open", "hevc, open", "hevc, radl", "mpeg2video"])
def test_a_clip_that_starts_between_key_frames_is_not_decoded_as_a_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sampling._Sampler, "_by_counting")
    check(Recipe(container="mpegts", kind=kind, skip=15))


def test_what_a_decoder_invents_before_the_first_key_frame_is_left_out() -> None:
    for container in ("mp4", "matroska", "avi", "mpegts"):
        clip, numbers = sampled(Recipe(container=container, kind="mpeg4", skip=4).body())
        assert numbers == [12 + place for place in sampling.middle_of_slices(COUNT - 12)]
        np.testing.assert_allclose(clip.info.times_s, [(number - 12) / RATE for number in numbers], atol=1e-4)


@pytest.mark.parametrize("kind", ["h264", "hevc, open", "mpeg4", "h263", "mpeg2video", "vp9"])
def test_nothing_is_invented_where_a_file_says_that_each_frame_is_a_key_frame(kind: str) -> None:
    container = "3gp" if kind == "h263" else "mp4"
    listed = numbered.encoded(kind, COUNT, size=(176, 144), container=container)
    assert b"stss" in listed
    _, numbers = sampled(listed.replace(b"stss", b"free"))  # ISO/IEC 14496-12, 8.6.2: without the list, each is one
    assert numbers == sampling.middle_of_slices(COUNT)


@pytest.mark.parametrize("kind", ["h264", "h264, open", "mpeg2video", "vp9"])
@pytest.mark.parametrize("edits", [[(0, 1), (0.6, 1)], [(1.2, 1), (0.2, 0.8)], [(0.2, 0.4), (0.28, 0.4), (1, 0.6)]])
def test_what_an_edit_list_plays_again_has_the_times_that_ffmpeg_gives_it(
    kind: str, edits: list[tuple[float, float]]
) -> None:
    body = numbered.with_edits(numbered.encoded(kind, COUNT), *edits)
    clip, numbers = sampled(body)
    shown = by_full_decode(body)
    assert shown == [round(RATE * s) + number for s, long_s in edits for number in range(round(RATE * long_s))]
    places = sampling.middle_of_slices(len(shown))
    assert numbers == [shown[place] for place in places]
    with av.open(io.BytesIO(body)) as container:
        times_s = sorted(frame.time for frame in container.decode(video=0) if frame.time is not None)
    np.testing.assert_allclose(clip.info.times_s, [times_s[place] - times_s[0] for place in places], atol=1e-4)
    assert clip.info.duration_s == pytest.approx(len(shown) / RATE, abs=0.1)


@pytest.mark.parametrize("kind", ["h264", "h264, open"])
@pytest.mark.parametrize("packets", [29, 30, 31, 36])
def test_the_clock_of_an_flv_may_go_back_between_key_frames(kind: str, packets: int) -> None:
    flv = numbered.muxed("flv", Track(source=numbered.encoded(kind, COUNT), offset_s=5))
    clip, numbers = sampled(numbered.flv_whose_clock_steps(flv, packets, -4000))
    assert numbers == sampling.middle_of_slices(COUNT)
    np.testing.assert_allclose(clip.info.times_s, [number / RATE for number in numbers], atol=0.04)


def test_segments_go_on_where_recordings_were_joined() -> None:
    body = Recipe(container="mpegts", kind="h264", clock="back", offset_s=50).body()
    segments = sampling.sample_segments(body, Cut(segment_s=1.2), resize_px=64)
    assert [(clip.info.start_s, round(clip.info.end_s, 3)) for clip in segments] == [
        (0.0, 1.2),
        (1.2, 2.4),
        (2.4, 3.6),
        (3.6, 4.8),
    ]
    for part, clip in enumerate(segments):
        places = [30 * part + place for place in sampling.middle_of_slices(30)]
        assert [numbered.number_in(frame) for frame in clip.frames] == places


def film(flags: Disposition) -> Track:
    return Track(source=numbered.encoded("h264", COUNT), flags=flags)


def preview(flags: Disposition) -> Track:
    return Track(source=numbered.encoded("h264", COUNT, first=OTHER, size=(48, 32)), flags=flags)


def still(flags: Disposition) -> Track:
    return Track(source=numbered.encoded("mjpeg", 1, first=255, size=(192, 128), container="matroska"), flags=flags)


STREAMS = {
    "a preview before the default": [preview(PLAIN), film(DEFAULT)],
    "a preview of equal rank before": [preview(DEFAULT), film(DEFAULT)],
    "a preview after": [film(DEFAULT), preview(DEFAULT)],
    "a twin after": [film(DEFAULT), Track(source=numbered.encoded("h264", COUNT, first=OTHER), flags=DEFAULT)],
    "a larger picture before": [still(PLAIN), film(PLAIN)],
    "a larger picture that is the default before": [still(DEFAULT), film(PLAIN)],
    "a larger picture after": [film(PLAIN), still(PLAIN)],
    "cover art before": [still(COVER), film(DEFAULT)],
    "cover art after": [film(DEFAULT), still(COVER)],
}


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("name", STREAMS)
def test_of_several_streams_the_film_is_sampled(container: str, name: str) -> None:
    body = numbered.muxed(container, *STREAMS[name])
    clip, numbers = sampled(body)
    assert (clip.info.width_px, clip.info.height_px) == SIZE
    assert numbers == sampling.middle_of_slices(COUNT)
    if shutil.which("ffmpeg") and "picture" not in name:  # the command shows a picture that is larger
        assert by_command(body)[0] == list(range(COUNT))


def test_a_default_flag_counts_as_five_million_pixels() -> None:
    body = numbered.muxed("matroska", film(PLAIN), preview(DEFAULT))
    assert sampled(body)[1] == [OTHER + place for place in sampling.middle_of_slices(COUNT)]


@pytest.mark.parametrize(("delay_ms", "shown_ms"), [(0, 100), (10, 100), (20, 20), (30, 30)])
def test_a_gif_is_played_as_browsers_play_it(delay_ms: int, shown_ms: int) -> None:
    file = io.BytesIO()
    first, *others = (Image.fromarray(numbered.picture(number)) for number in range(16))
    first.save(file, "gif", save_all=True, append_images=others, duration=delay_ms)
    clip, numbers = sampled(file.getvalue())
    assert numbers == list(range(16))
    np.testing.assert_allclose(clip.info.times_s, [number * shown_ms / 1000 for number in range(16)], atol=1e-6)
    assert clip.info.duration_s == pytest.approx(16 * shown_ms / 1000)


@dataclass
class FakePacket:
    pts: int | None
    dts: int | None
    duration: int | None = 1
    is_keyframe: bool = False
    is_discard: bool = False


@pytest.mark.parametrize("is_broadcast", [False, True])
def test_a_clock_goes_on_unless_it_only_jitters(is_broadcast: bool) -> None:
    clock = Clock(tick_s=0.04, frame_ticks=1, is_broadcast=is_broadcast)

    def gone_on(*times: int) -> list[int | None]:
        packets = [FakePacket(time, time, is_keyframe=True) for time in times]
        clock.go_on(packets)
        assert all(packet.pts == packet.dts for packet in packets)
        return [packet.pts for packet in packets]

    assert gone_on(100, 101, 102) == [100, 101, 102]
    assert gone_on(100, 101, 99, 102) == [100, 101, 99, 102], "0.08 s back: FFmpeg lets it pass"
    assert gone_on(100, 101, 5, 6, 7, 0, 1) == [100, 101, 102, 103, 104, 105, 106]
    assert gone_on(0, 1, 200) == [0, 1, 200], "8 s forward"
    assert gone_on(0, 1, 300) == [0, 1, 2 if is_broadcast else 300]
    assert gone_on(0, 1, 3_000_000) == [0, 1, 2], "33 hours"
    assert gone_on(0, 2**63 - 1, 1 - 2**63, 0)[0] == 0, "times at the ends of what FFmpeg can store"


def test_frames_without_times_come_in_order_of_decoding_or_at_the_average_rate() -> None:
    clock = Clock(tick_s=0.001, frame_ticks=40, is_broadcast=False)
    without_pts = [FakePacket(None, 50 * number) for number in range(4)]
    assert clock.times([None] * 4, without_pts) == [0, 50, 100, 150]
    assert clock.times([None] * 3, without_pts) == [0, 50, 100]
    assert clock.times([None] * 3, [FakePacket(None, None)] * 3) == [0, 40, 80]
    seldom = [FakePacket(None, 50 * number if number % 3 == 1 else None) for number in range(8)]
    assert clock.times([None] * 8, seldom) == [50 + 50 * number for number in range(8)]
    decoding = [FakePacket(pts, pts - 1) for pts in (1, 2, 3, 4)]
    assert clock.times([1, 3, 2, 4], decoding) == [0, 1, 2, 3]
    assert clock.times([1, 4, 2], decoding) == [1, 2, 3]
    assert clock.times([1, 3, 4], decoding) == [1, 3, 4], "a picture is missing, and no time is wrong"


CASES = {  # how many pictures are shown, of which video stream
    "A1-still-first.mkv": (60, 1),
    "A3-second-default.mkv": (60, 1),
    "B1-starts-between-keyframes.ts": (175, 0),
    "B2-open-gop-head-h264.mkv": (226, 0),
    "B5-open-gop-head-times.mkv": (96, 0),
    "E1-two-clocks-interleaved.ts": (120, 0),
    "E2-same-clock-twice.ts": (120, 0),
    "G2-h264-in-avi-times.avi": (56, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_users_sent_shows_all_its_pictures_at_their_times(name: str, reference_data: Path) -> None:
    path = reference_data.parent / "cases" / name
    if not path.exists():
        pytest.skip("the cases are not part of the repository")
    count, stream = CASES[name]
    clip, numbers = sampled(path.read_bytes())
    shown, places = by_full_decode(path.read_bytes(), stream), sampling.middle_of_slices(count)
    assert len(shown) == count
    assert numbers == [shown[place] for place in places]
    assert clip.info.distinct_frames == 16
    np.testing.assert_allclose(clip.info.times_s, [place / RATE for place in places], atol=0.021)
    assert clip.info.duration_s == pytest.approx(count / RATE, abs=0.05)
