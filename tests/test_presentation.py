"""What a container crops is not in the frames, as in FFmpeg's own command."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import av
import numpy as np
import pytest
from av import logging

from etenet import errors
from etenet.sandbox.pool import Sandbox
from etenet.video.limits import DecodeLimits
from etenet.video.presentation import UNCROPPED, Crop, presentation
from etenet.video.sampling import sample_frames
from tests import clips, test_hdr, test_interlaced
from tests.test_interlaced import SIZE_PX, sixteen_of, through_a_filter

SIZE = WIDTH, HEIGHT = 160, 128
CROPS = [
    Crop(left=32),
    Crop(bottom=16),
    Crop(left=4, right=10, top=6, bottom=20),
    Crop(left=5, right=3, top=7, bottom=2),  # between pixels of the chroma
    Crop(left=100, right=56, bottom=124),  # four pixels are left
]
PLAIN = clips.video(30, size=SIZE, bf="2")


def cropped(body: bytes, crop: Crop, container: str = "mp4") -> bytes:
    body = clips.with_crop(body, SIZE, left=crop.left, right=crop.right, top=crop.top, bottom=crop.bottom)
    return body if container == "mp4" else clips.remuxed(body, container)


def as_ffmpeg_crops(body: bytes, crop: Crop) -> list[np.ndarray]:
    size = f"iw-{crop.left + crop.right}:ih-{crop.top + crop.bottom}"
    return through_a_filter(body, "crop", f"{size}:{crop.left}:{crop.top}")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("crop", CROPS)
def test_what_a_container_crops_is_not_shown(crop: Crop, container: str) -> None:
    clip = sample_frames(cropped(PLAIN, crop, container), resize_px=SIZE_PX)
    np.testing.assert_array_equal(clip.frames, sixteen_of(as_ffmpeg_crops(PLAIN, crop)))
    shown_size = WIDTH - crop.left - crop.right, HEIGHT - crop.top - crop.bottom
    assert (clip.info.width_px, clip.info.height_px) == shown_size


def test_bars_that_are_cropped_leave_no_trace() -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[32:-32] = 200, 120, 40
    body = clips.video(pictures=[picture] * 3, size=SIZE, crf="5")
    for container in ("mp4", "matroska"):
        frames = sample_frames(cropped(body, Crop(top=32, bottom=32), container), resize_px=SIZE_PX).frames
        assert np.abs(frames.astype(int) - (200, 120, 40)).max() < 20
    assert sample_frames(body, resize_px=SIZE_PX).frames.min() == 0


def test_a_picture_is_cropped_before_it_is_rotated() -> None:
    turned = clips.with_display_matrix(PLAIN, (0, 1, -1, 0))
    crop = Crop(left=40, top=16)
    upright = sample_frames(cropped(PLAIN, crop), resize_px=SIZE_PX).frames
    rotated = sample_frames(cropped(turned, crop), resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(rotated, np.rot90(upright, -1, axes=(1, 2)))


def test_cropping_of_the_codec_is_not_applied_twice() -> None:
    """H.264 codes whole macroblocks of 16 pixels, and says itself what to leave out."""
    body = clips.video(5, size=(150, 122))
    with av.open(io.BytesIO(body)) as container:
        assert presentation(container, 0).crop == UNCROPPED
    frames = sample_frames(body, resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(frames, sixteen_of(through_a_filter(body, "null", "")))


def test_each_stream_has_its_own_crop() -> None:
    file = io.BytesIO()
    sources = [PLAIN, cropped(PLAIN, Crop(left=8, right=2, top=4, bottom=6)), PLAIN]
    with av.open(file, "w", format="matroska") as out:
        for body in sources:
            with av.open(io.BytesIO(body)) as source:
                stream = out.add_stream_from_template(source.streams.video[0])
                stream.metadata["title"] = "Stream #0:1: Video\n    Side data:\n      Frame Cropping: 9/9/9/9"
        for number, body in enumerate(sources):
            with av.open(io.BytesIO(body)) as source:
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = out.streams[number]
                        out.mux(packet)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert [bool(presentation(container, number).crop) for number in range(3)] == [False, True, False]
        assert presentation(container, 1).crop == Crop(left=8, right=2, top=4, bottom=6)


@pytest.mark.parametrize("crop", [Crop(left=100, right=60), Crop(top=100, bottom=64)])
def test_a_crop_that_leaves_nothing_is_ignored_as_ffmpeg_does(crop: Crop) -> None:
    frames = sample_frames(cropped(PLAIN, crop), resize_px=SIZE_PX).frames
    np.testing.assert_array_equal(frames, sample_frames(PLAIN, resize_px=SIZE_PX).frames)


def test_a_crop_that_leaves_too_little_to_show_is_refused_with_the_reason() -> None:
    with pytest.raises(errors.UndecodableVideo, match="crops its 160 x 128 pixels to 1 x 128"):
        sample_frames(cropped(PLAIN, Crop(left=159)), resize_px=SIZE_PX)


def test_reading_a_container_leaves_the_log_as_it_was_for_every_thread() -> None:
    found: list[Crop] = []

    def look() -> None:
        for _ in range(20):
            with av.open(io.BytesIO(body)) as container:
                found.append(presentation(container, 0).crop)

    body, crop = cropped(PLAIN, CROPS[2]), CROPS[2]
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [crop] * 80
    assert logging.get_level() is None


INTERLACED = test_interlaced.case(test_interlaced.panning, 40, "tff", "h264 in mp4")
SPECIAL = {
    "cropped": cropped(PLAIN, CROPS[2]),
    "interlaced": INTERLACED,
    "interlaced and cropped": cropped(INTERLACED, CROPS[2]),
    "HDR": test_hdr.hdr_clip(test_hdr.pq_signal(test_hdr.light(test_hdr.COLOURS)), 16),
    "Dolby Vision": clips.with_dolby_vision(PLAIN, 5, 0),
}


def test_a_sealed_decoder_process_gives_the_same_frames() -> None:
    """It can import nothing, and start no threads."""
    sandbox = Sandbox(resize_px=SIZE_PX, limits=DecodeLimits(decode_deadline_s=30), processes=1)
    try:
        assert sandbox.filter_fault is None
        for name, body in SPECIAL.items():
            if name == "Dolby Vision":
                with pytest.raises(errors.UndecodableVideo, match="Dolby Vision"):
                    sandbox.submit(body).result()
                continue
            (clip,), expected = sandbox.submit(body).result(), sample_frames(body, resize_px=SIZE_PX)
            np.testing.assert_array_equal(clip.frames, expected.frames, name)
            assert replace(clip.info, decode_ms=0) == replace(expected.info, decode_ms=0)
    finally:
        sandbox.close()
