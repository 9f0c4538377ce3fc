"""The records of a batch job on disk, one JSON object per clip. Other formats are made from them when the job is done.

A job that is killed at any moment continues after the last line of its journal. If the output is JSON lines, the
journal is the output. Otherwise it stands beside the output as OUT.jsonl.
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
    """The records in a file, which may be new. `done` maps each clip that has a record to whether it failed.

    Raises `UsageError` if the file is no journal. The file is then unchanged.
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
        """In the order of the file, without half a line at its end. `UsageError` if another line is no record."""
        for number, line in enumerate(self._log.lines(), start=1):
            if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
                return
            try:
                record = json.loads(line)
                if not isinstance(record["video"], str) or not record.keys() & {"caption", "segments", "error"}:
                    raise ValueError("no video, or no result for it")
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.path}, line {number}, was not written by this command; name another file with --out"
                ) from error
            yield record

    def add(self, record: Record) -> None:
        """Raises `JobStopped` if it cannot be written, as on a full disk."""
        with self._writing():
            self._log.add(record)
        self.done[record["video"]] = "error" in record

    def forget_failures(self) -> None:
        """Remove the records of clips that failed, so that these clips are tried again."""
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


def record_of(response: Mapping[str, Any], *, details: bool) -> Record:
    """The fields of an HTTP response that a journal needs; with `details`, all sentences and their probabilities.

    `picture_start_s` is where the first frame, from which segments count, is on the clock of players.
    """
    if "segments" in response:
        segments = [_part_of(segment, details) for segment in response["segments"]]
        return {"picture_start_s": response["video"].get("start_s", 0.0), "segments": segments}
    return _part_of(response, details)


def _part_of(captioned: Mapping[str, Any], details: bool) -> Record:
    """Of a clip or a segment. `confidence` is that of the best sentence, also if it is withheld (caption null)."""
    part = {name: captioned[name] for name in ("start_s", "end_s", "caption") if name in captioned}
    best = captioned["captions"][0]
    if "confidence" in best:
        part["confidence"] = best["confidence"]
    return part | {"captions": captioned["captions"]} if details else part


def merged(records: Sequence[Record]) -> Record:
    """The record of a video from the records of its parts, in order. An error in one part is the error of the video."""
    for record in records:
        if "segments" not in record:
            return record
    return {**records[0], "segments": [segment for record in records for segment in record["segments"]]}
