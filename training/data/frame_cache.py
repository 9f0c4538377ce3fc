"""The frames of many clips -> one array on disk, on all cores, going on where a killed run stopped.

    progress.jsonl      what the folder is made from, then one line per row whose frames are on the disk
    frames.npy.partial  until every clip has been tried; then frames.npy

Knows files and rows, nothing of captions, splits or vocabularies.
"""

from __future__ import annotations

import json
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
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from etenet.errors import CaptionError, DecoderCrashed, InternalError, UsageError
from etenet.files import AppendOnlyLog, replacing
from etenet.linux import cores
from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_frames

# What is served is what is trained on, but for the time: how fast a clip decodes depends on what else runs here.
LIMITS = DecodeLimits(decode_deadline_s=120.0)

# Not a fork: by then the parent has threads, and a fork copies their locks as they are.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])  # the slow imports once, not once per core


@dataclass(frozen=True, slots=True)
class Job:
    """The clip of a row. `render` makes the bytes of a file that is not there yet."""

    row: int
    file: Path
    render: Callable[[], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a clip has no frames."""

    code: str
    message: str


class CacheLog:
    """What a folder is made from and which rows are done. While it is open, no other run can use the folder.

    Raises `UsageError` where the folder was begun with something else, holds other files or cannot be written.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, object]) -> None:
        path = folder / "progress.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise UsageError(f"{folder} holds other files; name an empty folder or a new one with --out")
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

    def _begin(self, folder: Path, made_from: dict[str, object]) -> set[int]:
        whole = [line for line in self._log.lines() if line.endswith(b"\n")]
        try:
            begun_with, *rows = [json.loads(line) for line in whole] or [made_from]
            done = {int(line["row"]) for line in rows}
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

    def note(self, row: int) -> None:
        """To be called once the row is on the disk. Raises `OSError`."""
        self._log.add({"row": row})
        self.done.add(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._log.close()


def fill(folder: Path, jobs: Sequence[Job], log: CacheLog, *, rows: int, resize_px: int) -> dict[int, Failure]:
    """Write `frames.npy`, (rows, 16, resize_px, resize_px, 3) uint8, and return the rows that stay empty.

    Rows already noted as done are left alone; those that failed before are tried again.
    """
    whole, unfinished = folder / "frames.npy", folder / "frames.npy.partial"
    cache = whole if whole.exists() else unfinished
    shape = (rows, FRAMES_PER_CLIP, resize_px, resize_px, 3)
    if not log.done and cache is unfinished:
        np.lib.format.open_memmap(cache, mode="w+", dtype=np.uint8, shape=shape)
    elif not cache.exists():
        raise UsageError(f"the frames that {folder / 'progress.jsonl'} speaks of are gone; empty {folder}, start again")
    todo = [job for job in jobs if job.row not in log.done]
    _check_space(folder, len(todo) * int(np.prod(shape[1:])))
    failures = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="clip", disable=None) as bar:
        try:
            for job, failure in _outcomes(todo, partial(_store, cache=cache, resize_px=resize_px)):
                if failure is None:
                    log.note(job.row)
                else:
                    failures[job.row] = failure
                bar.update()
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder}: {error.strerror}; start again with the same arguments to go on"
            ) from error
    if cache is unfinished:
        os.replace(unfinished, whole)
    return failures


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UsageError(
            f"the frames need {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free; "
            "make room, or take smaller frames with --resize-px"
        )


def _outcomes(jobs: Iterable[Job], work: Callable[[Job], Failure | None]) -> Iterator[tuple[Job, Failure | None]]:
    """Every job with its outcome, in the order they are done.

    Where a job takes its process down, all that were under way fail with it; each of them is tried again alone,
    so that the blame falls on the right one.
    """
    todo, processes = deque(jobs), cores()
    while todo:
        under_way: dict[Future[Failure | None], Job] = {}
        with suppress(BrokenProcessPool), _pool(processes) as workers:
            while todo or under_way:
                while todo and len(under_way) < 2 * processes:
                    under_way[workers.submit(work, todo[0])] = todo[0]
                    todo.popleft()
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    failure = future.result()
                    yield under_way.pop(future), failure
        for job in under_way.values():
            try:
                with _pool(1) as workers:
                    failure = workers.submit(work, job).result()
            except BrokenProcessPool:
                failure = Failure(DecoderCrashed.code, "the clip takes the decoder down; re-encode it or leave it out")
            yield job, failure


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=_PROCESSES, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _store(job: Job, *, cache: Path, resize_px: int) -> Failure | None:
    """In a worker: the frames of a clip to their row, on the disk when this returns."""
    if job.render is not None:
        with replacing(job.file) as file:
            file.write(job.render())
    try:
        frames = sample_frames(job.file.read_bytes(), resize_px=resize_px, limits=LIMITS).frames
    except CaptionError as error:
        return Failure(error.code, str(error))
    except OSError as error:
        return Failure("unreadable_file", f"the file cannot be read: {error.strerror}")
    except Exception as error:  # our own bug, and still no reason to lose the hours spent on the other clips
        return Failure(InternalError.code, f"{type(error).__name__}: {error}")
    _write_row(cache, job.row, frames)
    return None


def _write_row(cache: Path, row: int, frames: NDArray[np.uint8]) -> None:
    """Written, not assigned through a memory map: on a full disk that is an error, not the end of the process."""
    start: int = np.load(cache, mmap_mode="r").offset
    with cache.open("r+b") as file:
        file.seek(start + row * frames.nbytes)
        file.write(np.ascontiguousarray(frames).data)
        file.flush()
        os.fsync(file.fileno())
