"""What a batch job has found out, on disk: one JSON object per clip in a journal, from which other formats are made.

The journal is only ever added to, a whole line at a time, so a job that is killed at any moment goes on after its last
line; half a line, which only a crash of the machine can leave, is cut off. A journal of JSON lines is the output
itself; beside any other output it is called OUT.jsonl.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from errno import ENOSPC
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from etenet.errors import Stopped, UsageError
from etenet.files import replacing

Record = dict[str, Any]  # "video" and one of "caption", "segments" and "error"
_BEGINNING = b'{"video": '


class Journal:
    """Records in a file that is there already or not yet; `done` are the clips that it holds.

    Raises `UsageError` for a file that is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, dict[str, bool]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _to_add_to(path)
            try:
                self.done = {record["video"]: "error" in record for record in read(path)}
                self._cut_off_half_a_line()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Raises `Stopped` where there is no room for it."""
        text = line(record)
        try:
            if self._file.write(text) != len(text):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError as error:
            raise Stopped(f"cannot write {self.path}: {error.strerror}; mend that, and start the job again") from error
        self.done[record["video"]] = "error" in record

    def forget_failures(self) -> None:
        """Take out the clips that failed, so that they are tried again."""
        self._rewrite(record for record in read(self.path) if "error" not in record)
        self.done = dict.fromkeys((video for video, failed in self.done.items() if not failed), False)

    def put_in_order(self, videos: Iterable[str]) -> None:
        """Have the records of these clips in this order, and then any others."""
        place = {video: number for number, video in enumerate(videos)}
        places = [place.get(video, len(place)) for video in self.done]
        if places != sorted(places):
            self._rewrite(sorted(read(self.path), key=lambda record: place.get(record["video"], len(place))))

    def _rewrite(self, records: Iterable[Record]) -> None:
        with replacing(self.path) as file:
            file.writelines(map(line, records))
        self._file.close()
        self._file = _to_add_to(self.path)

    def _cut_off_half_a_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            self._file.seek(start)
            if (at := self._file.read(end - start).rfind(b"\n")) >= 0:
                self._file.truncate(start + at + 1)
                return
            end = start
        self._file.truncate(0)


def _to_add_to(path: Path) -> FileIO:
    """For one job at a time; unbuffered, so that what was written is the kernel's when the process is killed."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(f"another job is writing {path}; wait for it, or name another file with --out") from error
    return file


def record_of(answer: Mapping[str, Any], *, details: bool) -> Record:
    """What is kept of an answer of the HTTP contract; with details, every sentence and its words' probabilities."""
    names = ("caption", "captions") if details else ("caption",)
    if "segments" not in answer:
        return {name: answer[name] for name in names}
    return {
        "segments": [{name: segment[name] for name in ("start_s", "end_s", *names)} for segment in answer["segments"]]
    }


def joined(records: Sequence[Record]) -> Record:
    """The record of a video from those of its parts, in order; what is wrong with one of them is wrong with all."""
    for record in records:
        if "segments" not in record:
            return record
    return {"segments": [segment for record in records for segment in record["segments"]]}


def line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"


def read(path: Path) -> Iterator[Record]:
    """The records of a journal, but for half a line at its end; `UsageError` for any other file."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n") and text.startswith(_BEGINNING[: len(text)]):
                return
            try:
                record = json.loads(text)
                if not isinstance(record["video"], str) or not record.keys() & {"caption", "segments", "error"}:
                    raise ValueError("it has no video, or nothing about it")
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{path}, line {number}, is not what this command writes; name another file with --out"
                ) from error
            yield record
