"""The JSON that captions are kept in -> sentences by clip, for predictions and references alike.

    {"video id": ["sentence", ...], ...}                         or a bare sentence for each
    {"annotations": [{"image_id": ..., "caption": ...}, ...]}    COCO's annotations; the bare list is COCO's results
    {"video": ..., "caption": ...}                               one per line, as `etenet caption` writes them; several
                                                                 sentences as lines of one clip, or as "captions"

The contents decide, not the file's name. Knows nothing of what the sentences are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etenet.errors import UsageError, named

_FORMATS = 'give {"video id": ["sentence", ...]}, COCO caption JSON, or {"video": ..., "caption": ...} per line'


def read(path: Path) -> dict[str, list[str]]:
    """Sentences by clip, clips in the order of the file; a clip with an error instead of a caption is wrong use."""
    if not path.is_file():
        raise UsageError(f"no file at {path}; {_FORMATS}")
    try:
        entries = _entries(path.read_text(encoding="utf-8-sig"))
        captions: dict[str, list[str]] = {}
        failed: list[str] = []
        for entry in entries:
            clip, sentences = _clip_of(entry), _sentences_of(entry)
            if sentences is None:
                failed.append(clip)
            else:
                captions.setdefault(clip, []).extend(sentences)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}; {_FORMATS}") from error
    if failed:
        raise UsageError(
            f"{path} has an error instead of a caption for {named(failed)}; "
            "caption these clips again, or leave them out of predictions and references"
        )
    if not captions:
        raise UsageError(f"{path} holds no caption; {_FORMATS}")
    return captions


def _entries(text: str) -> list[Any]:
    """Objects that name a clip and its sentences, whatever the format; `ValueError` for what is no JSON."""
    try:
        contents = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _lines(text)
    match contents:
        case {"annotations": list(entries)} | list(entries):
            return entries
        case {"video": _, "caption": _} | {"video": _, "captions": _} | {"video": _, "error": _}:
            return [contents]  # a file of one line
        case dict():
            return [{"video": clip, "captions": said} for clip, said in contents.items()]
    raise ValueError(f"expected an object or a list, got {text[:40]!r}")


def _lines(text: str) -> list[Any]:
    entries = []
    # Not splitlines(): JSON allows in a sentence what Python takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    return entries


def _clip_of(entry: Any) -> str:
    match entry:
        case {"video": str(clip) | int(clip)} | {"image_id": str(clip) | int(clip)}:
            return str(clip)
    raise ValueError(f"no clip is named in {_shown(entry)}")


def _sentences_of(entry: Any) -> list[str] | None:
    """None where the clip has an error."""
    match entry:
        case {"caption": str(sentence)} | {"captions": str(sentence)}:
            return [sentence]
        case {"captions": [*sentences]} if all(isinstance(sentence, str) for sentence in sentences):
            return sentences
        case {"error": _}:
            return None
    raise ValueError(f"no sentence in {_shown(entry)}")


def _shown(entry: Any) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
