"""Clips flagged as interlaced: moving fields are deinterlaced as FFmpeg's own command does, whole pictures stay whole.

The oracles are a full decode through FFmpeg's filter `bwdif`, and the scene as it was at the moment of each frame.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from functools import cache

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.reformatter import Interpolation
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from etenet.video import pictures
from etenet.video.deinterlacing import Window, Windows
from etenet.video.filters import filtered
from etenet.video.sampling import middle_of_slices, sample_frames, sample_segments
from etenet.video.segments import Cut
from tests import clips

SIZE_PX = 64
WIDTH, HEIGHT = 160, 128
Picture = NDArray[np.uint8]


def moving_square(moment: float) -> Picture:
    """A bright square crosses fine detail that does not move. Then it jumps back, as at a cut."""
    picture = still_detail(0)
    x = 8 + int(4 * moment) % (WIDTH - 56)
    picture[40:88, x : x + 40] = 235, 220, 60
    return picture


def still_detail(_: float) -> Picture:
    """Single lines, the worst for a deinterlacer, and a wedge."""
    picture = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    picture[8:32:2, 8:-8] = 200
    picture[96:120] = np.linspace(30, 220, WIDTH, dtype=np.uint8)[:, None]
    return picture


def panning(moment: float) -> Picture:
    """A landscape of waves that moves as a whole."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([np.sin((x + 5 * moment) / 9 + y / 17) * 90 + 120] * 3, axis=-1).astype(np.uint8)


def falling(moment: float) -> Picture:
    """Horizontal bars that move down."""
    y = np.mgrid[0:HEIGHT, 0:WIDTH][0]
    return np.stack([np.where((y + 6 * moment) % 24 < 12, 210, 40)] * 3, axis=-1).astype(np.uint8)


SCENES = (moving_square, panning, falling)
X264 = {"crf": "4", "preset": "ultrafast"}
ENCODERS: dict[str, dict[str, str]] = {
    "h264 in mp4": {**X264, "flags": "+ildct+ilme", "bf": "2", "g": "12"},
    "h264 in ts": {**X264, "flags": "+ildct+ilme", "bf": "2", "g": "12", "container": "mpegts"},
    "mpeg2 in ts": {
        **{"codec": "mpeg2video", "container": "mpegts", "flags": "+ildct+ilme"},
        **{"qmin": "1", "qmax": "2", "bf": "2", "g": "12"},
    },
}


def woven(scene: Callable[[float], Picture], count: int, order: str) -> list[Picture]:
    """Frames whose second field was taken half a frame later."""
    first = 0 if order == "tff" else 1
    frames = []
    for number in range(count):
        frame = scene(number)
        frame[1 - first :: 2] = scene(number + 0.5)[1 - first :: 2]
        frames.append(frame)
    return frames


def flagged(frames: list[Picture], order: str, encoder: str = "h264 in mp4") -> bytes:
    return clips.video(pictures=frames, size=(WIDTH, HEIGHT), fields=order, **ENCODERS[encoder])  # type: ignore[arg-type]


def through_a_filter(body: bytes, name: str, arguments: str) -> list[Picture]:
    """All frames of a clip after a filter of FFmpeg, resized."""
    with av.open(io.BytesIO(body)) as container:
        container.streams.video[0].thread_count = 1
        graph = Graph()
        nodes = graph.add_buffer(container.streams.video[0]), graph.add(name, arguments), graph.add("buffersink")
        graph.link_nodes(*nodes).configure()
        resized = []
        for frame in [*container.decode(video=0), None]:
            graph.push(frame)
            while True:
                try:
                    shown = graph.vpull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
                resized.append(small(shown))
    return resized


def small(frame: av.VideoFrame) -> Picture:
    return frame.reformat(SIZE_PX, SIZE_PX, "rgb24", interpolation=Interpolation.BILINEAR).to_ndarray()


def sixteen_of(frames: list[Picture]) -> Picture:
    return np.stack([frames[place] for place in middle_of_slices(len(frames))])


def is_flagged(body: bytes) -> bool:
    with av.open(io.BytesIO(body)) as container:
        return all(frame.interlaced_frame for frame in container.decode(video=0))


@cache
def case(scene: Callable[[float], Picture], count: int, order: str, encoder: str) -> bytes:
    body = flagged(woven(scene, count, order), order, encoder)
    assert is_flagged(body)
    return body


def truth(scene: Callable[[float], Picture], count: int) -> Picture:
    """What a camera that takes whole pictures would have seen."""
    frames = (av.VideoFrame.from_ndarray(scene(number), format="rgb24") for number in range(count))
    return sixteen_of([small(frame.reformat(format="yuv420p")) for frame in frames])


def error(frames: Picture, true: Picture) -> float:
    return float(np.abs(frames.astype(int) - true).mean())


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("count", [10, 40])
def test_moving_fields_are_deinterlaced_as_ffmpegs_own_command_does(
    scene: Callable[[float], Picture], order: str, encoder: str, count: int
) -> None:
    body = case(scene, count, order, encoder)
    sampled = sample_frames(body, resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(sampled, sixteen_of(through_a_filter(body, "bwdif", "send_frame")))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("scene", [*SCENES, still_detail])
@pytest.mark.parametrize("count", [10, 40])
def test_whole_pictures_under_the_flag_keep_all_their_lines(
    scene: Callable[[float], Picture], encoder: str, count: int
) -> None:
    body = flagged([scene(number) for number in range(count)], "tff", encoder)
    assert is_flagged(body)
    sampled = sample_frames(body, resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(sampled, sixteen_of(through_a_filter(body, "setfield", "prog")))


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("lines", [3, 4, 5, 6, 7, 8])
def test_bars_that_move_across_the_lines_are_not_taken_for_whole_pictures(lines: int, order: str) -> None:
    """Fields of two moments then fit by chance: a bar is one line higher in one of them, as an edge may be."""

    def bars(moment: float) -> Picture:
        return falling(moment * lines / 6)

    body, true = flagged(woven(bars, 20, order), order), truth(bars, 20)
    ffmpegs = sixteen_of(through_a_filter(body, "bwdif", "send_frame"))
    assert error(sample_frames(body, resize_px=SIZE_PX).frames, true) <= error(ffmpegs, true) + 0.05


def test_every_frame_of_a_telecined_film_is_nearer_to_the_film_than_ffmpegs_command_makes_it() -> None:
    """Of five frames, two hold fields of two pictures."""
    film = [panning(2 * number) for number in range(60)]
    pairs = [(4 * n + a, 4 * n + b) for n in range(12) for a, b in ((0, 0), (1, 1), (1, 2), (2, 3), (3, 3))]
    frames = []
    for first, second in pairs:
        frame = film[first].copy()
        frame[1::2] = film[second][1::2]
        frames.append(frame)
    body = flagged(frames, "tff")
    true = sixteen_of([small(av.VideoFrame.from_ndarray(film[first], format="rgb24")) for first, _ in pairs])
    sampled = sample_frames(body, resize_px=SIZE_PX).frames
    assert error(sampled, true) <= error(sixteen_of(through_a_filter(body, "bwdif", "send_frame")), true)


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("film", [panning, still_detail])
def test_a_ticker_of_video_over_a_film_is_deinterlaced(film: Callable[[float], Picture], order: str) -> None:
    letters = np.kron(np.random.default_rng(0).integers(20, 220, (4, 100)), np.ones((4, 5), int)).astype(np.uint8)

    def ticker(moment: float) -> Picture:
        picture, x = film(2 * int(moment)), int(6 * moment)
        picture[104:120] = letters[:, x : x + WIDTH, None]
        return picture

    body, true = flagged(woven(ticker, 40, order), order), truth(ticker, 40)
    ffmpegs = sixteen_of(through_a_filter(body, "bwdif", "send_frame"))
    assert error(sample_frames(body, resize_px=SIZE_PX).frames, true) <= error(ffmpegs, true) + 0.05
    whole = flagged([ticker(number) for number in range(40)], order)
    sampled = sample_frames(whole, resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(sampled, sixteen_of(through_a_filter(whole, "setfield", "prog")))


@settings(max_examples=12)
@given(
    st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
    st.sampled_from(["tff", "bff"]),
    st.booleans(),
    st.integers(3, 40),
)
def test_no_clip_is_further_from_the_truth_than_ffmpegs_own_command_makes_it(
    speed: tuple[int, int], order: str, interlaced: bool, count: int
) -> None:
    def drifting(moment: float) -> Picture:
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
        x, y = x + speed[0] * moment, y + speed[1] * moment
        grey = 120 + 50 * np.sin(x / 5) * np.cos(y / 7) + 50 * np.sin((x + y) / 23)
        return np.stack([grey] * 3, axis=-1).astype(np.uint8)

    frames = woven(drifting, count, order) if interlaced else [drifting(number) for number in range(count)]
    body, true = flagged(frames, order), truth(drifting, count)
    ffmpegs = sixteen_of(through_a_filter(body, "bwdif", "send_frame"))
    assert error(sample_frames(body, resize_px=SIZE_PX).frames, true) <= error(ffmpegs, true) + 0.05


def test_a_flag_that_the_header_does_not_announce_changes_nothing() -> None:
    """The header is that of a progressive clip; a decoder believes what each picture says."""
    body = case(panning, 40, "tff", "h264 in mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etenet.video.decoder.FIELD_ORDERS", frozenset())
        patch.delattr("etenet.video.sampling._Sampler._by_counting")  # that would decode all of a long recording
        unannounced = sample_frames(body, resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(unannounced, sample_frames(body, resize_px=SIZE_PX).frames)


def test_frames_that_are_counted_are_deinterlaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    body = case(panning, 40, "tff", "h264 in mp4")
    by_timestamps = sample_frames(body, resize_px=SIZE_PX).frames
    monkeypatch.setattr("etenet.video.sampling._Sampler._by_timestamps", lambda *_: None)
    np.testing.assert_array_equal(sample_frames(body, resize_px=SIZE_PX).frames, by_timestamps)


def test_segments_of_an_interlaced_clip_are_parts_of_the_same_deinterlaced_video() -> None:
    body = case(panning, 40, "tff", "h264 in mp4")
    every = through_a_filter(body, "bwdif", "send_frame")
    for clip in sample_segments(body, Cut(segment_s=1.0), resize_px=SIZE_PX):
        expected = [every[round(25 * time_s)] for time_s in clip.info.times_s]
        np.testing.assert_array_equal(clip.frames, expected)


def test_frames_that_are_compared_to_find_scenes_are_not_combed() -> None:
    whole = av.VideoFrame.from_ndarray(clips.pattern(1, WIDTH, HEIGHT), format="rgb24").reformat(format="yuv420p")
    (interlaced,) = filtered([whole], "setfield", "tff")
    assert interlaced.interlaced_frame
    np.testing.assert_array_equal(*(pictures.Resizer().as_coded(frame, 32) for frame in (whole, interlaced)))


def test_frames_live_no_longer_than_they_are_needed() -> None:
    """`side_data` makes a frame refer to itself, and the garbage collector may come late."""
    body = case(moving_square, 40, "tff", "h264 in mp4")
    sample_frames(body, resize_px=SIZE_PX)
    gc.collect()
    gc.disable()
    try:
        sample_frames(body, resize_px=SIZE_PX)
        alive = [thing for thing in gc.get_objects() if type(thing) is av.VideoFrame]
        assert not [frame for frame in alive if frame.width == WIDTH]
    finally:
        gc.enable()


@given(st.integers(1, 30), st.data())
def test_each_wanted_frame_comes_once_with_its_neighbours(length: int, data: st.DataObject) -> None:
    wanted = data.draw(st.sets(st.integers(0, length - 1), min_size=1))
    windows = Windows(wanted, length, with_neighbours=True)
    given_out = {
        place: window.frames
        for frame in range(length)
        for place, window in windows.add(frame, frame)  # type: ignore[arg-type]  # any object is a frame here
        if window.frame == place  # type: ignore[comparison-overlap]
    }
    assert given_out.keys() == windows.wanted == wanted
    for place, frames in given_out.items():
        assert list(frames) == list(range(frames[0], frames[0] + min(3, length)))
        assert abs(frames[len(frames) // 2] - place) <= 1 if 0 < place < length - 1 else True


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (18, 20)])
def test_tiny_interlaced_pictures_are_shown(size: tuple[int, int]) -> None:
    frame = av.VideoFrame.from_ndarray(clips.pattern(0, *size), format="rgb24").reformat(format="yuv420p")
    (frame,) = filtered([frame], "setfield", "tff")
    assert frame.interlaced_frame
    pixels, _ = pictures.Resizer().upright(Window((frame,) * 3, 1), 8)
    assert pixels.shape == (8, 8, 3)
