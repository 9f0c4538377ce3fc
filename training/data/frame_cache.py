"""The frames of many clips -> one array on disk, on all cores. A killed run continues where it stopped.

A clip of video fills one row, its 16 frames; one of stills a row for each of its pictures.

    progress.jsonl      what the folder is made from, then a line for each row whose frames are on the disk, with the
                        name, size and time of its file: a row whose file differs now is written again
    frames.npy.partial  becomes frames.npy when every clip has been tried

Knows files and rows, but no captions, splits or vocabularies.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from etenet.errors import CaptionError, DecoderCrashed, InternalError, UsageError
from etenet.files import AppendOnlyLog, replacing
from etenet.linux import cores
from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_frames
from training.progress import Progress

# Those of the server, except for the time: how fast a clip decodes depends on what else runs on this machine.
LIMITS = DecodeLimits(decode_cpu_s=120.0, decode_deadline_s=3600.0)

# Not fork: the parent has threads by then, and a fork would copy their locks as they are.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])  # one slow import instead of one per core


Stamp = dict[str, object]  # what a file looked like when its frames were taken; {} in the logs of older versions


class CacheJob(Protocol):
    """A clip that fills `rows` rows of the cache, from `row` on."""

    @property
    def row(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def make(self) -> None:
        """Make the file of the clip, if it does not exist yet. Raises `OSError` if it cannot be written."""

    def stamp(self) -> Stamp:
        """Changes with the contents of the clip, and not where its folder is moved. Raises `OSError`."""

    def frames(self, resize_px: int) -> NDArray[np.uint8]:
        """What is in these rows. Raises `CaptionError` and `OSError`."""


@dataclass(frozen=True, slots=True)
class Job:
    """The clip of a row. `render` makes the bytes of a file that does not exist yet."""

    row: int
    file: Path
    render: Callable[[], bytes] | None = None

    @property
    def rows(self) -> int:
        return 1

    def make(self) -> None:
        if self.render is not None:
            with replacing(self.file) as file:
                file.write(self.render())

    def stamp(self) -> Stamp:
        found = self.file.stat()
        return {"file": self.file.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}

    def frames(self, resize_px: int) -> NDArray[np.uint8]:
        """(16, resize_px, resize_px, 3)."""
        return sample_frames(self.file.read_bytes(), resize_px=resize_px, limits=LIMITS).frames


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a clip has no frames."""

    code: str
    message: str


class CacheLog:
    """What a folder is made from and which rows are done. While it is open, no other run can use the folder.

    Raises `UsageError` if the folder was begun with other arguments, has other files or cannot be written.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, object]) -> None:
        path = folder / "progress.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise UsageError(f"{folder} has other files; name an empty folder or a new one with --out")
            self._log = AppendOnlyLog(path)
            try:
                self.done = self._begin(folder, json.loads(json.dumps(made_from)))
            except BaseException:
                self._log.close()
                raise
        except BlockingIOError as error:
            raise UsageError(f"another run is preparing {folder}; wait until it ends") from error
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error

    def _begin(self, folder: Path, made_from: dict[str, object]) -> dict[int, Stamp]:
        whole = [line for line in self._log.lines() if line.endswith(b"\n")]
        try:
            begun_with, *rows = [json.loads(line) for line in whole] or [made_from]
            done = {int(line.pop("row")): line for line in rows}
            names = sorted(begun_with.keys() | made_from.keys())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self._log.path} is damaged; empty {folder} and start again") from error
        for name in names:
            before, now = begun_with.get(name), made_from.get(name)
            if before != now:
                raise UsageError(
                    f"{folder} was begun with {name} = {before}, now it is {now}; name another folder or empty this one"
                )
        self._log.cut_off_half_line()
        if not whole:
            self._log.add(made_from)
        return done

    def has(self, job: CacheJob) -> bool:
        """Whether the frames of its row were taken from its file as it is now."""
        try:
            return job.row in self.done and self.done[job.row] in ({}, job.stamp())
        except OSError:
            return False

    def note(self, row: int, stamp: Stamp) -> None:
        """Call this when the row is on the disk. Raises `OSError`."""
        self._log.add({"row": row, **stamp})
        self.done[row] = stamp

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._log.close()


def shape_of_clips(rows: int, resize_px: int) -> tuple[int, ...]:
    """The array of clips of video."""
    return rows, FRAMES_PER_CLIP, resize_px, resize_px, 3


def fill(folder: Path, jobs: Sequence[CacheJob], log: CacheLog, shape: tuple[int, ...]) -> dict[int, Failure]:
    """Write `frames.npy`, uint8, of this shape, and return why jobs failed, by their first row, which stays empty.

    The shape is (rows, 16, resize_px, resize_px, 3) for clips of video, and (rows, resize_px, resize_px, 3) for stills.
    Rows that the log has are not written again. Rows that failed before are tried again, like those whose file changed.
    """
    whole, unfinished = folder / "frames.npy", folder / "frames.npy.partial"
    cache = whole if whole.exists() else unfinished
    if not log.done and cache is unfinished:
        np.lib.format.open_memmap(cache, mode="w+", dtype=np.uint8, shape=shape)
    elif not cache.exists():
        raise UsageError(f"{folder / 'progress.jsonl'} has rows, but the frames are gone; empty {folder}, start again")
    todo = [job for job in jobs if not log.has(job)]
    _check_space(folder, sum(job.rows for job in todo if job.row not in log.done) * math.prod(shape[1:]))
    failures = {}
    with Progress("frames", len(jobs), "clip", done=len(jobs) - len(todo)) as progress:
        try:
            for job, outcome in _outcomes(todo, partial(_store, cache=cache, resize_px=shape[-2])):
                if isinstance(outcome, Failure):
                    failures[job.row] = outcome
                else:
                    log.note(job.row, outcome)
                progress.update(1)
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder}: {error.strerror}; fix that, and start again with the same arguments"
            ) from error
    if cache is unfinished:
        os.replace(unfinished, whole)
    return failures


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UsageError(
            f"the frames need {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free; "
            "make room, or give a smaller --resize-px"
        )


def _outcomes(
    jobs: Iterable[CacheJob], work: Callable[[CacheJob], Stamp | Failure]
) -> Iterator[tuple[CacheJob, Stamp | Failure]]:
    """Each job with its outcome, in the order in which they end.

    If a job crashes its process, all jobs in progress fail. Each is tried again alone, to find which one it was.
    """
    todo, processes = deque(jobs), cores()
    while todo:
        in_progress: dict[Future[Stamp | Failure], CacheJob] = {}
        with suppress(BrokenProcessPool), _pool(processes) as workers:
            while todo or in_progress:
                while todo and len(in_progress) < 2 * processes:
                    in_progress[workers.submit(work, todo[0])] = todo[0]
                    todo.popleft()
                for future in wait(in_progress, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    yield in_progress.pop(future), outcome
        for job in in_progress.values():
            try:
                with _pool(1) as workers:
                    outcome = workers.submit(work, job).result()
            except BrokenProcessPool:
                outcome = Failure(DecoderCrashed.code, "the clip crashes the decoder; re-encode it or remove it")
            yield job, outcome


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=_PROCESSES, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, a worker whose parent was killed would wait for work forever.

    `linux.end_with_parent` does not help: to Linux, the parent is the fork server, which lives as long as its workers.
    """
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _store(job: CacheJob, *, cache: Path, resize_px: int) -> Stamp | Failure:
    """Runs in a worker. Writes the frames of a clip to their rows, and returns when they are on the disk."""
    job.make()
    try:
        stamp = job.stamp()  # before the file is read: what replaces it meanwhile is seen by the next run
        frames = job.frames(resize_px)
    except CaptionError as error:
        return Failure(error.code, str(error))
    except OSError as error:
        return Failure("unreadable_file", f"the file cannot be read: {error.strerror}")
    except Exception as error:  # a bug of ours should not cost the hours spent on the other clips
        return Failure(InternalError.code, f"{type(error).__name__}: {error}")
    _write(cache, frames, row=job.row, rows=job.rows)
    return stamp


def _write(cache: Path, frames: NDArray[np.uint8], *, row: int, rows: int) -> None:
    """Not through a memory map: on a full disk, writing to one kills the process instead of raising an error."""
    start: int = np.load(cache, mmap_mode="r").offset
    with cache.open("r+b") as file:
        file.seek(start + row * frames.nbytes // rows)
        file.write(np.ascontiguousarray(frames).data)
        file.flush()
        os.fsync(file.fileno())
