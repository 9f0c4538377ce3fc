"""The output of a job as WebDataset shards: each sample as it came, and with it the record and the sentence.

    000001.mp4  000001.json  000001.txt          what came with a sample is carried: further members, under their names
    000001.mp4  000001.json  000001.txt  000001.caption.json  000001.caption.txt     where samples have their own

A clip that is a file becomes a sample of its own. Source: https://github.com/webdataset/webdataset, ShardWriter.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePath
from typing import IO, Any

from etenet.errors import UsageError
from etenet.files import json_line, replacing
from etenet.jobs import remote, tars
from etenet.jobs.inputs import JobClip, id_of, without_suffix
from etenet.jobs.journal import Record
from etenet.jobs.tars import BrokenTar

SHARD_SAMPLES, SHARD_BYTES = 100_000, 3_000_000_000  # the most in one shard; ShardWriter's own
_NUMBER = re.compile(r"%0?\d*d")
_RECORD, _SENTENCE = "json", "txt"


def check(clips: Sequence[JobClip], out: Path) -> Path:
    """The first shard.

    Raises `UsageError` for a name that cannot be one, for one that a tar of the input has, and if two clips would be
    one sample.
    """
    _keys(clips)
    first = shard(out, 0)
    shards = re.compile(r"\d+".join(map(re.escape, _NUMBER.split(out.name, maxsplit=1))))
    for path in {Path(clip.path) for clip in clips if not remote.is_remote(clip.path)}:
        if shards.fullmatch(path.name) and os.path.realpath(path.parent) == os.path.realpath(out.parent):
            raise UsageError(f"{path} is read, and shards named {out.name} would replace it; give them another name")
    return first


def shard(out: Path, number: int) -> Path:
    """The shard of this number, if `out` has a place for it, as captions-%06d.tar; `out` itself if it has none."""
    if "%" not in out.name:
        return out
    if "%" in _NUMBER.sub("", out.name, count=1):
        raise UsageError(f"{out.name} names no shards; write one number into it, as in captions-%06d.tar")
    return out.with_name(out.name % number)


def write(records: Iterable[Record], clips: Sequence[JobClip], out: Path) -> list[Path]:
    """The shards of these records, each replaced as a whole; at least one.

    Raises `UsageError` if a clip that has a caption can no longer be read, and `OSError`.
    """
    keys, by_video = _keys(clips), {clip.video: clip for clip in clips}
    has_own = any({_RECORD, _SENTENCE}.intersection(clip.sample.extensions) for clip in clips if clip.sample)
    known = ((by_video[record["video"]], record) for record in records if record["video"] in by_video)
    # A tar that is damaged has no sample for its error.
    samples = (_Written(clip, record, keys[clip.video], has_own) for clip, record in known if not clip.fault)
    written: list[Path] = []
    rest = next(samples, None)
    while rest or not written:
        written.append(shard(out, len(written)))
        with replacing(written[-1]) as file, tarfile.open(fileobj=file, mode="w") as tar:
            held = 0
            while rest and (written[-1] == out or (held < SHARD_SAMPLES and file.tell() < SHARD_BYTES)):
                rest.add_to(tar)
                held, rest = held + 1, next(samples, None)
    if shard(out, 0) != out:
        for number in count(len(written)):  # of an earlier job that had more samples
            if not (surplus := shard(out, number)).exists():
                break
            surplus.unlink()
    return written


def _keys(clips: Iterable[JobClip]) -> dict[str, str]:
    """The key of each clip's sample: the one that it has, or else its id, as also where two shards share a key."""
    named = [clip for clip in clips if not clip.fault]
    own = {clip.video: clip.sample.key if clip.sample else _key_of_id(clip.video) for clip in named}
    times = Counter(own.values())
    keys = {video: key if times[key] == 1 else _key_of_id(video) for video, key in own.items()}
    owner: dict[str, str] = {}
    for video, key in keys.items():
        if owner.setdefault(key, video) != video:
            raise UsageError(f"{owner[key]} and {video} would both be the sample {key}; give each its own id in a list")
    return keys


def _key_of_id(video: str) -> str:
    """videos/a.b.mp4 -> videos/a_b: what follows the first dot of a name would be no part of the key."""
    path = without_suffix(video)
    return str(path.parent / (path.name or "clip").replace(".", "_"))


@dataclass(frozen=True, slots=True)
class _Written:
    """A sample of the output."""

    clip: JobClip
    record: Record
    key: str
    beside_own: bool

    def add_to(self, tar: tarfile.TarFile) -> None:
        captions = dict(self._captions())
        names = set(captions)
        for name, contents, size in self._carried():
            if name not in names:
                names.add(name)
                _add(tar, name, contents, size)
        for name, text in captions.items():
            _add(tar, name, io.BytesIO(text), len(text))

    def _captions(self) -> Iterator[tuple[str, bytes]]:
        stem = f"{self.key}.caption" if self.beside_own else self.key
        yield f"{stem}.{_RECORD}", json_line(self.record)
        sentences = [part["caption"] for part in self.record.get("segments", [self.record]) if part.get("caption")]
        if sentences:
            yield f"{stem}.{_SENTENCE}", "\n".join(sentences).encode(errors="replace")

    def _carried(self) -> Iterator[tuple[str, _Contents, int]]:
        """The members that the sample has, or the file as one. A clip that has failed may have none any more."""
        path, sample = self.clip.path, self.clip.sample
        try:
            with remote.opened(path) if remote.is_remote(path) else open(path, "rb") as file:
                if sample is None:
                    size, suffix = file.seek(0, io.SEEK_END), PurePath(path).suffix.lower() or ".video"
                    file.seek(0)
                    yield f"{self.key}{suffix}", _Contents(path, file), size
                    return
                file.seek(sample.begin)
                between = tars.members(file, Counter(), end=sample.end)
                inside = [member for member in between if tars.key_of(member.name) == sample.key]
                if sample.offset not in {member.offset for member in inside}:
                    raise BrokenTar("it has changed since the job began")
                for member in inside:
                    file.seek(member.offset)
                    name = f"{self.key}.{member.name.rpartition('/')[2].partition('.')[2]}"
                    yield name, _Contents(path, file), member.size
        except (OSError, ValueError, BrokenTar) as error:
            if "error" not in self.record:
                raise _unreadable(path, error) from error


@dataclass(frozen=True, slots=True)
class _Contents:
    """A file that is copied into a shard. Its errors are not taken for those of the shard."""

    path: str
    file: IO[bytes]

    def read(self, size: int) -> bytes:
        try:
            block = self.file.read(size)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(block) < size:
            raise _unreadable(self.path, "it has become shorter")
        return block


def _unreadable(path: str, reason: Any) -> UsageError:
    text = (isinstance(reason, OSError) and reason.strerror) or reason
    return UsageError(f"cannot carry {id_of(path)} into the shards: {text}; put it back, and start the job again")


def _add(tar: tarfile.TarFile, name: str, contents: Any, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, contents)
