"""A pool of decoder processes: bytes -> clips, so that a hostile video harms nothing but itself.

Each process has limits on memory, CPU time and wall-clock time, sees no files, and can make no system call except those
that decoding needs (`worker.py`). If a process crashes on a video, the video is tried once more in a fresh process: the
crash may have had another cause. A video that crashes two processes, or uses up its CPU time, is refused at once for
the next hour (`quarantine.py`). If only the wall clock ran out, the machine was busy, and the video may come again.

There is a process for each core. While the pool has fewer videos than cores, threads of a video's own process help to
decode it, on the cores whose processes have nothing to do: another process would have to open the file again.

Why not a library: in pebble and concurrent.futures all processes share one pipe. A process that is stopped while it
holds the pipe's lock stops all the others. Both also pickle every body and every frame.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from etenet import metrics
from etenet.errors import CaptionError, DecoderCrashed, DecodeTimeout, EtenetError, Overloaded
from etenet.linux import cores
from etenet.sandbox.process import GRACE_S, DecoderProcess, Died, Hung
from etenet.sandbox.quarantine import Quarantine
from etenet.video.clip import Clip
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_segments
from etenet.video.segments import WHOLE, Cut

_log = logging.getLogger(__name__)

CLIPS_PER_PROCESS = 1000
RETRY_S = 1.0  # after a process that could not be started. Meanwhile other processes take the videos
START_DEADLINE_S = 60.0  # of the first processes. A later one gets the time that the video has that waits for it
MOST_HELPERS = 3  # of one video: the median of real clips has three parts that can be decoded at the same time

_Job = tuple[bytes, Cut, "Future[list[Clip]]"]


class Decoders(Protocol):
    """Whatever decodes videos."""

    @property
    def limits(self) -> DecodeLimits: ...

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[Clip]]:
        """The clips of a video, one for each segment, or a `CaptionError`."""


class Sandbox:
    """Decoders in processes. They end with `close`, with this object, and with this process, however it ends.

    `filter_fault` says why there is no system-call filter; None if there is one. `entry` is what runs in the processes,
    module:function.
    """

    def __init__(
        self,
        *,
        resize_px: int,
        limits: DecodeLimits | None = None,
        processes: int | None = None,
        entry: str = "etenet.sandbox.worker:main",
    ) -> None:
        self.limits = limits or DecodeLimits()
        self._quarantine = Quarantine()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._share = _Share(processes or cores())
        self._supervisors = [
            _Supervisor(resize_px, self.limits, entry, self._jobs, self._quarantine, self._share)
            for _ in range(self._share.cores)
        ]
        started = [supervisor.start() for supervisor in self._supervisors]
        self.close = weakref.finalize(self, _close, self._jobs, len(started))
        try:
            faults = [first.result() for first in started]
        except (OSError, Died) as error:
            raise EtenetError(f"the decoder processes do not start: {error}") from error
        self.filter_fault = next(filter(None, faults), None)
        if self.filter_fault:
            _log.warning("decoder processes run without a system-call filter: %s", self.filter_fault)

    @property
    def pids(self) -> list[int]:
        """The processes that are ready for videos, or have one."""
        processes = [supervisor.process for supervisor in self._supervisors]
        return [process.pid for process in processes if process.ready and process.alive]

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[Clip]]:
        if not self.close.alive:
            raise ValueError("the sandbox is closed")
        future: Future[list[Clip]] = Future()
        if verdict := self._quarantine.verdict(body, cut):
            future.set_exception(verdict)
        else:
            self._share.enter(future)
            self._jobs.put((body, cut, future))
        return future


class InProcess:
    """Decoders in threads of this process: for trusted videos, and for systems other than Linux."""

    def __init__(self, *, resize_px: int, limits: DecodeLimits | None = None) -> None:
        self.limits = limits or DecodeLimits()
        self._sample = partial(sample_segments, resize_px=resize_px, limits=self.limits)
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="decoder")

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[Clip]]:
        return self._threads.submit(self._sample, body, cut)


class _Share:
    """Of each video in the cores of a pool."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._videos: set[Future[list[Clip]]] = set()

    def enter(self, video: Future[list[Clip]]) -> None:
        """Until it is done."""
        self._videos.add(video)
        video.add_done_callback(self._videos.discard)

    @property
    def helpers(self) -> int:
        """How many threads may help the one of a video."""
        return max(0, min(self.cores // max(1, len(self._videos)) - 1, MOST_HELPERS))


def _close(jobs: SimpleQueue[_Job | None], supervisors: int) -> None:
    for _ in range(supervisors):
        jobs.put(None)


class _Supervisor:
    """A thread that hands videos to one decoder process and replaces the process when that is needed.

    The process dies with the thread that started it (PR_SET_PDEATHSIG), so both live as long as the sandbox.
    """

    def __init__(
        self,
        resize_px: int,
        limits: DecodeLimits,
        entry: str,
        jobs: SimpleQueue[_Job | None],
        quarantine: Quarantine,
        share: _Share,
    ) -> None:
        self._new_process = partial(DecoderProcess, resize_px, limits, entry, min(share.cores - 1, MOST_HELPERS))
        self._limits, self._jobs, self._quarantine, self._share = limits, jobs, quarantine, share

    def start(self) -> Future[str | None]:
        """Start the thread. The result comes with its first process: why that has no system-call filter, or None."""
        first: Future[str | None] = Future()
        threading.Thread(target=self._run, args=(first,), name="decoder", daemon=True).start()
        return first

    def _run(self, first: Future[str | None]) -> None:
        try:
            self.process = self._new_process()
            self.process.await_ready(START_DEADLINE_S)
        except BaseException as error:
            first.set_exception(error)
            return
        first.set_result(self.process.filter_fault)
        while (job := self._jobs.get()) is not None:
            body, cut, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._sample(body, cut))
                except CaptionError as error:
                    future.set_exception(error.without_frames())
                except Exception as error:
                    future.set_exception(error)
            del job, body, future
            with suppress(OSError):  # the next video tries again
                self._renew()
        self.process.end()

    def _sample(self, body: bytes, cut: Cut) -> list[Clip]:
        ends_s = time.monotonic() + self._limits.decode_deadline_s + GRACE_S
        self._await_process(ends_s)
        try:
            return self._try(body, cut, ends_s, helpers=self._share.helpers)
        except Died as death:
            _log.warning("a decoder process died (%s); its video is tried again", str(death))
        spent_cpu_s = self.process.clip_cpu_s
        self._await_process(ends_s)
        try:
            return self._try(body, cut, ends_s, spent_cpu_s=spent_cpu_s)
        except Died as death:
            crash = DecoderCrashed("the decoder crashed on this video; encode it again, for example with ffmpeg")
            if not death.killed_from_outside:
                self._quarantine.add(body, crash, cut)
            raise crash from death

    def _try(self, body: bytes, cut: Cut, ends_s: float, *, helpers: int = 0, spent_cpu_s: float = 0.0) -> list[Clip]:
        left_s = ends_s - time.monotonic()
        try:
            return self.process.sample(body, cut, left_s, helpers=helpers, spent_cpu_s=spent_cpu_s)
        except (DecodeTimeout, Hung) as late:
            metrics.DECODERS_TIMED_OUT.inc()
            cpu_s = self.process.clip_cpu_s
            if isinstance(late, Hung) and cpu_s < self._limits.decode_cpu_s:
                raise self._limits.held_up(cpu_s) from late
            timeout = self._limits.too_slow()
            if cpu_s > self._limits.decode_cpu_s / 2:  # what a process reports is not trusted
                self._quarantine.add(body, timeout, cut)
            raise timeout from late

    def _await_process(self, ends_s: float) -> None:
        """Raises `Overloaded` if no process is ready in time, or two in a row end before they are."""
        for is_last in (False, True):
            try:
                self._renew()
                self.process.await_ready(ends_s - time.monotonic())
            except (OSError, Died) as error:
                _log.warning("a decoder process could not be started (%s)", error)
                if is_last:
                    raise Overloaded("no process could be started to decode this video; send it again") from error
                time.sleep(max(0.0, min(RETRY_S, ends_s - time.monotonic())))
            else:
                return

    def _renew(self) -> None:
        """Start another process if this one is not fit for another video, but an old one is better than none.

        Raises `OSError` if there is none.
        """
        if (in_order := self.process.alive) and self.process.clips < CLIPS_PER_PROCESS:
            return
        try:
            fresh = self._new_process()
        except OSError:
            if self.process.alive:
                return
            raise
        self.process.end()
        self.process = fresh
        if not in_order:
            metrics.DECODERS_REPLACED.inc()
