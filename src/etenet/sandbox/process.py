"""A decoder process seen from outside: one clip in, frames or an error out, and no word of it is believed unchecked."""

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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from etenet import metrics
from etenet.errors import CaptionError, InternalError
from etenet.sandbox import nvidia_files
from etenet.sandbox.worker import MESSAGE_BYTES
from etenet.video.ffmpeg import DECODERS
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import FRAMES_PER_CLIP, SampledVideo
from etenet.video.segments import Cut

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


class Died(Exception):
    """The process ended, or said what a decoder process does not say, and was ended.

    It cannot have sent itself SIGKILL, which the filter forbids: that was a person, or the kernel, short of memory.
    """

    def __init__(self, how: str, *, killed_from_outside: bool = False) -> None:
        super().__init__(how)
        self.killed_from_outside = killed_from_outside


class Hung(Exception):
    """No answer in time; the process was ended."""


class DecoderProcess:
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
                raise Died("a decoder process ended before it was ready; the log has its last words") from error
            if said["gpu_fault"]:
                self.end()
                raise Died(said["gpu_fault"])
        self._ready = True
        metrics.DECODERS.inc()

    def _first_words(self) -> bytes:
        """That it is ready. One with a GPU first sends a listener, and needs device files before it is ready."""
        said, listeners, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        for listener in listeners:
            serving = (listener, self.pid, nvidia_files.of_the_gpu())
            threading.Thread(target=nvidia_files.hand_in, args=serving, name="device files", daemon=True).start()
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
        """Raises what the process says of the clip; `Died` or `Hung`, and then the process is gone."""
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
                raise Died("it answered nonsense") from error
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
            raise Hung(f"no answer after {self.clip_cpu_s:.1f} s of CPU time") from error
        except OSError as error:
            with suppress(subprocess.TimeoutExpired):
                self._program.wait(1.0)
            killed = self._program.returncode == -signal.SIGKILL
            self.end()
            raise Died(f"{error}", killed_from_outside=killed) from error
        except (ValueError, RecursionError) as error:
            self.end()
            raise Died(f"{error}") from error
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
