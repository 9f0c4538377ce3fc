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

import fcntl
import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from etenet import device_files, metrics
from etenet.config import FRAMES_PER_CLIP, DecodeLimits, GpuDecoding
from etenet.decoder_process import MESSAGE_BYTES
from etenet.errors import CaptionError, DecoderCrashed, DecodeTimeout, EtenetError, InternalError
from etenet.ffmpeg import DECODERS
from etenet.poison import Poison
from etenet.segments import WHOLE, Cut
from etenet.video import SampledVideo, sample_segments

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
        entry: str = "etenet.decoder_process:main",
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
        except (OSError, _Died) as error:
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
        self._process_with = partial(_Process, resize_px, limits, entry)
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
        except _Died as died:
            _log.warning("a decoder process died (%s); its clip is tried again", died)
            seconds -= time.monotonic() - started
        self._renew()
        try:
            return self._tried(body, cut, seconds, may_use_gpu=False)
        except _Died as died:
            crashed = DecoderCrashed("the decoder crashed on this video; encode it again, for example with ffmpeg")
            if not died.killed_from_outside:
                self._poison.remember(body, crashed, cut)
            raise crashed from died

    def _tried(self, body: bytes, cut: Cut, seconds: float, *, may_use_gpu: bool) -> list[SampledVideo]:
        try:
            videos = self.process.sample(body, cut, seconds, may_use_gpu=may_use_gpu)
        except (DecodeTimeout, _Hung) as late:
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

    def _start(self) -> _Process:
        """A process, and once one could not use the GPU, whatever the reason, for good one that knows of none."""
        try:
            return self._process_with(self._gpu)
        except _Died as died:
            if not self._gpu:
                raise
            self._gpu, self._gpu_fault = None, str(died)
        return self._process_with(None)


class _Died(Exception):
    """The process ended, or said what a decoder process does not say, and was ended.

    It cannot have sent itself SIGKILL, which the filter forbids: that was a person, or the kernel, short of memory.
    """

    def __init__(self, how: str, *, killed_from_outside: bool = False) -> None:
        super().__init__(how)
        self.killed_from_outside = killed_from_outside


class _Hung(Exception):
    """No answer in time; the process was ended."""


class _Process:
    """A decoder process and the channel to it. `clip_cpu_s` is what its last clip took."""

    def __init__(self, resize_px: int, limits: DecodeLimits, entry: str, gpu: GpuDecoding | None) -> None:
        self.clips, self.clip_cpu_s, self._ready = 0, 0.0, False
        self._frames_shape, self._max_segments = (FRAMES_PER_CLIP, resize_px, resize_px, 3), limits.max_segments
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "entry": entry,
            "path": [os.path.abspath(folder) for folder in sys.path],
            "channel": theirs.fileno(),
            "parent": os.getpid(),
            "resize_px": resize_px,
            "limits": asdict(limits),
            "gpu": gpu and asdict(gpu),
        }
        needed = _NEEDED_ENVIRONMENT + (_NEEDED_BY_GPU if gpu else ())
        # Its working directory is gone once it runs: as empty as can be, and nothing to clean up.
        with theirs, tempfile.TemporaryDirectory(prefix="decoder-") as nowhere:
            self._program = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(settings)],
                cwd=nowhere,
                env={name: os.environ[name] for name in needed if name in os.environ} | _ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            self._channel.settimeout(START_DEADLINE_S)
            try:
                said = json.loads(self._first_words())
                self.filter_fault: str | None = said["filter_fault"]
            except (OSError, ValueError) as error:
                self.end()
                raise _Died("a decoder process ended before it was ready; the log has its last words") from error
            if said["gpu_fault"]:
                self.end()
                raise _Died(said["gpu_fault"])
        self._ready = True
        metrics.DECODERS.inc()

    def _first_words(self) -> bytes:
        """That it is ready. One with a GPU first sends a listener, and needs device files before it is ready."""
        said, listeners, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        for listener in listeners:
            serving = (listener, self.pid, device_files.of_the_gpu())
            threading.Thread(target=device_files.hand_in, args=serving, name="device files", daemon=True).start()
            said = self._channel.recv(MESSAGE_BYTES)
        return said

    @property
    def pid(self) -> int:
        return self._program.pid

    @property
    def alive(self) -> bool:
        return self._program.poll() is None

    def end(self) -> None:
        if self._ready:
            self._ready = False
            metrics.DECODERS.dec()
        self._program.kill()
        self._program.wait()
        self._channel.close()

    def sample(self, body: bytes, cut: Cut, seconds: float, *, may_use_gpu: bool) -> list[SampledVideo]:
        """Raises what the process says of the clip; `_Died` or `_Hung`, and then the process is gone."""
        most = self._max_segments if cut.into_segments else 1
        memory = os.memfd_create("clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, max(len(body), most * math.prod(self._frames_shape)))
            os.pwrite(memory, body, 0)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            question = {"body_bytes": len(body), "cut": asdict(cut), "may_use_gpu": may_use_gpu}
            answer = self._ask(question, memory, seconds)
            self.clips += 1
            try:
                return _believed(answer, memory, self._frames_shape, most)
            except CaptionError:
                raise
            except Exception as error:
                self.end()
                raise _Died("it answered nonsense") from error
        finally:
            os.close(memory)

    def _ask(self, question: Mapping[str, Any], memory: int, seconds: float) -> Mapping[str, Any]:
        cpu_before_s = self._cpu_s()
        try:
            if seconds <= 0:
                raise TimeoutError
            most = math.ceil(cpu_before_s + seconds) + 1
            unlimited = resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (most, unlimited))
            self._channel.settimeout(seconds)
            socket.send_fds(self._channel, [json.dumps(question).encode()], [memory])
            said = self._channel.recv(MESSAGE_BYTES)
            if not said:
                raise ConnectionResetError("it ended")
            answer = json.loads(said)
            if not isinstance(answer, dict):
                raise ValueError(f"it answered a {type(answer).__name__}")
        except TimeoutError as error:
            self.clip_cpu_s = self._cpu_s() - cpu_before_s
            self.end()
            raise _Hung(f"no answer after {self.clip_cpu_s:.1f} s of CPU time") from error
        except OSError as error:
            with suppress(subprocess.TimeoutExpired):
                self._program.wait(1.0)
            killed = self._program.returncode == -signal.SIGKILL
            self.end()
            raise _Died(f"{error}", killed_from_outside=killed) from error
        except (ValueError, RecursionError) as error:
            self.end()
            raise _Died(f"{error}") from error
        self.clip_cpu_s = self._cpu_s() - cpu_before_s
        return answer

    def _cpu_s(self) -> float:
        """User and system time; source: proc_pid_stat(5), fields 14 and 15."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _believed(answer: Mapping[str, Any], memory: int, shape: tuple[int, ...], most: int) -> list[SampledVideo]:
    """What a process may truly say; raises `CaptionError` if that is what it says, anything else if it cannot be."""
    if "bug" in answer:
        _log.error("a decoder process found a bug of ours: %.2000r", answer["bug"])
        raise InternalError("the video could not be decoded because of a bug in the server")
    if "error" in answer:
        raise _ERRORS[answer["error"]](str(answer["message"])[:_MESSAGE_LETTERS])
    if not 1 <= len(answer["videos"]) <= most:
        raise ValueError("so many segments cannot be")
    return [_video(said, memory, number, shape) for number, said in enumerate(answer["videos"])]


def _video(said: Mapping[str, Any], memory: int, number: int, shape: tuple[int, ...]) -> SampledVideo:
    frames = np.empty(shape, np.uint8)
    os.preadv(memory, [frames.data], number * frames.nbytes)
    video = SampledVideo(**{**said, "frames": frames, "times_s": tuple(said["times_s"])})
    numbers = (*video.times_s, video.duration_s, video.start_s, video.end_s, video.decode_ms)
    sizes = (video.distinct_frames, video.width_px, video.height_px)
    if not (
        len(video.times_s) == FRAMES_PER_CLIP
        and all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        and all(type(size) is int and 0 < size < 2**31 for size in sizes)
        and video.codec in DECODERS
        and type(video.on_gpu) is bool
    ):
        raise ValueError("a video that cannot be")
    return video
