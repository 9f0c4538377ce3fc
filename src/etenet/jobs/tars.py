"""Tars of samples, as WebDataset has them: members one after the other with one name up to the first dot.

    000001.mp4  000001.json  000001.txt  000002.mp4  ...

One video of a sample is a clip, and is read in place: nothing is unpacked. Nothing in a tar is trusted, either. Links,
devices, sparse files and names that lead out of a folder are left out. A header that is huge or points backwards is
damage, which is an error, as is a missing end: otherwise the samples behind it would be missing without a word.
Source: https://github.com/webdataset/webdataset, and POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO

SUFFIX = ".tar"
MAX_MEMBERS = 2_000_000
MAX_HEADER_BYTES = 2**16
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class BrokenTar(Exception):
    """A tar is damaged, or is none. The message says how, and the fix."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its contents are `size` bytes from `offset`. With its headers it lies from `begin` to `end`."""

    name: str
    offset: int
    size: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A video in a tar, and from `begin` to `end` all members of its sample.

    `name` is that of the video, and its contents are `size` bytes from `offset`. `extensions` are those of all members.
    """

    name: str
    offset: int
    size: int
    begin: int
    end: int
    extensions: tuple[str, ...]

    @property
    def key(self) -> str:
        return key_of(self.name)


def key_of(name: str) -> str:
    """What the members of a sample have in common; empty for a file that belongs to no sample, as .x or x."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return f"{folder}{slash}{stem}" if stem and dot else ""


def extension_of(name: str) -> str:
    """The rest of a member's name, in small letters: mp4, or left.mp4."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def samples(file: IO[bytes], video_suffixes: Collection[str], skipped: Counter[str]) -> Iterator[Sample]:
    """The samples that have a video, in order. Counts what is `skipped`, by kind.

    Of several videos, the one without a further extension is taken. Raises `BrokenTar`, after the samples that are
    whole, and `OSError`.
    """
    seen: set[str] = set()
    damage: BrokenTar | None = None

    def whole() -> Iterator[Member]:
        """Those with a key: others, such as the ._ files of macOS, may stand between two of one sample."""
        nonlocal damage
        try:
            for member in members(file, skipped):
                if key_of(member.name):
                    yield member
                else:
                    skipped[_kind(member)] += 1
        except BrokenTar as error:
            damage = error

    for key, group in groupby(whole(), lambda member: key_of(member.name)):
        of_sample = list(group)
        videos = [member for member in of_sample if PurePosixPath(member.name).suffix.lower() in video_suffixes]
        if not videos:
            skipped.update(map(_kind, of_sample))
        elif key in seen:
            skipped["sample whose key is there twice in a tar"] += 1
        else:
            seen.add(key)
            video = min(videos, key=lambda member: "." in extension_of(member.name))
            if len(videos) > 1:
                skipped["further video of a sample"] += len(videos) - 1
            extensions = tuple(extension_of(member.name) for member in of_sample)
            begin, end = of_sample[0].begin, of_sample[-1].end
            yield Sample(video.name, video.offset, video.size, begin, end, extensions)
    if damage:
        raise damage


def _kind(member: Member) -> str:
    return PurePosixPath(member.name).suffix.lower() or "without suffix"


def members(file: IO[bytes], skipped: Counter[str], *, end: int | None = None) -> Iterator[Member]:
    """The files from where `file` is now, up to `end`, or to the end of the tar. Raises `BrokenTar` and `OSError`."""
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            info, count = tar.next(), 0
            while info is not None:
                tar.members.clear()
                count += 1
                if count > MAX_MEMBERS:
                    raise BrokenTar(f"it has over {MAX_MEMBERS} members; split it")
                if info.size < 0:
                    raise BrokenTar("it is damaged: a member has less than nothing in it; copy it again")
                file.seek(tar.offset - 1)
                if not file.read(1):
                    raise BrokenTar("it is cut off within a member; copy it again")
                if name := _usable(info, skipped):
                    yield Member(name, info.offset_data, info.size, info.offset, tar.offset)
                info = tar.next() if end is None or tar.offset < end else None
            if end is None:
                file.seek(tar.offset)
                _require_end(file.read(tarfile.BLOCKSIZE))
    except (BrokenTar, OSError):
        raise
    except Exception as error:  # tarfile raises anything for a damaged header
        file.seek(0)
        raise BrokenTar(_reason(file.read(8), error)) from error


def _usable(info: tarfile.TarInfo, skipped: Counter[str]) -> str:
    """The name of a file without ./ and double slashes; empty for what is left out."""
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if info.isdir():
        return ""
    if info.issym() or info.islnk():
        skipped["link in a tar"] += 1
    elif info.issparse():
        skipped["sparse file in a tar"] += 1
    elif not info.isreg():
        skipped["no regular file in a tar"] += 1
    elif info.name.startswith("/") or ".." in parts or "\0" in info.name or not parts:
        skipped["name in a tar that leads out of a folder"] += 1
    else:
        return "/".join(parts)
    return ""


def _require_end(block: bytes) -> None:
    if not block:
        raise BrokenTar("it is cut off: its end mark is missing; copy it again")
    if block.strip(b"\0"):
        raise BrokenTar("it is damaged: a header is none; copy it again")


def _reason(start: bytes, error: Exception) -> str:
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed, and clips are read in place; decompress it with {program}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"it is damaged or no tar ({reason}); copy it again"


class _Headers:
    """A file of which tarfile may read headers, forwards, and none larger than a header needs to be.

    Otherwise a small tar makes it read gigabytes into memory, or the same header for ever (CVE-2025-8194).
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._reached = file, file.tell()

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if offset < self._reached - 1:  # tarfile looks at the last byte before a header
            raise tarfile.ReadError("a header that points backwards")
        self._reached = max(self._reached, offset)
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()
