"""JSON with captions -> sentences by clip, for predictions and references alike.

    {"video id": ["sentence", ...], ...}                         or one sentence instead of a list
    {"video id": {"captions": ["sentence", ...], ...}, ...}      the same with more about each clip
    {"annotations": [{"image_id": ..., "caption": ...}, ...]}    COCO's annotations, or only the list, COCO's results
    {"video": ..., "caption": ...}                               JSON lines, as `etenet caption` writes them; a clip may
                                                                 have several lines, or a list as "captions"

The contents of a file decide, not its name.
"""

from __future__ import annotations

from pathlib import Path

from etenet.errors import UsageError, named
from etenet.files import as_it_looks
from etenet.files.rows import Row, rows, shown

_FIX = 'give {"video id": ["sentence", ...]}, COCO caption JSON, or {"video": ..., "caption": ...} per line'


def read(path: Path) -> dict[str, list[str]]:
    """Sentences by clip, in the order of the file. Raises `UsageError`, also if a clip has an error or null instead."""
    captions: dict[str, list[str]] = {}
    failed: list[str] = []
    for row in rows(path, by_clip=True, fix=_FIX):
        clip, sentences = _clip_of(row), _sentences_of(row)
        if sentences is None:
            failed.append(clip)
        else:
            captions.setdefault(clip, []).extend(sentences)
    if failed:
        raise UsageError(
            f"{path} has an error or null instead of a caption for {named(failed)}; "
            "caption these clips again, or remove them from predictions and references"
        )
    if not captions:
        raise UsageError(f"{path} has no caption; {_FIX}")
    return captions


def _clip_of(row: Row) -> str:
    match row.values:
        case {"video": str(clip) | int(clip)} | {"image_id": str(clip) | int(clip)}:
            return as_it_looks(str(clip))
    raise UsageError(f"{row.place}: no clip is named in {shown(row.values)}; {_FIX}")


def _sentences_of(row: Row) -> list[str] | None:
    """None if the clip has an error, or a caption was withheld."""
    match row.values:
        case {"caption": str(sentence)} | {"captions": str(sentence)}:
            return [sentence]
        case {"captions": [*sentences]} if all(isinstance(sentence, str) for sentence in sentences):
            return sentences
        case {"captions": {"captions": _} as more}:
            return _sentences_of(Row(row.place, more))
        case {"error": _} | {"caption": None}:
            return None
    raise UsageError(f"{row.place}: no sentence in {shown(row.values)}; {_FIX}")
