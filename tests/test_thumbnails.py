"""The frames of a clip as small JPEGs."""

from __future__ import annotations

import io
from base64 import b64decode
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray

import etenet
from etenet.errors import BadOption
from etenet.video.sampling import sample_frames
from etenet.video.thumbnails import thumbnails
from tests import clips
from tests.conftest import REPOSITORY

CLIP = (REPOSITORY / "examples" / "umbrella-crossing-sky.mp4").read_bytes()
# Of TorchServe, less what the rest of the longest response takes.
MOST_BYTES = 6_000_000


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(jpeg)) as file:
        (frame,) = file.decode(video=0)
        return frame.to_ndarray(format="rgb24")


def test_a_thumbnail_shows_its_frame() -> None:
    clip = sample_frames(clips.video(16, size=(128, 72), crf="5"), resize_px=128)
    for frame, jpeg in zip(clip.frames, thumbnails(clip, longer_px=128), strict=True):
        small = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(128, 72).to_ndarray(format="rgb24")
        assert np.abs(pixels(jpeg).astype(int) - small).mean() < 12


@pytest.mark.parametrize(
    ("size", "aspect", "matrix", "shown"),
    [
        ((96, 64), None, None, (64, 96)),
        ((64, 96), None, None, (96, 64)),
        ((96, 64), None, (0, 1, -1, 0), (96, 64)),  # turned by a quarter
        ((96, 64), Fraction(2, 3), None, (96, 96)),  # pixels higher than wide
        ((512, 16), None, None, (3, 96)),
    ],
)
def test_thumbnails_have_the_shape_that_players_show(
    size: tuple[int, int],
    aspect: Fraction | None,
    matrix: tuple[int, int, int, int] | None,
    shown: tuple[int, int],
) -> None:
    body = clips.video(3, size=size, aspect=aspect)
    body = clips.with_display_matrix(body, matrix) if matrix else body
    for jpeg in thumbnails(sample_frames(body, resize_px=64), longer_px=96):
        assert pixels(jpeg).shape == (*shown, 3)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_the_container_may_say_which_shape_pixels_have(codec: str) -> None:
    body = clips.with_pixel_aspect(clips.video(3, codec=codec), Fraction(2, 3))
    for jpeg in thumbnails(sample_frames(body, resize_px=64), longer_px=96):
        assert pixels(jpeg).shape == (96, 96, 3)


@pytest.mark.parametrize(("aspect", "shown"), [(1e-9, (96, 1)), (1e9, (1, 96))])
def test_no_thumbnail_is_empty(aspect: float, shown: tuple[int, int]) -> None:
    clip = sample_frames(clips.video(3), resize_px=64)
    jpegs = thumbnails(replace(clip, info=replace(clip.info, shown_aspect=aspect)), longer_px=96)
    assert {pixels(jpeg).shape for jpeg in jpegs} == {(*shown, 3)}


def test_a_response_has_the_thumbnails_that_were_asked_for(captioner: etenet.Captioner) -> None:
    caption = captioner.caption(CLIP, etenet.CaptionOptions(thumbnails=48))
    urls = caption.as_dict()["frames"]["thumbnails"]
    assert [b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls] == list(caption.thumbnails)
    assert len(urls) == 16
    without = captioner.caption(CLIP)
    assert not without.thumbnails
    assert "thumbnails" not in without.as_dict()["frames"]
    assert without.text == caption.text


def test_each_segment_has_thumbnails_of_its_own(captioner: etenet.Captioner) -> None:
    options = etenet.CaptionOptions(thumbnails=32, cut=etenet.Cut(segment_s=1))
    (outcome,) = captioner.caption_batch([CLIP], [options])
    assert isinstance(outcome, etenet.SegmentCaptions)
    first, second = (segment["frames"]["thumbnails"] for segment in outcome.as_dict()["segments"])
    assert len(first) == len(second) == 16
    assert first != second


@pytest.mark.parametrize("size_px", [0, 1, 15, 129])
def test_other_sizes_are_refused(size_px: int) -> None:
    with pytest.raises(BadOption, match="thumbnails must be from 16 to 128"):
        etenet.CaptionOptions(thumbnails=size_px)


def test_the_longest_response_fits_even_if_all_frames_are_noise() -> None:
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 2, (128, 128, 3)) * 255).astype(np.uint8) for _ in range(16)]
    body = clips.video(pictures=noise, size=(128, 128), pixels="yuv444p", qp="0")
    jpegs = thumbnails(sample_frames(body, resize_px=128), longer_px=128)
    segments = etenet.DecodeLimits().max_segments
    assert segments * sum(map(len, jpegs)) * 4 / 3 < MOST_BYTES
