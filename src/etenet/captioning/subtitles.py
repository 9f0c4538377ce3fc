"""Captions of the segments of a video -> text, WebVTT and SubRip. Equal captions of consecutive segments become one.

A segment without a caption (its confidence was lower than the one asked for) leaves a gap.

Segments count from the first frame, players from the start of the file: `on_players_clock` converts.

Source of WebVTT: https://www.w3.org/TR/webvtt1/. SubRip has no standard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

Segments: TypeAlias = Sequence[Mapping[str, Any]]
"""Each with `start_s`, `end_s` and `caption`, in order; the caption may be None."""


def on_players_clock(segments: Segments, picture_start_s: float) -> Segments:
    """The same segments of a video whose first frame is shown `picture_start_s` after the start of the file."""
    return [
        {**segment, **{name: segment[name] + picture_start_s for name in ("start_s", "end_s")}} for segment in segments
    ]


def plain(segments: Segments) -> str:
    return "".join(f"{text}\n" for _, _, text in _cues(segments))


def vtt(segments: Segments) -> str:
    cues = (f"{clock(a, '.')} --> {clock(b, '.')}\n{_escaped(text)}\n" for a, b, text in _cues(segments))
    return "\n".join(("WEBVTT\n", *cues))


def srt(segments: Segments) -> str:
    cues = (
        f"{number}\n{clock(a, ',')} --> {clock(b, ',')}\n{text}\n"
        for number, (a, b, text) in enumerate(_cues(segments), start=1)
    )
    return "\n".join(cues)


def _cues(segments: Segments) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of each cue."""
    for text, same in groupby(segments, key=lambda segment: segment["caption"]):
        segments_of_cue = list(same)
        if text is not None:
            yield segments_of_cue[0]["start_s"], segments_of_cue[-1]["end_s"], text


def clock(seconds: float, mark: str) -> str:
    """As in 00:01:02.345, with a mark before the milliseconds."""
    whole, ms = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{ms:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
