"""The inputs of a batch job: files, folders, globs and manifests -> clips, each once, in a fixed order.

A manifest is a path that ends in .jsonl, .csv or .txt, or `-` for standard input:

    {"video": "id", "path": "clips/a.mp4", "start_s": 1.5, "end_s": 12}     one per line, or a list of them
    video,path,start_s,end_s                                                a table with a header, of the same columns
    clips/a.mp4                                                             one path per line

Without "path", the id is the path. Without "video", the path is the id; a part of a file then has its seconds in the
id, as in clips/a.mp4#t=1.5,12 (W3C Media Fragments). Only the path is needed.

Paths are relative to the manifest's folder, and on standard input to the current folder. Any path may be a URL that
fsspec can read (s3://bucket/folder), if the package that fsspec needs for it is installed.
"""

from __future__ import annotations

import glob
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etenet.errors import BadOption, UsageError
from etenet.files import Row, rows, shown
from etenet.video.segments import Cut

VIDEO_SUFFIXES = frozenset(
    (
        *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"),
        *(".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"),
    )
)
MANIFEST_SUFFIXES = frozenset((".csv", ".jsonl", ".txt"))
STANDARD_INPUT = "-"
_FIX = "a line of a manifest is a path, or has video, path, start_s and end_s"


@dataclass(frozen=True, slots=True)
class JobClip:
    """One clip of a job: what a file shows from `start_s` to `end_s`.

    `video` names the clip in the output. `path` may be a URL that fsspec can read.
    """

    video: str
    path: str
    start_s: float = 0.0
    end_s: float = math.inf

    @property
    def source(self) -> str:
        return self.path + Cut(start_s=self.start_s, end_s=self.end_s).fragment


def clips(names: Sequence[str], *, shard: tuple[int, int] = (1, 1)) -> list[JobClip]:
    """All clips that are named, in order. For shard (i, n), every n-th clip from the i-th.

    Raises `UsageError` if there is no such clip, and if two different clips have the same id.
    """
    by_id: dict[str, JobClip] = {}
    for name in names:
        for clip in _named_by(name):
            if by_id.setdefault(clip.video, clip) != clip:
                raise UsageError(
                    f"the id {clip.video!r} names both {by_id[clip.video].source} and {clip.source}; "
                    "give each clip its own id"
                )
    number, count = shard
    return list(by_id.values())[number - 1 :: count]


def _named_by(name: str) -> Iterator[JobClip]:
    path = Path(name)
    if name == STANDARD_INPUT:
        yield from _manifest(Path(), "standard input", sys.stdin.buffer.read())
    elif is_remote(name):
        yield from _of_paths(_remote(name))
    elif path.is_dir():
        yield from _of_paths(_videos_below(path))
    elif path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
        yield from _manifest(path.parent, path)
    elif path.is_file():
        yield JobClip(name, name)
    elif glob.has_magic(name):
        matches = sorted(match for match in map(Path, glob.glob(name, recursive=True)) if match.is_file())
        if not matches:
            raise UsageError(f"no file matches {name}; correct the pattern")
        yield from _of_paths(matches)
    else:
        raise UsageError(f"no file at {name}; correct the path")


def is_remote(path: str) -> bool:
    return "://" in path


def _of_paths(paths: Iterable[Path | str]) -> Iterator[JobClip]:
    return (JobClip(str(path), str(path)) for path in paths)


def _remote(url: str) -> list[str]:
    """The videos at a URL of a folder or a glob, or the URL itself."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
        if glob.has_magic(path):
            names = files.glob(path)
        elif files.isdir(path):
            names = [name for name in files.find(path) if Path(name).suffix.lower() in VIDEO_SUFFIXES]
        else:
            return [url]
        if not names:
            raise UsageError(f"no video at {url}; correct the URL")
        return sorted(files.unstrip_protocol(name) for name in names)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"cannot list {url}: {error}") from error


def _videos_below(folder: Path) -> list[Path]:
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not videos:
        raise UsageError(f"no video in {folder}; videos have the suffixes {', '.join(sorted(VIDEO_SUFFIXES))}")
    return videos


def _manifest(folder: Path, source: Path | str, contents: bytes | None = None) -> Iterator[JobClip]:
    clips = [_clip(row, folder) for row in rows(source, contents, header=("video", "path"), list_of="path", fix=_FIX)]
    if not clips:
        raise UsageError(f"{source} has no clip; {_FIX}")
    yield from clips


def _clip(row: Row, folder: Path) -> JobClip:
    values = row.values
    try:
        part = Cut(start_s=_seconds(values.get("start_s"), 0.0), end_s=_seconds(values.get("end_s"), math.inf))
    except (ValueError, TypeError, BadOption) as error:
        raise UsageError(f"{row.place}: {error}; {_FIX}") from error
    match values:
        case {"video": str(video) | int(video), "path": str(path)} if path and video != "":
            return JobClip(str(video), _below(folder, path), part.start_s, part.end_s)
        case {"video": str(name)} if name:
            return JobClip(name, _below(folder, name), part.start_s, part.end_s)
        case {"path": str(name)} if name:
            return JobClip(name + part.fragment, _below(folder, name), part.start_s, part.end_s)
    raise UsageError(f"{row.place}: no clip is named in {shown(values)}; {_FIX}")


def _seconds(value: Any, default: float) -> float:
    return default if value in (None, "") else float(value)


def _below(folder: Path, path: str) -> str:
    return path if is_remote(path) else str(folder / path)
