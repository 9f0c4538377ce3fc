"""Independent parsers read the same cues out of subtitles that were written."""

from __future__ import annotations

import html
import io

import av
import webvtt

from etenet.captioning import subtitles

SEGMENTS = [
    {"start_s": 0.0, "end_s": 10.0, "caption": "a dog <runs> & jumps"},
    {"start_s": 10.0, "end_s": 20.0, "caption": "a dog <runs> & jumps"},
    {"start_s": 20.0, "end_s": 3599.999, "caption": "ein Hund läuft"},
    {"start_s": 3599.999, "end_s": 3601.5, "caption": "a dog <runs> & jumps"},
]
CUES = [
    (0.0, 20.0, "a dog <runs> & jumps"),
    (20.0, 3599.999, "ein Hund läuft"),
    (3599.999, 3601.5, "a dog <runs> & jumps"),
]


def test_webvtt_is_read_by_two_parsers_and_equal_neighbours_are_one_cue() -> None:
    written = subtitles.vtt(SEGMENTS)
    cues = [(start_s, end_s, html.escape(text, quote=False)) for start_s, end_s, text in CUES]
    assert [cue.text for cue in webvtt.from_string(written).captions] == [text for *_, text in cues]
    assert decoded(written, "webvtt") == cues


def test_subrip_is_read_by_two_parsers() -> None:
    written = subtitles.srt(SEGMENTS)
    cues = webvtt.from_buffer(io.StringIO(written), format="srt").captions
    assert [cue.raw_text for cue in cues] == [text for *_, text in CUES]
    assert decoded(written, "srt") == CUES


def decoded(text: str, form: str) -> list[tuple[float, float, str]]:
    """The cues that FFmpeg reads."""
    cues = []
    with av.open(io.BytesIO(text.encode()), format=form) as container:
        for packet in container.demux(subtitles=0):
            if packet.pts is not None:
                start_s = float(packet.pts * packet.time_base)
                cues.append((start_s, start_s + float(packet.duration * packet.time_base), bytes(packet).decode()))
    return cues


def test_plain_text_has_a_line_for_each() -> None:
    assert subtitles.plain(SEGMENTS).splitlines() == [text for *_, text in CUES]


def test_a_segment_without_a_caption_leaves_a_gap_between_two_cues() -> None:
    times = [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0)]
    segments = [
        {"start_s": start_s, "end_s": end_s, "caption": caption}
        for (start_s, end_s), caption in zip(times, ("a dog", None, "a dog"), strict=True)
    ]
    expected = [(0.0, 10.0, "a dog"), (20.0, 30.0, "a dog")]
    assert decoded(subtitles.vtt(segments), "webvtt") == decoded(subtitles.srt(segments), "srt") == expected
    assert subtitles.plain(segments[1:2]) == ""


def test_without_segments_there_is_still_a_file() -> None:
    assert subtitles.vtt([]).startswith("WEBVTT\n")
    assert subtitles.srt([]) == ""
