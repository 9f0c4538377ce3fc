"""Captions of your own clips, out of a JSON, JSONL or CSV file.

    F.json     {"clip": ["sentence", ...] or "sentence", ...}
    F.jsonl    {"video": "clip", "captions": ["sentence", ...]} or {"video": "clip", "caption": "sentence"} per line
    F.csv      columns video, caption

A clip is named by its file or its id. JSONL and CSV may say its `split`, and, for features, its `row`. Every error
names the file, the line where there is one, and the mend. Knows nothing of where the clips are.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etenet.errors import UsageError

SPLITS = {name: name for name in ("train", "validation", "test")} | {"validate": "validation", "val": "validation"}


@dataclass(slots=True)
class Described:
    """What a file says about one clip, wherever in the file it says so."""

    captions: list[str] = field(default_factory=list)
    split: str | None = None
    row: int | None = None


def read_captions(path: Path) -> dict[str, Described]:
    """Clips in the order of their first mention."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
        ".json": _json_entries,
        ".jsonl": _jsonl_entries,
        ".csv": _csv_entries,
    }
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path}: cannot tell the format; name it .json, .jsonl or .csv")
    clips: dict[str, Described] = {}
    for place, entry in readers[path.suffix.lower()](path):
        video, captions, split, row = _checked(place, entry)
        clip = clips.setdefault(video, Described(split=split, row=row))
        if (clip.split, clip.row) != (split, row):
            raise UsageError(f"{place}: {video} has another split or row here than further up; make them one")
        clip.captions += captions
    if not clips:
        raise UsageError(f"{path} names no clip; see python -m training.prepare folder --help for the formats")
    return clips


def _checked(place: str, entry: dict[str, Any]) -> tuple[str, list[str], str | None, int | None]:
    video, said, split, row = entry.get("video"), entry.get("captions"), entry.get("split"), entry.get("row")
    if not isinstance(video, str) or not video:
        raise UsageError(f'{place}: no clip is named; say "video": "FILE OR ID"')
    said = entry.get("caption") if said is None else said
    captions = [said] if isinstance(said, str) else said
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UsageError(f"{place}: the captions of {video} must be a sentence or a list of sentences")
    if split is not None and split not in SPLITS:
        raise UsageError(f"{place}: the split of {video} is {split!r}; it must be train, validation or test")
    if row is not None and (not isinstance(row, int) or row < 0):
        raise UsageError(f"{place}: the row of {video} is {row!r}; it must be a whole number from 0")
    return video, captions, None if split is None else SPLITS[split], row


def _json_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(pairs)) < len(pairs):
            repeated = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
            raise UsageError(f"{path}: {repeated} stands in it twice; put its sentences into one list")
        return names

    clips = parse_json(path, read_text(path), object_pairs_hook=once)
    if not isinstance(clips, dict):
        raise UsageError(f'{path}: it must be an object like {{"clip.mp4": ["sentence", ...]}}; lists are for .jsonl')
    for video, captions in clips.items():
        yield str(path), {"video": video, "captions": captions}


def _jsonl_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: it also cuts at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            entry = parse_json(path, line, first_line=number)
            if not isinstance(entry, dict):
                raise UsageError(f'{place}: it must be an object like {{"video": "clip.mp4", "captions": [...]}}')
            yield place, entry


def _csv_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in read_csv(path, ("video", "caption")):
        place = f"{path}, line {number}"
        entry: dict[str, Any] = {name: row[name] for name in ("video", "caption")}
        entry |= {name: row[name].strip() for name in ("split", "row") if (row.get(name) or "").strip()}
        if "row" in entry:
            try:
                entry["row"] = int(entry["row"])
            except ValueError as error:
                raise UsageError(f"{place}: the row is {entry['row']!r}; it must be a whole number from 0") from error
        yield place, entry


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the number of their last line; quoted cells may hold line breaks. The columns must be there."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        named = reader.fieldnames or ()
        if missing := [name for name in columns if name not in named]:
            raise UsageError(
                f"{path}, line 1: no column {missing[0]} among {', '.join(named) or 'none'}; "
                f"it needs the columns {', '.join(columns)}"
            )
        for row in reader:
            if short := [name for name in columns if row[name] is None]:
                raise UsageError(f"{path}, line {reader.line_num}: no {short[0]}; quote cells that hold line breaks")
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}; save it again as comma-separated UTF-8") from error


def parse_json(path: Path, text: str, *, first_line: int = 1, **hooks: Any) -> Any:
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        hint = "; one object per line is for .jsonl" if error.msg == "Extra data" else ""
        raise UsageError(f"{place}: this is not JSON ({error.msg}); mend it there{hint}") from error


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return decoded(path, path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name the file that holds the captions") from error


def decoded(path: Path, body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + body[: error.start].count(b"\n")
        raise UsageError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8") from error
