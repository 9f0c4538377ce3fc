"""Clips with cached frames or features -> the other files of a dataset folder, and a summary of them.

    manifest.jsonl     one object per usable clip: video, row of the cache, split, file, captions (demo: labels; stills:
                       distinct, how many rows it has)
    unseen.jsonl       the same for clips to train on without file or frames, whose captions are known; row is -1
    vocabulary.json    the words, most frequent first
    skipped.jsonl      clips without a file, frames or captions, each with its error

`datasets.py` reads these files. Each is written completely or not at all.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etenet.errors import counted
from etenet.files import replacing
from etenet.model.vocabulary import Vocabulary
from training.data.frame_cache import Failure
from training.data.source_clip import SourceClip
from training.data.wording import Wording, vocabulary_of

DEFAULT_MAX_WORDS = 30
REASONS_SHOWN = 5
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    """Options that may differ between runs on the same folder."""

    vocabulary_from: Literal["train", "all"] = "train"
    minimum_count: int = 1
    max_words: int = DEFAULT_MAX_WORDS  # longer captions stay as they are; only training cuts them
    allow_missing: bool = False  # clips without a file are listed, but no failure


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip, its captions and its row in the cache."""

    clip: SourceClip
    wording: Wording
    row: int


def write(
    out: Path,
    entries: Sequence[Entry],
    failures: Mapping[int, Failure],
    options: DatasetOptions,
    missing: Sequence[tuple[SourceClip, Failure]] = (),
    notes: Sequence[str] = (),
) -> int:
    """Write all files but the cache, print a summary to stderr, and return the exit status.

    `failures` are the rows of entries that cannot be used, `missing` the clips that have none, `notes` further lines of
    the summary.
    """
    usable = [entry for entry in entries if entry.row not in failures]
    unseen = _unseen(usable, missing)
    vocabulary = vocabulary_of(
        ((entry.clip.split, entry.wording) for entry in usable),
        splits=options.vocabulary_from,
        minimum_count=options.minimum_count,
    )
    contents = {
        "words": vocabulary.known_words,
        "splits": options.vocabulary_from,
        "minimum_count": options.minimum_count,
    }
    skipped = [_skipped_line(out, entry.clip, failures[entry.row]) for entry in entries if entry.row in failures]
    skipped += [_skipped_line(out, clip, failure) for clip, failure in missing]
    _write_lines(out / "skipped.jsonl", skipped)
    _write_lines(out / "vocabulary.json", [contents])
    _write_lines(out / "manifest.jsonl", [_manifest_line(out, entry) for entry in usable])
    _write_lines(out / "unseen.jsonl", [_manifest_line(out, entry) for entry in unseen])
    report = [*_report(out, entries, usable, skipped, vocabulary, options), *notes, *_warnings(usable)]
    if unseen:
        report.append(f"  without frames, for their sentences: {counted(len(unseen), 'training clip')}")
    print("\n".join(report), file=sys.stderr)
    return 1 if len(skipped) > (len(missing) if options.allow_missing else 0) else 0


def _unseen(usable: Sequence[Entry], missing: Sequence[tuple[SourceClip, Failure]]) -> list[Entry]:
    """Of the clips that are missing, those to train on that share no source with a clip to validate or to test on."""
    clips = [*(entry.clip for entry in usable), *(clip for clip, _ in missing)]
    kept_out = {clip.source for clip in clips if clip.split != "train"} - {None}
    entries = [
        Entry(clip, Wording.of(clip.captions), -1)
        for clip, _ in missing
        if clip.split == "train" and clip.source not in kept_out
    ]
    return [entry for entry in entries if entry.wording.captions]


def _manifest_line(out: Path, entry: Entry) -> dict[str, Any]:
    clip = entry.clip
    line = {
        "video": clip.video,
        "row": entry.row,
        "split": clip.split,
        "file": _place(out, clip.file),
        "captions": entry.wording.captions,
    }
    more = {"labels": clip.labels, "distinct": len(clip.pictures)}
    return line | {name: value for name, value in more.items() if value}


def _skipped_line(out: Path, clip: SourceClip, failure: Failure) -> dict[str, Any]:
    error = {"code": failure.code, "message": failure.message}
    return {"video": clip.video, "file": _place(out, clip.file), "error": error}


def _place(out: Path, file: Path | None) -> str | None:
    """Relative within the dataset folder, so that the folder can be moved; absolute elsewhere."""
    if file is None:
        return None
    file, out = file.resolve(), out.resolve()
    return str(file.relative_to(out) if file.is_relative_to(out) else file)


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def _report(
    out: Path,
    entries: Sequence[Entry],
    usable: Sequence[Entry],
    skipped: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    options: DatasetOptions,
) -> list[str]:
    clips = Counter(entry.clip.split for entry in usable)
    captions = Counter(entry.clip.split for entry in usable for _ in entry.wording.captions)
    dropped = sum(entry.wording.dropped for entry in entries)
    too_long = sum(length > options.max_words for entry in usable for length in entry.wording.lengths)
    return [
        f"{out}: {len(usable)} clips",
        *(f"  {split}: {clips[split]} clips, {captions[split]} captions" for split in SPLITS),
        f"  vocabulary: {len(vocabulary.known_words)} words that {options.vocabulary_from} captions"
        f" use at least {options.minimum_count} times",
        f"  captions without a word, dropped: {dropped}",
        f"  captions longer than {options.max_words} words, cut in training only: {too_long}",
        f"  skipped: {len(skipped)} clips" + (f", listed in {out / 'skipped.jsonl'}" if skipped else ""),
        *(f"    {line['video']}: {line['error']['message']}" for line in skipped[:REASONS_SHOWN]),
        *(["    ..."] if len(skipped) > REASONS_SHOWN else []),
    ]


def _warnings(usable: Sequence[Entry]) -> list[str]:
    """What training and evaluation will miss."""
    uses = {
        "train": "there is nothing to learn from",
        "validation": "training.train needs one, to choose its best checkpoint",
    }
    there = {entry.clip.split for entry in usable}
    return [
        f"  warning: no {split} split: {use}; give its clips that split, or a larger share"
        for split, use in uses.items()
        if split not in there
    ]
