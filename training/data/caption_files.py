"""Captions of the user's own clips, from JSON, JSON lines or CSV.

    {"clip": ["sentence", ...] or "sentence", ...}
    {"video": "clip", "captions": ["sentence", ...]} or {"video": "clip", "caption": "sentence"} per line
    video,caption          a table with these columns

A clip is named by its file or an id. A line may also have the `split` of its clip, the `group` of clips that it belongs
to (the film that it was cut from, so that pieces of one film never fall on both sides of a split), and for features its
`row`. This module does not know where the clips are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from etenet.errors import UsageError
from etenet.files.rows import Row, rows

SPLITS = {name: name for name in ("train", "validation", "test")} | {"validate": "validation", "val": "validation"}
_LIST_IN_A_CELL = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)  # as programs save one in a table
_FIX = 'give {"clip": ["sentence", ...]}, {"video": "clip", "captions": [...]} per line, or CSV with video and caption'


@dataclass(slots=True)
class Described:
    """Everything that a file has about one clip."""

    captions: list[str] = field(default_factory=list)
    split: str | None = None
    row: int | None = None
    group: str | None = None  # what it was cut from, shared by all clips from there


def read_captions(path: Path) -> dict[str, Described]:
    """Clips in the order in which the file first names them."""
    clips: dict[str, Described] = {}
    for row in rows(path, header=("video", "caption"), by_clip=True, prose="caption", fix=_FIX):
        video, described = _described_by(row)
        clip = clips.setdefault(video, replace(described, captions=[]))
        if replace(described, captions=clip.captions) != clip:
            raise UsageError(f"{row.place}: {video} had another split, group or row further up; make them the same")
        clip.captions += described.captions
    if not clips:
        raise UsageError(f"{path} has no clip; {_FIX}")
    return clips


def _described_by(row: Row) -> tuple[str, Described]:
    row.need("video")
    video, captions = row.values["video"], row.values.get("captions")
    if not isinstance(video, str) or not video:
        raise UsageError(f'{row.place}: no clip is named; give its file or id as "video"')
    if captions is None:
        row.need("caption")
        captions = row.values["caption"]
    if isinstance(captions, str) and _LIST_IN_A_CELL.fullmatch(captions.strip()):
        raise UsageError(f"{row.place}: {video} has a list of captions in one cell; give each caption a row of its own")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UsageError(f"{row.place}: the captions of {video} must be a sentence or a list of sentences")
    return video, Described(captions, _split(row, video), _row_number(row, video), _group(row, video))


def _split(row: Row, video: str) -> str | None:
    split = _cell(row, "split")
    if split is None or split in SPLITS:
        return split and SPLITS[split]
    raise UsageError(f"{row.place}: the split of {video} is {split!r}; it must be train, validation or test")


def _row_number(row: Row, video: str) -> int | None:
    match _cell(row, "row"):
        case None:
            return None
        case int(number) if number >= 0:
            return number
        case str(digits) if digits.isdecimal():
            return int(digits)
        case other:
            raise UsageError(f"{row.place}: the row of {video} is {other!r}; it must be a whole number from 0")


def _group(row: Row, video: str) -> str | None:
    match _cell(row, "group"):
        case None:
            return None
        case str(name) | int(name):
            return str(name)
        case other:
            raise UsageError(f"{row.place}: the group of {video} is {other!r}; it must be a name or a number")


def _cell(row: Row, column: str) -> Any:
    """A value; None if it is missing or blank, as cells of a table are."""
    value = row.values.get(column)
    return value.strip() or None if isinstance(value, str) else value
