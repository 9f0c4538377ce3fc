"""What is no video is named, with what to send instead; what is a video is not taken for anything else."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from etenet import errors
from etenet.video import not_videos, sampling
from tests import clips, numbered
from tests.hostile import foreign
from tests.hostile.boxes import box
from tests.hostile.damage import containers
from tests.test_sandbox import decoding, error_of

SIZE_PX = 32
CLIP = clips.video(20)
STREAMED = clips.video(50, g="10", movflags="frag_keyframe+empty_moov+default_base_moof")
WEBM = clips.video(20, codec="libvpx", container="webm")
FOREIGN = {file.name: file.body for file in foreign.files(0)}


def picture(kind: str, *, frames: int = 1) -> bytes:
    first, *others = (Image.fromarray(clips.pattern(number, 64, 48)) for number in range(frames))
    file = io.BytesIO()
    first.save(file, kind, **({"save_all": True, "append_images": others, "duration": 100} if others else {}))
    return file.getvalue()


def motion_photo(video: bytes) -> bytes:
    return picture("jpeg") + b"MotionPhoto_Data" + video + b"SEFT"


def heic() -> bytes:
    """As a phone writes it but for the codec, for which nothing here has an encoder."""
    return picture("avif").replace(b"ftypavif", b"ftypheic", 1)


def as_json(body: bytes) -> bytes:
    """As PHP writes it, which escapes the slashes."""
    return (
        json.dumps({"id": 1, "video": f"data:video/mp4;base64,{base64.b64encode(body).decode()}"})
        .replace("/", r"\/")
        .encode()
    )


SEGMENT = STREAMED[STREAMED.index(b"moof") - 4 :]
REFUSED: dict[str, tuple[bytes, str]] = {
    **{
        f"a {kind} photograph": (picture(kind), rf"a still image \({kind}\)")
        for kind in ("jpeg", "png", "webp", "avif")
    },
    **{
        f"a {kind} picture": (FOREIGN[f"a {kind} picture"], f"a still image.*{kind}") for kind in ("bmp", "tiff", "ico")
    },
    "a HEIC photograph": (heic(), r"a still image \(HEIC\)"),
    "the beginning of one": (heic()[:48], r"a still image \(HEIC\)"),
    "a HEIF photograph of another brand": (
        picture("avif").replace(b"ftypavif", b"ftypmif1", 1),
        r"a still image \(HEIF\)",
    ),
    "a raw photograph": (CLIP.replace(b"ftypisom", b"ftypcrx ", 1), "a raw photograph"),
    "a moving WebP": (picture("webp", frames=3), "an animated WebP picture"),
    "a moving PNG": (picture("png", frames=3), "an animated PNG picture"),
    "a motion photo": (motion_photo(CLIP), "a motion photo"),
    "a HEIC motion photo": (heic() + box(b"mpvd", CLIP), "a motion photo"),
    "a HEIC photograph with a video behind it": (heic() + CLIP, "a motion photo"),
    "zlib": (zlib.compress(CLIP), "compressed with zlib; .*Content-Encoding: deflate"),
    "AppleDouble": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ", r"macOS .*; send the file without \._"),
    "base64 in quotes": (b'"' + base64.b64encode(CLIP) + b'"', "a video in base64"),
    "base64 as Python shows it": (repr(base64.b64encode(CLIP)).encode(), "a video in base64"),
    "base64 in a form": (urlencode({"video": base64.b64encode(CLIP)}).encode(), "a video in base64"),
    "gzip": (gzip.compress(CLIP), "compressed with gzip; .*Content-Encoding: gzip"),
    "curl -d": (CLIP.translate(None, b"\0\r\n"), "curl -d leaves out; .*--data-binary"),
    "MP4 read as text": (CLIP.decode(errors="replace").encode(), "read as text.*binary"),
    "WebM read as text": (WEBM.decode("latin-1").encode(), "read as text.*binary"),
    "zip": (FOREIGN["a zipped clip"], "a ZIP archive"),
    "tar": (FOREIGN["a clip in a tar"], "a tar archive"),
    "base64": (base64.b64encode(CLIP), "a video in base64; .* themselves"),
    "base64 in lines": (base64.encodebytes(WEBM), "a video in base64; .* themselves"),
    "base64 of ts": (base64.b64encode(clips.video(20, container="mpegts")), "a video in base64"),
    "a data address": (b"data:video/mp4;base64," + base64.b64encode(CLIP), "data: address"),
    "base64 in JSON": (as_json(CLIP), "JSON with a file in base64"),
    "JSON": (b'\xef\xbb\xbf\n{"video": "http://localhost/clip.mp4"}', "JSON; .* themselves"),
    "JSON in UTF-16": ('{"video": 1}'.encode("utf-16"), "JSON; "),
    "an HTML page": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>", "an HTML page; "),
    "a segment": (SEGMENT, "a segment of a DASH or HLS stream without its initialization segment; .*cat INIT"),
    "a segment with its index": (
        box(b"styp", b"msdh") + box(b"sidx", bytes(24)) + SEGMENT,
        "without its initialization",
    ),
    "a segment of WebM": (WEBM[WEBM.index(b"\x1f\x43\xb6\x75") :], "a segment of a WebM stream"),
    "an HLS playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n", "an HLS playlist"),
    "a DASH manifest": (b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>', "a DASH manifest"),
    "SubRip": (FOREIGN["SubRip"], "a file of subtitles"),
    "WebVTT": (FOREIGN["WebVTT"], "a file of subtitles"),
    "an address": (b"https://example.org/clip.mp4\n", "an address, and the server fetches none"),
    "a file's name": (b"clip.mp4", r"text \('clip.mp4'\).*-F data=@clip.mp4"),
    "text of letters that begins like BMP": ("BM und weitere Wörter\n".encode() * 500, "text"),
    "a form": (
        b'--x7\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + CLIP,
        "a multipart form",
    ),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    **{name: (FOREIGN[name], "an audio file") for name in ("wav", "mp3", "flac", "adts")},
    "only sound": (clips.audio_only(), "no video stream"),
    "H.264 alone": (clips.video(5, container="h264"), "a bare video stream"),
    "H.264 alone, with short start codes": (clips.video(5, container="h264")[1:], "a bare video stream"),
    "MPEG-4 alone": (clips.video(5, codec="mpeg4", container="m4v"), "a bare video stream"),
    "JPEGs alone": (
        clips.video(5, codec="mjpeg", container="mjpeg", pixels="yuvj420p"),
        "a bare video stream .*ffmpeg -i FILE",
    ),
    "the header of an HTTP answer": (b"HTTP/1.1 200 OK\r\n\r\n" + CLIP, r"a video behind 19 bytes .* tail -c \+20"),
    "line breaks": (b"\n\n" + WEBM, r"a video behind 2 bytes .* tail -c \+3"),
    "an unfinished download": (bytes(2048) + CLIP[2048:], "begins with zeros"),
    "an image of a disc": (bytes(32768) + b"\1CD001\1" + bytes(2040), "an image of a disc"),
    "another container": (clips.video(5, codec="mpeg4", container="nut"), "a container"),
    "only the start of a streamed video": (STREAMED[: STREAMED.index(b"moof") - 4], "only the start of a streamed"),
    "nothing": (b"", "the body is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_is_named_in_one_sentence_with_what_to_send(name: str) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(errors.CaptionError, match=f"(?i){reason}") as refused:
        sampling.sample_frames(body, resize_px=SIZE_PX)
    assert "\n" not in str(refused.value)
    if name not in ("nothing", "only sound", "only the start of a streamed video"):
        assert refused.value.code == "not_a_video"
        assert ";" in str(refused.value)


ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "0123456789abcdef0123456789abcdef",
}


@pytest.mark.parametrize("muxing", [{}, {"movflags": "frag_keyframe+empty_moov"}], ids=["whole", "in fragments"])
@pytest.mark.parametrize("kind", ["h264", "hevc"])
def test_an_encrypted_video_is_named_and_not_shown(kind: str, muxing: dict[str, str]) -> None:
    source = numbered.Track(source=numbered.encoded(kind))
    body = numbered.muxed("mp4", source, **muxing, **ENCRYPTION)
    of_subsamples = body.index(b"senc") + 20
    misread = body[:of_subsamples] + b"\xff\xff" + body[of_subsamples + 2 :]  # FFmpeg does not open some real ones
    for encrypted in (body, misread, numbered.encrypted_webm()):
        with pytest.raises(errors.UndecodableVideo, match=r"the video is encrypted.*; send it decrypted"):
            sampling.sample_frames(encrypted, resize_px=SIZE_PX)


def test_a_sealed_process_gives_the_same_reasons() -> None:
    """It cannot import anything, and much of Python is imported when it is first used."""
    with decoding("etenet.sandbox.worker:main") as sandbox:
        for name, (body, _) in REFUSED.items():
            with pytest.raises(errors.CaptionError) as refused:
                sampling.sample_frames(body, resize_px=SIZE_PX)
            assert str(error_of(sandbox, body)) == str(refused.value), name


@pytest.mark.parametrize(
    "make",
    [
        motion_photo,
        lambda video: heic() + box(b"mpvd", video),
        lambda video: heic() + video,
        lambda video: b"HTTP/1.1 200 OK\r\n\r\n" + video,
    ],
    ids=["JPEG", "HEIC", "HEIC with it behind", "the header of an HTTP answer"],
)
def test_what_is_said_about_a_video_behind_something_else_gives_it(make: Callable[[bytes], bytes]) -> None:
    body = make(CLIP)
    with pytest.raises(errors.NotAVideo) as refused:
        sampling.sample_frames(body, resize_px=SIZE_PX)
    first_byte = int(str(refused.value).partition("tail -c +")[2].split()[0])
    alone = sampling.sample_frames(body[first_byte - 1 :], resize_px=SIZE_PX)
    np.testing.assert_array_equal(alone.frames, sampling.sample_frames(CLIP, resize_px=SIZE_PX).frames)


def test_a_segment_behind_its_initialization_segment_is_captioned() -> None:
    start = STREAMED.index(b"moof") - 4
    joined = sampling.sample_frames(STREAMED[:start] + box(b"styp", b"msdh") + STREAMED[start:], resize_px=SIZE_PX)
    np.testing.assert_array_equal(joined.frames, sampling.sample_frames(STREAMED, resize_px=SIZE_PX).frames)


def test_an_animated_avif_is_a_video() -> None:
    info = sampling.sample_frames(picture("avif", frames=20), resize_px=SIZE_PX).info
    assert (info.codec, info.distinct_frames) == ("av1", 16)


@pytest.mark.parametrize("name", containers())
def test_a_video_is_no_still_image_and_a_damaged_one_stays_a_video(name: str) -> None:
    body = containers()[name]
    assert not_videos.still_image(body) is None
    assert isinstance(not_videos.refusal(body), errors.UndecodableVideo)


@pytest.mark.parametrize("kind", [b"wide", b"free", b"skip"])
def test_a_recording_without_its_index_is_cut_short_whatever_its_first_box(kind: bytes) -> None:
    body = struct.pack(">I4sI4s", 8, kind, 0, b"mdat") + CLIP[99:]
    with pytest.raises(errors.UndecodableVideo, match="damaged or cut short"):
        sampling.sample_frames(body, resize_px=SIZE_PX)


def test_many_boxes_and_many_false_starts_cost_little() -> None:
    """Their number is bounded, and what is searched for is searched once."""
    boxes, marks = struct.pack(">I4s", 8, b"free") * 10**6, b"\xff\xd8\xff" + b"ftyp" * 10**6
    assert not_videos.still_image(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + boxes) is None
    assert "still image (JPEG)" in str(not_videos.refusal(marks))


@given(body=st.binary(max_size=600) | st.text(max_size=600).map(str.encode))
def test_any_bytes_get_a_reason(body: bytes) -> None:
    assert 20 < len(str(not_videos.refusal(body))) < 400
    assert not_videos.still_image(body) is None or body[4:8] == b"ftyp"
