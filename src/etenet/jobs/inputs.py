"""The inputs of a batch job: files, folders, globs and manifests -> clips, each once, in a fixed order.

A manifest is a path that ends in .jsonl, .csv or .txt, or `-` for standard input:

    {"video": "id", "path": "clips/a.mp4", "start_s": 1.5, "end_s": 12}     one per line, or a list of them
    video,path,start_s,end_s                                                a table with a header, of the same columns
    clips/a.mp4                                                             one path per line

Without "path", the id is the path. Without "video", the path is the id; a part of a file then has its seconds in the
id, as in clips/a.mp4#t=1.5,12 (W3C Media Fragments). Only the path is needed.

Paths are relative to the manifest's folder, and on standard input to the current folder. Any path may be a URL that
fsspec can read (s3://bucket/folder), if the package that fsspec needs for it is installed. A tar stands for the samples
in it, shard-{000..007}.tar for eight files, and {train,test}.tar for two.
"""

from __future__ import annotations

import glob
import heapq
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from etenet.errors import BadOption, UsageError, counted
from etenet.files import folders_below
from etenet.files.rows import Row, rows, shown
from etenet.jobs import remote, tars
from etenet.jobs.remote import is_remote
from etenet.jobs.tars import BrokenTar, Sample
from etenet.video.segments import Cut

# Names of files in the containers of `video/ffmpeg.py`.
VIDEO_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".3gpp", ".f4v", ".lrv", ".m4v", ".mov", ".mp4", ".qt"),
        *(".mk3d", ".mkv", ".webm", ".avi", ".divx", ".flv", ".asf", ".wm", ".wmv", ".gif"),
        *(".m2t", ".m2ts", ".mts", ".tp", ".trp", ".ts"),
        *(".m2p", ".mod", ".mpe", ".mpeg", ".mpg", ".ps", ".vob", ".vro"),
    )
)
MANIFEST_SUFFIXES = frozenset((".csv", ".jsonl", ".txt"))
STANDARD_INPUT = "-"
_APPLE_DOUBLE = "._"  # begins the name of what macOS stores beside a file: no video, whatever the suffix
_FOUND_SUFFIXES = VIDEO_SUFFIXES | {tars.SUFFIX}
_KINDS_SHOWN = 30
# As WebDataset and shells name several files.
_BRACES = re.compile(r"\{(?:(?P<first>\d{1,9})\.\.(?P<last>\d{1,9})|(?P<names>[^{},]*(?:,[^{},]*)+))\}")
# As a comment, quotes around a path, or the header of a table begin.
_MAYBE_NO_PATH = re.compile(r'#|"|.*[,;\t]')
_FIX = "a line of a manifest is a path, or has video, path, start_s and end_s"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a clip are: a file, which may be a URL that fsspec can read, or a video in a tar.

    `fault` says why they cannot be read, if that is known already.
    """

    path: str
    sample: Sample | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class JobClip:
    """One clip of a job: what a video shows from `start_s` to `end_s`. `video` names the clip in the output."""

    video: str
    path: str
    start_s: float = 0.0
    end_s: float = math.inf
    sample: Sample | None = None
    fault: str = ""

    @property
    def source(self) -> Source:
        return Source(self.path, self.sample, self.fault)

    def __str__(self) -> str:
        inside = f"/{self.sample.name}" if self.sample else ""
        return self.path + inside + Cut(start_s=self.start_s, end_s=self.end_s).fragment


@dataclass(slots=True)
class Skipped:
    """What was found in folders and is not captioned: how many files of each kind."""

    files: Counter[str] = field(default_factory=Counter)
    unreadable_folders: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """As in "3 files (.ogv 2, .txt 1)"; empty if nothing was skipped."""
        most_first = sorted(self.files.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = [f"{kind} {count}" for kind, count in most_first[:_KINDS_SHOWN]]
        if len(most_first) > len(kinds):
            kinds.append("...")
        parts = [f"{counted(self.files.total(), 'file')} ({', '.join(kinds)})"] if kinds else []
        parts += [f"{folder}, which cannot be read" for folder in self.unreadable_folders]
        return ", ".join(parts)


def clips(
    names: Sequence[str],
    *,
    sample: tuple[int, int] | None = None,
    shard: tuple[int, int] = (1, 1),
    skipped: Skipped | None = None,
    but: Collection[str] = (),
) -> list[JobClip]:
    """All clips that are named, in order, `but` for these files. Counts what is `skipped`.

    For a `sample` (count, seed), so many of them at random: the same ones each time, and more with a higher count. For
    a `shard` (i, n) of these, every n-th clip from the i-th.
    Raises `UsageError` if there is no such clip, and if two different clips have the same id.
    """
    by_id: dict[str, JobClip] = {}
    skipped = Skipped() if skipped is None else skipped
    for clip in chain.from_iterable(_named_by(name, skipped) for name in names):
        if any(_is_same(clip.path, other) for other in but):
            continue
        for one in in_tar(clip, skipped):
            if by_id.setdefault(one.video, one) != one:
                raise UsageError(
                    f"the id {one.video!r} names both {by_id[one.video]} and {one}; give each clip its own id"
                )
    if not by_id:
        raise _no_video(", ".join(names), skipped)
    chosen = list(by_id.values())
    if sample:
        chosen = _sample(chosen, *sample)
    number, count = shard
    return chosen[number - 1 :: count]


def _sample(clips: Sequence[JobClip], count: int, seed: int) -> list[JobClip]:
    """Those whose ids have the lowest hashes: for these, neither the order nor further clips matter."""

    def place(clip: JobClip) -> bytes:
        return blake2b(f"{seed} {clip.video}".encode(), digest_size=8).digest()

    chosen = {clip.video for clip in heapq.nsmallest(count, clips, key=place)}
    return [clip for clip in clips if clip.video in chosen]


def in_tar(clip: JobClip, skipped: Skipped) -> Iterator[JobClip]:
    """The clips in a tar, whose ids begin with that of the tar. Another clip is the only one.

    What is behind damage in a tar is one clip more, which fails.
    """
    if PurePath(clip.path).suffix.lower() != tars.SUFFIX:
        yield clip
        return
    try:
        with remote.opened(clip.path) if is_remote(clip.path) else open(clip.path, "rb") as file:
            for sample in tars.samples(file, VIDEO_SUFFIXES, skipped.files):
                yield replace(clip, video=f"{clip.video}/{id_of(sample.name)}", sample=sample)
    except (BrokenTar, OSError, ValueError) as error:  # ValueError: no path at all, as with a NUL in it
        yield replace(clip, fault=(isinstance(error, OSError) and error.strerror) or str(error))


def _is_same(path: str, other: str) -> bool:
    """Whether these are one file. Only one that has the same name is looked up: a list may have millions."""
    if path == other or PurePath(path).name != PurePath(other).name or is_remote(path):
        return path == other
    return os.path.realpath(path) == os.path.realpath(other)


def id_of(name: str) -> str:
    """A name as text that every program reads: bytes that are not UTF-8 become \\\\xe9. Others stay as they are.

    Python keeps such bytes as lone surrogates (PEP 383), which JSON readers refuse or take all for the same character.
    """
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate out of JSON that stands for no byte
        return name.encode(errors="backslashreplace").decode()


def without_suffix(video: str) -> PurePath:
    """Of a clip's id, what could be the name of a file in some folder, without the suffix of videos."""
    name = PurePath(*parts_of(video))
    return name.with_suffix("") if name.suffix.lower() in VIDEO_SUFFIXES else name


def parts_of(video: str) -> list[str]:
    """The parts of a clip's id, without those that lead out of a folder."""
    path = PurePath(video)
    return [part for part in path.parts if part not in (path.anchor, "..")]


def _named_by(name: str, skipped: Skipped) -> Iterator[JobClip]:
    path = Path(name)
    if (braces := _BRACES.search(name)) and not path.exists():
        for each in _inside(braces):
            yield from _named_by(name[: braces.start()] + each + name[braces.end() :], skipped)
    elif name == STANDARD_INPUT:
        if sys.stdin is None:
            raise UsageError("standard input is closed; give a list in a file")
        yield from _manifest("", "standard input", sys.stdin.buffer.read())
    elif is_remote(name) and path.suffix.lower() in MANIFEST_SUFFIXES and not glob.has_magic(name):
        yield from _manifest(name.rpartition("/")[0], name, _contents(name))
    elif is_remote(name):
        yield from _of_paths(_remote(name, skipped))
    elif path.is_dir():
        yield from _of_paths(_videos_below(path, skipped))
    elif path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
        yield from _manifest(str(path.parent), path)
    elif path.is_file():
        yield from _of_paths([name])
    elif glob.has_magic(name):
        matches = sorted(match for match in set(_matches(path, skipped)) if _may_be_read(match, skipped))
        if not matches:
            raise UsageError(f"no file matches {name}; correct the pattern")
        yield from _of_paths(matches)
    elif path.exists():
        raise UsageError(f"{name} is no regular file; give a file, or - for a list on standard input")
    else:
        raise UsageError(f"no file at {name}; correct the path")


def _inside(braces: re.Match[str]) -> Iterator[str]:
    """What braces stand for, one after the other."""
    if names := braces["names"]:
        yield from names.split(",")
    else:
        width = len(braces["first"])
        for number in range(int(braces["first"]), int(braces["last"]) + 1):
            yield f"{number:0{width}}"


def _of_paths(paths: Iterable[Path | str]) -> Iterator[JobClip]:
    return (JobClip(id_of(str(path)), str(path)) for path in paths)


def _remote(url: str, skipped: Skipped) -> list[str]:
    """The videos at a URL of a folder or a glob, or the URL itself."""
    names = remote.find(url)
    videos = names if names == [url] or glob.has_magic(url) else _videos_among(names, skipped)
    if not videos:
        raise _no_video(url, skipped)
    return videos


def _videos_below(folder: Path, skipped: Skipped) -> list[Path]:
    if videos := videos_in(folder, skipped):
        return videos
    raise _no_video(folder, skipped)


def videos_in(folder: Path, skipped: Skipped) -> list[Path]:
    """The videos and tars in a folder, at any depth, in order. Counts what is `skipped`."""
    paths = (os.path.join(top, name) for top, names in _folders_below(folder, skipped) for name in names)
    videos = sorted(map(Path, _videos_among(paths, skipped)))
    return [video for video in videos if _may_be_read(video, skipped)]


def _videos_among(names: Iterable[str], skipped: Skipped) -> list[str]:
    videos = []
    for name in names:
        path = PurePath(name)
        if path.name.startswith(_APPLE_DOUBLE):
            skipped.files[f"{_APPLE_DOUBLE}*"] += 1
        elif path.suffix.lower() in _FOUND_SUFFIXES:
            videos.append(name)
        elif os.path.islink(name) and not os.path.exists(name):
            skipped.files["link to nowhere"] += 1
        else:
            skipped.files[id_of(path.suffix.lower()) or "without suffix"] += 1
    return videos


def _no_video(where: Path | str, skipped: Skipped) -> UsageError:
    there = f" among {skipped}" if str(skipped) else ""
    return UsageError(f"no video in {where}{there}; videos have the suffixes {', '.join(sorted(VIDEO_SUFFIXES))}")


def _folders_below(folder: Path, skipped: Skipped, *, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    return folders_below(
        folder, hidden=hidden, onerror=lambda error: skipped.unreadable_folders.append(id_of(error.filename))
    )


def _may_be_read(path: str | Path, skipped: Skipped) -> bool:
    """Files, and links to nowhere: a clip that is not there fails like one that cannot be read."""
    if os.path.isfile(path) or not os.path.exists(path):
        return True
    skipped.files["folder" if os.path.isdir(path) else "no regular file"] += 1
    return False


def _matches(pattern: Path, skipped: Skipped) -> Iterator[Path]:
    """As glob.glob, but for `**` each folder once: a loop of links is no forty folders."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    above, below = Path(*pattern.parts[:at]), pattern.parts[at + 1 :] or ("*",)
    for folder in glob.glob(str(above)):
        for top, _ in _folders_below(Path(folder), skipped, hidden=False):
            # Folders that match are no loss: what is in them is matched, too.
            matches = _matches(Path(glob.escape(top), *below), skipped)
            yield from (match for match in matches if not match.is_dir())


def _contents(url: str) -> bytes:
    try:
        with remote.opened(url) as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{url}: {error}; fix that, or correct the URL") from error


def _manifest(folder: str, source: Path | str, contents: bytes | None = None) -> Iterator[JobClip]:
    found = list(rows(source, contents, header=("video", "path"), list_of="path", fix=_FIX))
    if not found:
        raise UsageError(f"{source} has no clip; {_FIX}")
    clips = [_clip(row, folder) for row in found]
    _require_path(found[0], clips[0])
    yield from clips


def _require_path(row: Row, clip: JobClip) -> None:
    """Raises `UsageError` for a first line that is no path, such as the header of a table with other columns.

    A path that could be a video's is one, also where no file is: that clip fails, and a later run finds it done.
    """
    is_path = is_remote(clip.path) or PurePath(clip.path).suffix.lower() in _FOUND_SUFFIXES
    if not is_path and _MAYBE_NO_PATH.match(clip.video) and not os.path.lexists(clip.path):
        raise UsageError(
            f"{row.place}: {clip.video} is neither a file nor a header with video or path; correct it, or leave it out"
        )


def _clip(row: Row, folder: str) -> JobClip:
    values = row.values
    try:
        part = Cut(start_s=_seconds(values.get("start_s"), 0.0), end_s=_seconds(values.get("end_s"), math.inf))
    except (ValueError, TypeError, OverflowError, BadOption) as error:
        raise UsageError(f"{row.place}: {error}; {_FIX}") from error
    match values:
        case {"video": str(video) | int(video), "path": str(path)} if path and video != "":
            return JobClip(id_of(str(video)), _below(folder, path), part.start_s, part.end_s)
        case {"video": str(name)} if name:
            return JobClip(id_of(name), _below(folder, name), part.start_s, part.end_s)
        case {"path": str(name)} if name:
            return JobClip(id_of(name) + part.fragment, _below(folder, name), part.start_s, part.end_s)
    raise UsageError(f"{row.place}: no clip is named in {shown(values)}; {_FIX}")


def _seconds(value: Any, default: float) -> float:
    if value in (None, ""):
        return default
    try:
        return float(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"seconds look like 12.5, got {shown(value)}") from error


def _below(folder: str, path: str) -> str:
    if is_remote(path):
        return path
    return f"{folder}/{path}" if is_remote(folder) else str(Path(folder, path))
