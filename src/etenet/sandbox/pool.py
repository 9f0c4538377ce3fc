"""Decoder processes: bytes -> frames behind a wall, so that a clip harms nothing but itself.

Each process has limits on memory, CPU and wall-clock time, sees no files and can make no system call but those that
decoding needs (`decoder_process.py`). A clip that makes its process crash is tried once more in a fresh one, and in
software, since the process may have died of something else, or a GPU's driver of the clip; one that does it again, or
burns its time without an answer, is refused at once for the next hour (`poison.py`). Body and frames travel in a memory
file that lives as long as the request.

Why not a library: pebble and concurrent.futures share one pipe among their processes, so that one that is stopped
while it holds the pipe's lock holds up all, and they pickle every body and every frame.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

from etenet import metrics
from etenet.errors import CaptionError, DecoderCrashed, DecodeTimeout, EtenetError
from etenet.sandbox.process import DecoderProcess, Died, Hung
from etenet.sandbox.quarantine import Poison
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import SampledVideo, sample_segments
from etenet.video.segments import WHOLE, Cut

_log = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
GRACE_S = 0.25  # for a decoder that looks at the clock itself, to say so
CLIPS_PER_PROCESS = 1000
_IN_SOFTWARE = "a decoder process decodes all videos in software: %s"
_ERRORS = {kind.__name__: kind for kind in CaptionError.__subclasses__() if kind.status < 500}
_MESSAGE_LETTERS = 1000
_NEEDED_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")
_NEEDED_BY_GPU = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_START = """
import json, sys
from importlib import import_module
settings = json.loads(sys.argv[1])
sys.path[:] = settings["path"]
module, _, name = settings["entry"].partition(":")
getattr(import_module(module), name)(settings)
"""

_Job = tuple[bytes, Cut, "Future[list[SampledVideo]]"]


class Sandbox:
    """A pool of decoder processes.

    `filter_fault` says why they run without a system-call filter; None where they have one. `gpu_fault` says why some
    decode all in software although there is a `gpu`. `entry` is what runs in them, module:function. They end with
    `close`, with this object, and with this process, however it ends.
    """

    def __init__(
        self,
        *,
        resize_px: int,
        limits: DecodeLimits | None = None,
        processes: int | None = None,
        gpu: GpuDecoding | None = None,
        entry: str = "etenet.sandbox.worker:main",
    ) -> None:
        self._poison = Poison()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._keepers = [
            _Keeper(resize_px, limits or DecodeLimits(), entry, gpu, self._jobs, self._poison)
            for _ in range(processes or len(os.sched_getaffinity(0)))
        ]
        begun = [keeper.begin() for keeper in self._keepers]
        self.close = weakref.finalize(self, _end, self._jobs, len(begun))
        try:
            faults = [first.result() for first in begun]
        except (OSError, Died) as error:
            raise EtenetError(f"the decoder processes do not start: {error}") from error
        self.filter_fault, self.gpu_fault = (next(filter(None, of_each), None) for of_each in zip(*faults, strict=True))
        if self.gpu_fault:
            _log.warning(_IN_SOFTWARE, self.gpu_fault)
        if self.filter_fault:
            _log.warning("decoder processes run without a system-call filter: %s", self.filter_fault)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [keeper.process.pid for keeper in self._keepers if keeper.process.alive]

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[SampledVideo]]:
        """The frames of the clip's segments, or a `CaptionError` about it."""
        if not self.close.alive:
            raise ValueError("the sandbox is closed")
        future: Future[list[SampledVideo]] = Future()
        if verdict := self._poison.verdict(body, cut):
            future.set_exception(verdict)
        else:
            self._jobs.put((body, cut, future))
        return future


class InProcess:
    """The same without a wall: for clips that are trusted, and where there is no Linux."""

    def __init__(self, *, resize_px: int, limits: DecodeLimits | None = None) -> None:
        self._sample = partial(sample_segments, resize_px=resize_px, limits=limits)
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decoder")

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[SampledVideo]]:
        return self._threads.submit(self._sample, body, cut)


def _end(jobs: SimpleQueue[_Job | None], keepers: int) -> None:
    for _ in range(keepers):
        jobs.put(None)


class _Keeper:
    """A thread that hands clips to a decoder process, and has a new one whenever that is needed.

    The process dies with the thread that started it (PR_SET_PDEATHSIG), so both live as long as the sandbox.
    """

    def __init__(
        self,
        resize_px: int,
        limits: DecodeLimits,
        entry: str,
        gpu: GpuDecoding | None,
        jobs: SimpleQueue[_Job | None],
        poison: Poison,
    ) -> None:
        self._process_with = partial(DecoderProcess, resize_px, limits, entry)
        self._seconds, self._gpu, self._gpu_fault = limits.decode_deadline_s, gpu, ""
        self._jobs, self._poison = jobs, poison

    def begin(self) -> Future[tuple[str | None, str]]:
        """Start; the result is the first process's `filter_fault`, and why it does without the GPU."""
        first: Future[tuple[str | None, str]] = Future()
        threading.Thread(target=self._run, args=(first,), name="decoder", daemon=True).start()
        return first

    def _run(self, first: Future[tuple[str | None, str]]) -> None:
        try:
            self.process = self._start()
        except BaseException as error:
            first.set_exception(error)
            return
        first.set_result((self.process.filter_fault, self._gpu_fault))
        while (job := self._jobs.get()) is not None:
            body, cut, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._sampled(body, cut))
                except Exception as error:
                    future.set_exception(error)
            del job, body, future
            try:
                self._renew()
            except Exception:
                _log.exception("a decoder process could not be started; the next clip tries again")
        self.process.end()

    def _sampled(self, body: bytes, cut: Cut) -> list[SampledVideo]:
        self._renew()
        seconds, started = self._seconds + GRACE_S, time.monotonic()
        try:
            return self._tried(body, cut, seconds, may_use_gpu=True)
        except Died as died:
            _log.warning("a decoder process died (%s); its clip is tried again", died)
            seconds -= time.monotonic() - started
        self._renew()
        try:
            return self._tried(body, cut, seconds, may_use_gpu=False)
        except Died as died:
            crashed = DecoderCrashed("the decoder crashed on this video; encode it again, for example with ffmpeg")
            if not died.killed_from_outside:
                self._poison.remember(body, crashed, cut)
            raise crashed from died

    def _tried(self, body: bytes, cut: Cut, seconds: float, *, may_use_gpu: bool) -> list[SampledVideo]:
        try:
            videos = self.process.sample(body, cut, seconds, may_use_gpu=may_use_gpu)
        except (DecodeTimeout, Hung) as late:
            metrics.DECODERS_TIMED_OUT.inc()
            timeout = DecodeTimeout(f"decoding took longer than {self._seconds:g} s; send a shorter clip")
            if self.process.clip_cpu_s > self._seconds / 2:  # or else the process was held up by something else
                self._poison.remember(body, timeout, cut)
            raise timeout from late
        if videos[0].on_gpu:
            metrics.GPU_DECODED.inc()
        return videos

    def _renew(self) -> None:
        """Have a process that is fit for another clip."""
        if not self.process.alive or self.process.clips >= CLIPS_PER_PROCESS:
            self.process.end()
            with_gpu = self._gpu
            self.process = self._start()
            metrics.DECODERS_REPLACED.inc()
            if self._gpu is not with_gpu:
                _log.warning(_IN_SOFTWARE, self._gpu_fault)

    def _start(self) -> DecoderProcess:
        """A process, and once one could not use the GPU, whatever the reason, for good one that knows of none."""
        try:
            return self._process_with(self._gpu)
        except Died as died:
            if not self._gpu:
                raise
            self._gpu, self._gpu_fault = None, str(died)
        return self._process_with(None)
