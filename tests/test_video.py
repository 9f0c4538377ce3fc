"""The sampled frames are the right ones: the oracle decodes every frame and picks by number."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from etenet import errors
from etenet.video import ffmpeg, sampling
from etenet.video.decoder import Decoder, VideoPacket
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.packet_runs import TimedPacket
from etenet.video.sharing import Helpers
from etenet.video.tone_mapping import is_hdr, to_sdr
from tests import clips
from tests.test_sharing import EAGER

SIZE_PX = 48


def every_frame(body: bytes) -> list[NDArray[np.uint8]]:
    """All frames of a clip, resized and in SDR, in the order of the decoder, without the packets that it refuses."""
    pictures = []
    with av.open(io.BytesIO(body), **ffmpeg.LENIENT_METADATA) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                hdr = is_hdr(frame.color_trc)
                kind = "rgb48le" if hdr else "rgb24"
                small = frame.reformat(SIZE_PX, SIZE_PX, kind, interpolation=Interpolation.BILINEAR).to_ndarray()
                kinds = {"transfer": frame.color_trc, "primaries": frame.color_primaries}
                pictures.append(to_sdr(small, **kinds) if hdr else small)
    return pictures


def sixteen_of(frames: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The middle frame of each of 16 equal slices, straight from the definition."""
    return np.stack([frames[int((number + 0.5) * len(frames) / 16)] for number in range(16)])


RENDERED = {
    "plain": clips.video(),
    "many key frames": clips.video(100, g="6", sc_threshold="0"),
    "B-frames": clips.video(60, bf="3", g="20", **{"b-pyramid": "normal"}),
    "open groups of pictures": clips.video(403, bf="3", g="8", **{"x264-params": "open-gop=1:scenecut=0"}),
    "variable frame rate": clips.video(40, moments=[n * n for n in range(40)]),
    "non-zero start": clips.video(40, moments=[250 + n for n in range(40)]),
    "odd size": clips.video(20, size=(97, 61), pixels="yuv444p"),
    "fewer than 16": clips.video(7),
    "one frame": clips.video(1),
    "one pixel": clips.video(5, size=(2, 2)),
    "mpeg4 in avi": clips.video(50, codec="mpeg4", container="avi", bf="2"),
    "vp8 in webm": clips.video(50, codec="libvpx", container="webm", **{"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9 in webm": clips.video(50, codec="libvpx-vp9", container="webm", **{"lag-in-frames": "16"}),
    "mpeg2 in ts": clips.video(50, codec="mpeg2video", container="mpegts", bf="2"),
    "h264 in ts": clips.video(50, container="mpegts", bf="2", g="10"),
    "flv": clips.video(30, container="flv"),
    "fragmented": clips.video(50, movflags="frag_keyframe+empty_moov", g="10"),
    "size unknown at first": clips.after_the_first_key_frame(),
}


@pytest.mark.parametrize("helpers", [None, EAGER], ids=["alone", "helped"])
@pytest.mark.parametrize("name", RENDERED)
def test_frames_are_those_of_a_full_decode(name: str, helpers: Helpers | None) -> None:
    body = RENDERED[name]
    sampled = sampling.sample_frames(body, resize_px=SIZE_PX, helpers=helpers)
    expected = every_frame(body)
    np.testing.assert_array_equal(sampled.frames, sixteen_of(expected))
    assert sampled.info.distinct_frames == min(16, len(expected))


@pytest.mark.parametrize(("name", "share"), [("B-frames", 0.8), ("plain", 1.0)])
def test_frames_that_are_neither_sampled_nor_referenced_are_not_decoded(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    def counted(self: Decoder, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        for frame in checked(self, frames):
            decoded.append(frame.pts)
            yield frame

    decoded: list[int] = []
    checked = Decoder._checked
    monkeypatch.setattr(Decoder, "_checked", counted)
    sampling.sample_frames(RENDERED[name], resize_px=SIZE_PX)
    assert 16 <= len(decoded) <= share * len(every_frame(RENDERED[name]))


def with_damaged_picture(number: int) -> bytes:
    """64 pictures that are coded independently, one of them overwritten with zeros."""
    body = clips.video(64, container="avi", codec="mjpeg", pixels="yuvj420p")
    start = body.index(b"movi")
    for _ in range(number + 1):
        start = body.index(b"00dc", start) + 8
    end = body.index(b"00dc", start)
    return body[:start] + bytes(end - start) + body[end:]


def test_a_damaged_frame_is_left_out_of_the_list_that_is_sampled() -> None:
    damaged = with_damaged_picture(sampling.middle_of_slices(64)[5])
    assert len(every_frame(damaged)) == 63
    sampled = sampling.sample_frames(damaged, resize_px=SIZE_PX)
    np.testing.assert_array_equal(sampled.frames, sixteen_of(every_frame(damaged)))


def test_damage_to_a_frame_that_is_not_sampled_changes_nothing() -> None:
    damaged = with_damaged_picture(sampling.middle_of_slices(64)[5] + 1)
    whole = clips.video(64, container="avi", codec="mjpeg", pixels="yuvj420p")
    sampled = sampling.sample_frames(damaged, resize_px=SIZE_PX)
    np.testing.assert_array_equal(sampled.frames, sixteen_of(every_frame(whole)))


@pytest.mark.parametrize(
    "options",
    [
        {"movflags": "frag_keyframe+empty_moov", "bf": "3", "g": "20"},
        {"container": "mpegts", "bf": "2", "g": "10"},
        {"container": "matroska", "bf": "3"},
    ],
    ids=["fragmented mp4", "ts", "mkv"],
)
def test_a_truncated_clip_is_sampled_as_far_as_it_goes(options: dict[str, str]) -> None:
    body = clips.video(60, **options)  # type: ignore[arg-type]  # the keys are names of options
    compared = 0
    for share in np.linspace(0.5, 0.99, 50):
        cut = body[: int(share * len(body))]
        try:
            expected = sixteen_of(every_frame(cut))
        except av.FFmpegError:  # cut in the middle of an index
            continue
        sampled = sampling.sample_frames(cut, resize_px=SIZE_PX)
        np.testing.assert_array_equal(sampled.frames, expected, f"cut at {share:.3f}")
        compared += 1
    assert compared > 40


CORNERS = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 0)}


@pytest.mark.parametrize(
    "matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
)
def test_a_rotated_or_mirrored_clip_is_shown_upright(matrix: tuple[int, int, int, int]) -> None:
    body = clips.with_display_matrix(clips.video(3, crf="5"), matrix)
    frame = sampling.sample_frames(body, resize_px=SIZE_PX).frames[0].astype(int)
    a, b, c, d = matrix
    for (x, y), colour in CORNERS.items():
        across, down = a * x + c * y, b * x + d * y
        pixel = frame[3 if down < 0 else -4, 3 if across < 0 else -4]
        assert np.abs(pixel - colour).max() < 60, f"corner {(x, y)} shows {pixel}"


def test_times_are_seconds_from_the_first_frame() -> None:
    sampled = sampling.sample_frames(RENDERED["non-zero start"], resize_px=SIZE_PX)
    assert sampled.info.times_s == pytest.approx([n / 25 for n in sampling.middle_of_slices(40)], abs=1e-3)
    assert sampled.info.duration_s == pytest.approx(40 / 25, abs=0.05)


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize(("clock_starts_s", "picture_starts_s"), [(0, 0), (0, 2), (5, 0), (5, 2)])
def test_the_start_of_the_picture_counts_from_the_start_of_the_file(
    container: str, clock_starts_s: float, picture_starts_s: float
) -> None:
    body = clips.with_sound(picture_starts_s=picture_starts_s, container=container, clock_starts_s=clock_starts_s)
    info = sampling.sample_frames(body, resize_px=SIZE_PX).info
    assert info.picture_start_s == pytest.approx(picture_starts_s, abs=0.012)
    assert info.times_s == pytest.approx([n / 25 for n in sampling.middle_of_slices(50)], abs=1e-3)


def test_every_readable_reference_clip_gives_the_frames_of_a_full_decode(reference_data: Path, thorough: bool) -> None:
    """The short form takes all odd clips and every eighth of the others, half of them with a helper."""
    odd, others = (
        sorted(path for folder in folders for path in (reference_data / folder).iterdir())
        for folders in (["odd_clips"], ["msvd/clips", "msrvtt/clips"])
    )
    assert len(odd) + len(others) == 87
    refused = {}
    taken, limits = [*odd, *others[:: 1 if thorough else 8]], DecodeLimits(decode_cpu_s=60, decode_deadline_s=120)
    ways = [[(path, None), (path, EAGER)] for path in taken]
    for path, helpers in chain(*ways) if thorough else (both[number % 2] for number, both in enumerate(ways)):
        body = path.read_bytes()
        try:
            sampled = sampling.sample_frames(body, resize_px=SIZE_PX, limits=limits, helpers=helpers)
        except errors.CaptionError as error:
            refused[path.name] = error.code
            continue
        expected = sixteen_of(every_frame(body))
        upright = {
            "nasa_13013_rotated.mp4": lambda frame: np.rot90(frame, 1),
            "sample_edit_list.mp4": lambda frame: np.rot90(frame, -1),
            "sample_rotate_and_reflect.mp4": lambda frame: frame.swapaxes(0, 1),
            "video_90.mov": lambda frame: np.rot90(frame, -1),
            "video_180.mov": lambda frame: np.rot90(frame, 2),
        }.get(path.name, lambda frame: frame)
        np.testing.assert_array_equal(sampled.frames, [upright(frame) for frame in expected], err_msg=path.name)
    assert refused == {
        "invalid-bitstream.webm": "undecodable_video",
        "sample_audio_only.mp4": "not_a_video",
        "sample_fragmented_clearkey.mp4": "undecodable_video",
    }


def test_only_the_groups_of_pictures_that_are_needed_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = clips.video(640, size=(32, 32), g="5", sc_threshold="0")
    fed = []
    decode_run = Decoder.decode_run

    def counting(self: Decoder, run: Sequence[TimedPacket[VideoPacket]], wanted: Collection[int]) -> object:
        fed.append(len(run))
        return decode_run(self, run, wanted)

    monkeypatch.setattr(Decoder, "decode_run", counting)
    sampling.sample_frames(body, resize_px=SIZE_PX)
    assert 16 <= sum(fed) <= 16 * 5


REFUSED = {
    "nothing": (b"", errors.EmptyBody),
    "text": (b"hello, I am not a video\n" * 20, errors.NotAVideo),
    "an image": (clips.png(), errors.NotAVideo),
    "audio only": (clips.audio_only(), errors.NotAVideo),
    "an unknown codec": (clips.video(3, codec="ffv1", container="matroska"), errors.NotAVideo),
    "an unknown container": (clips.video(3, codec="mpeg4", container="nut"), errors.NotAVideo),
    "cut before its index": (clips.video(40)[:2000], errors.UndecodableVideo),
    "a playlist": (b"ffconcat version 1.0\nfile canary.mp4\n", errors.NotAVideo),
    "a playlist with an address": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", errors.NotAVideo),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_not_a_video_is_refused_with_a_reason(name: str) -> None:
    body, error = REFUSED[name]
    with pytest.raises(error) as caught:
        sampling.sample_frames(body, resize_px=SIZE_PX)
    assert len(str(caught.value)) > 20


def test_limits_on_bytes_pixels_and_time_hold() -> None:
    body = clips.video(30, size=(320, 240))
    for limits, error in (
        (DecodeLimits(max_body_bytes=100), errors.TooLarge),
        (DecodeLimits(max_pixels=320 * 240 - 1), errors.TooManyPixels),
        (DecodeLimits(decode_deadline_s=1e-6), errors.DecodeTimeout),
    ):
        with pytest.raises(error):
            sampling.sample_frames(body, resize_px=SIZE_PX, limits=limits)
    assert (
        sampling.sample_frames(body, resize_px=SIZE_PX, limits=DecodeLimits(max_pixels=320 * 240)).info.width_px == 320
    )


@pytest.mark.parametrize(
    ("cpu_share", "error"), [(0.95, errors.DecodeTimeout), (0.4, errors.DecodeTimeout), (0.2, errors.Overloaded)]
)
def test_processor_time_decides_about_a_clip_and_the_wall_clock_about_the_machine(
    cpu_share: float, error: type[errors.CaptionError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip that needs 10 s of processor time, on a machine that gives it a share of a core."""
    now_s, needed_s = 0.0, 10.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    monkeypatch.setattr("time.thread_time", lambda: now_s * cpu_share)
    for configured in (DecodeLimits(), DecodeLimits(decode_cpu_s=5, decode_deadline_s=5 if cpu_share > 0.9 else 15)):
        now_s = 0.0
        stopwatch, over = Stopwatch(), None
        while over is None and now_s * cpu_share < needed_s:
            now_s += 0.04
            try:
                stopwatch.check(configured)
            except errors.CaptionError as raised:
                over = raised
        assert type(over) is error
        assert now_s <= configured.decode_deadline_s + 0.05


@pytest.mark.parametrize(("version", "arguments"), [("18.1.0", {"metadata_errors": "replace"}), ("19.0.2", {})])
def test_pyav_gets_only_arguments_that_its_version_has(
    version: str, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "__version__", version)
    assert runpy.run_path(ffmpeg.__file__)["LENIENT_METADATA"] == arguments


@pytest.mark.parametrize(
    ("version", "libraries", "supported"),  # libavformat, libavcodec, libswscale
    [
        ("8.0", ((62, 3, 100), (62, 11, 100), (9, 1, 100)), False),
        ("8.1", ((62, 12, 100), (62, 28, 100), (9, 5, 100)), False),
        ("8.1.1", ((62, 12, 101), (62, 28, 101), (9, 5, 101)), False),
        ("8.1.2", ((62, 12, 102), (62, 28, 102), (9, 5, 102)), True),
        ("9.0", ((63, 0, 100), (63, 0, 100), (10, 0, 100)), True),
    ],
    ids=str,
)
def test_an_ffmpeg_with_known_holes_is_refused(
    version: str, libraries: tuple[tuple[int, int, int], ...], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("libavformat", "libavcodec", "libswscale")
    monkeypatch.setattr(av, "library_versions", dict(zip(names, libraries, strict=True)))
    monkeypatch.setattr(av, "ffmpeg_version_info", version)
    if supported:
        assert ffmpeg.require_supported_ffmpeg() == version
    else:
        with pytest.raises(
            errors.UsageError, match=r"older than FFmpeg 8\.1\.2.*pip install --upgrade --only-binary av"
        ):
            ffmpeg.require_supported_ffmpeg()


def test_every_decoder_on_the_allow_list_is_available() -> None:
    assert ffmpeg.missing_decoders() == []


def test_the_middle_of_slices_is_where_the_definition_puts_it() -> None:
    for length in range(1, 200):
        centres = [(number + 0.5) * length / 16 for number in range(16)]
        assert sampling.middle_of_slices(length) == [int(centre) for centre in centres], json.dumps(length)


@pytest.mark.parametrize(
    ("name", "most_levels"), [("C1-interlaced-flag-h264.mp4", 10), ("D1-hlg.mp4", 60), ("H1-pixelcrop.mkv", 10)]
)
def test_what_users_sent_has_its_colours_in_its_corners(name: str, most_levels: int, reference_data: Path) -> None:
    path = reference_data.parent / "cases" / name
    if not path.exists():
        pytest.skip("the cases are not part of the repository")
    frames = sampling.sample_frames(path.read_bytes(), resize_px=320).frames.astype(int)
    near, far = slice(8, 24), slice(-24, -8)
    corners = np.stack([frames[:, top, left].mean((0, 1, 2)) for top in (near, far) for left in (near, far)])
    true = np.array([(220, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20)])
    assert np.abs(corners - true).max() <= most_levels
    assert np.abs(np.diff(frames, n=2, axis=1)).mean() < 2  # lines of two fields in turns have more


def test_a_segment_that_users_sent_without_its_start_is_named(reference_data: Path) -> None:
    path = reference_data.parent / "cases" / "K5-segment-without-init.m4s"
    if not path.exists():
        pytest.skip("the cases are not part of the repository")
    with pytest.raises(errors.NotAVideo, match="without its initialization segment"):
        sampling.sample_frames(path.read_bytes(), resize_px=SIZE_PX)
