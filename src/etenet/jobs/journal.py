"""What a batch job has found out, on disk: one JSON object per clip in a journal, from which other formats are made.

A job that is killed at any moment goes on after the last line of its journal. A journal of JSON lines is the output
itself; beside any other output it is called OUT.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from etenet.errors import JobStopped, UsageError
from etenet.files import AppendOnlyLog

Record = dict[str, Any]  # "video" and one of "caption", "segments" and "error"
_BEGINNING = b'{"video": '


class Journal:
    """Records in a file, new or old. `done` maps each clip in it to whether it failed.

    Raises `UsageError` for a file that is no journal, which it leaves as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, dict[str, bool]()
        try:
            self._log = AppendOnlyLog(path)
            try:
                self.done = {record["video"]: "error" in record for record in self.records()}
                self._log.cut_off_half_line()
            except BaseException:
                self._log.close()
                raise
        except BlockingIOError as error:
            raise UsageError(f"another job is writing {path}; wait for it, or name another file with --out") from error
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --out") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._log.close()

    def records(self) -> Iterator[Record]:
        """In the order of the file. Half a line at the end is left out; anything else is a `UsageError`."""
        for number, line in enumerate(self._log.lines(), start=1):
            if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
                return
            try:
                record = json.loads(line)
                if not isinstance(record["video"], str) or not record.keys() & {"caption", "segments", "error"}:
                    raise ValueError("it has no video, or nothing about it")
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.path}, line {number}, is not what this command writes; name another file with --out"
                ) from error
            yield record

    def add(self, record: Record) -> None:
        """Raises `JobStopped` where it cannot be written, as on a full disk."""
        with self._writing():
            self._log.add(record)
        self.done[record["video"]] = "error" in record

    def forget_failures(self) -> None:
        """Take out the clips that failed, so that they are tried again."""
        with self._writing():
            self._log.rewrite(record for record in self.records() if "error" not in record)
        self.done = dict.fromkeys((video for video, failed in self.done.items() if not failed), False)

    def put_in_order(self, videos: Iterable[str]) -> None:
        """Sort the records by the order of these clips; the records of other clips follow."""
        place = {video: number for number, video in enumerate(videos)}
        places = [place.get(video, len(place)) for video in self.done]
        if places != sorted(places):
            records = sorted(self.records(), key=lambda record: place.get(record["video"], len(place)))
            with self._writing():
                self._log.rewrite(records)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JobStopped(
                f"cannot write {self.path}: {error.strerror}; fix that, and start the job again"
            ) from error


def record_of(answer: Mapping[str, Any], *, details: bool) -> Record:
    """What a journal holds of an answer of the HTTP contract; with `details`, all sentences and probabilities too."""
    names = ("caption", "captions") if details else ("caption",)
    if "segments" not in answer:
        return {name: answer[name] for name in names}
    return {
        "segments": [{name: segment[name] for name in ("start_s", "end_s", *names)} for segment in answer["segments"]]
    }


def merged(records: Sequence[Record]) -> Record:
    """The record of a video from those of its parts, in order. An error of one part is the error of the video."""
    for record in records:
        if "segments" not in record:
            return record
    return {"segments": [segment for record in records for segment in record["segments"]]}
