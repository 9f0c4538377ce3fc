"""The records of a batch job on disk, one JSON object per clip. Other formats are made from them when the job is done.

A job that is killed at any moment continues after the last line of its journal. If the output is JSON lines, the
journal is the output. Otherwise it stands beside the output as OUT.jsonl.

The first line also says what made the records, so that no two checkpoints or settings get mixed:

    {"video": ..., "caption": ..., "job": {"checkpoint": "sha256:...", "settings": {"beam_size": "3"}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from etenet.errors import JobStopped, UsageError
from etenet.files import AppendOnlyLog
from etenet.files.rows import shown
from etenet.jobs.inputs import id_of

_FIX = "name another file with --out, or start anew with --overwrite"
Record = dict[str, Any]  # "video" and one of "caption", "segments" and "error"
_SHOWN_DIGITS = len("sha256:") + 12
_BEGINNING = b'{"video": '


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the records of a job depend on beside its clips. `settings` are those that are not at their default."""

    checkpoint: str  # sha256:..., of the file
    settings: Mapping[str, str]

    @classmethod
    def of(cls, record: Record) -> Self | None:
        """What the first record of a journal says; None if it says nothing, as those of older versions."""
        if (job := record.get("job")) is None:
            return None
        settings = {name: str(value) for name, value in job["settings"].items()}
        return cls(checkpoint=str(job["checkpoint"]), settings=settings)

    def as_dict(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "settings": dict(self.settings)}

    def differences(self, now: Job) -> str:
        """How another job differs, as in "beam_size 3 (now default)"; empty if it does not."""
        before, after = ({"checkpoint": job.checkpoint[:_SHOWN_DIGITS], **job.settings} for job in (self, now))
        return ", ".join(
            f"{name} {before.get(name, 'default')} (now {after.get(name, 'default')})"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        )


class Journal:
    """The records in a file, which may be new. `done` maps each clip that has a record to whether it failed.

    Errors call it `name`, or else by its path. Raises `UsageError` if the file is no journal, or that of another `job`.
    The file is then unchanged. With `overwrite`, the records of another journal are removed.
    """

    def __init__(self, path: Path, job: Job | None = None, *, overwrite: bool = False, name: str = "") -> None:
        self.path, self.name, self.done, self._job = path, name or str(path), dict[str, bool](), job
        self.is_of_unknown_job = False  # with records of a version that did not write down what made them
        try:
            self._log = AppendOnlyLog(path)
            try:
                self.done = {record["video"]: "error" in record for record in self.records()}
                if overwrite:
                    self._log.rewrite(())
                    self.done = {}
                elif self.done:
                    self._continue()
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

    def _continue(self) -> None:
        """Take over the job of the records that are there."""
        first = next(self._lines())
        try:
            made_by = Job.of(first)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.name}, line 1: no job is described in {shown(first['job'])}; {_FIX}") from error
        if made_by and self._job and (differences := made_by.differences(self._job)):
            raise UsageError(f"{self.name} was made with {differences}; {_FIX}")
        self._job, self.is_of_unknown_job = made_by or self._job, made_by is None

    def records(self) -> Iterator[Record]:
        """In the order of the file, without half a line at its end. `UsageError` if another line is no record."""
        for record in self._lines():
            record.pop("job", None)
            yield record | {"video": id_of(record["video"])}

    def _lines(self) -> Iterator[Record]:
        for number, line in enumerate(self._log.lines(), start=1):
            if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
                return
            try:
                record = json.loads(line)
                if not isinstance(record["video"], str) or not record.keys() & {"caption", "segments", "error"}:
                    raise ValueError("no video, or no result for it")
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.name}, line {number}, was not written by this command; name another file with --out"
                ) from error
            yield record

    def add(self, record: Record) -> None:
        """Raises `JobStopped` if it cannot be written, as on a full disk."""
        with self._writing():
            self._log.add(record if self.done else self._with_job(record))
        self.done[record["video"]] = "error" in record

    def forget_failures(self) -> None:
        """Remove the records of clips that failed, so that these clips are tried again."""
        with self._writing():
            self._rewrite(record for record in self.records() if "error" not in record)
        self.done = dict.fromkeys((video for video, failed in self.done.items() if not failed), False)
        self.is_of_unknown_job &= bool(self.done)

    def put_in_order(self, videos: Iterable[str]) -> None:
        """Sort the records by the order of these clips; the records of other clips follow."""
        place = {video: number for number, video in enumerate(videos)}
        places = [place.get(video, len(place)) for video in self.done]
        if places != sorted(places):
            records = sorted(self.records(), key=lambda record: place.get(record["video"], len(place)))
            with self._writing():
                self._rewrite(records)

    def _rewrite(self, records: Iterable[Record]) -> None:
        self._log.rewrite(record if number else self._with_job(record) for number, record in enumerate(records))

    def _with_job(self, record: Record) -> Record:
        return record if self._job is None or self.is_of_unknown_job else {**record, "job": self._job.as_dict()}

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
        segments = [part_of_record(segment, details=details) for segment in response["segments"]]
        return {"picture_start_s": response["video"].get("start_s", 0.0), "segments": segments}
    return part_of_record(response, details=details)


def part_of_record(captioned: Mapping[str, Any], *, details: bool) -> Record:
    """The same of a clip, or of one segment.

    `confidence` is that of the best sentence, also if it is withheld (caption null). Of the frames, if they have
    pictures, every fourth is kept.
    """
    part = {name: captioned[name] for name in ("start_s", "end_s", "caption") if name in captioned}
    best = captioned["captions"][0]
    if "confidence" in best:
        part["confidence"] = best["confidence"]
    if "thumbnails" in (frames := captioned.get("frames", {})):
        part["frames"] = {name: frames[name][2::4] for name in ("times_s", "thumbnails")}
    return part | {"captions": captioned["captions"]} if details else part


def merged(records: Sequence[Record]) -> Record:
    """The record of a video from the records of its parts, in order. An error in one part is the error of the video."""
    for record in records:
        if "segments" not in record:
            return record
    return {**records[0], "segments": [segment for record in records for segment in record["segments"]]}
