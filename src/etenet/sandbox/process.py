"""One decoder process seen from outside: a video goes in, clips or an error come out, and every reply is validated.

`worker.py` is the other side. A body and the frames that replace it travel in a memory file that lives as long as the
request.
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
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from etenet import metrics
from etenet.errors import CaptionError, InternalError, Overloaded
from etenet.sandbox.worker import MESSAGE_BYTES
from etenet.video.clip import FRAMES_PER_CLIP, Clip, ClipInfo
from etenet.video.ffmpeg import DECODERS
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut

_log = logging.getLogger(__name__)

STEP_S = 1.0  # of waiting for a process, that metrics.STEPS counts
GRACE_S = 0.25  # after a limit: a process that looks at the clock itself can still report
_CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_ERRORS = {kind.__name__: kind for kind in CaptionError.__subclasses__() if kind.status < 500}
_MESSAGE_LETTERS = 1000
_MOST_SECONDS = 1e30  # beyond every timestamp: 64 bits of ticks, each of at most 2^31 s
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # or malloc would reserve memory beyond the limit for each thread
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
    """The process ended, or sent an invalid reply and was ended.

    `killed_from_outside`: by SIGKILL. The filter keeps a process from sending that to itself, so it came from a person
    or from the kernel when memory was short.
    """

    def __init__(self, reason: str, *, killed_from_outside: bool = False) -> None:
        super().__init__(reason)
        self.killed_from_outside = killed_from_outside


class Hung(Exception):
    """The video used up its time: the process says so, or did not reply and was ended."""


class DecoderProcess:
    """A decoder process and the channel to it. `ready` for videos; `clip_cpu_s` is what its last one cost in all."""

    def __init__(self, resize_px: int, limits: DecodeLimits, entry: str, helpers: int) -> None:
        """`helpers` threads can help to decode a video. The process starts; `await_ready` says when it has."""
        self.clips, self.clip_cpu_s, self.ready = 0, 0.0, False
        self.filter_fault: str | None = None
        self._limits, self._frames_shape = limits, (FRAMES_PER_CLIP, resize_px, resize_px, 3)
        # The working directory is empty, and deleted as soon as the process is ready: there is nothing to clean up.
        self._nowhere = tempfile.TemporaryDirectory(prefix="decoder-")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "entry": entry,
            "path": [os.path.abspath(folder) for folder in sys.path],
            "channel": theirs.fileno(),
            "parent": os.getpid(),
            "resize_px": resize_px,
            "limits": asdict(limits),
            "helpers": helpers,
        }
        try:
            self._program = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(settings)],
                cwd=self._nowhere.name,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _ONE_THREAD | _ONE_ARENA,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            self._channel.close()
            self._nowhere.cleanup()
            raise
        finally:
            theirs.close()
        metrics.DECODERS.inc()

    def await_ready(self, deadline_s: float) -> None:
        """Raises `Died` if the process ends before it can take a video, or is not ready in time and is ended."""
        if self.ready:
            return
        ends_s = time.monotonic() + deadline_s
        try:
            report = json.loads(self._receive(lambda: ends_s - time.monotonic()))
            self.filter_fault = report["filter_fault"]
        except TimeoutError as error:
            self.end()
            raise Died(f"a decoder process was not ready after {deadline_s:.0f} s") from error
        except (OSError, ValueError) as error:
            self.end()
            raise Died("a decoder process ended before it was ready; the log has its last words") from error
        self._nowhere.cleanup()
        self.ready = True

    @property
    def pid(self) -> int:
        return self._program.pid

    @property
    def alive(self) -> bool:
        return self._program.poll() is None

    def end(self) -> None:
        self._program.kill()
        self._program.wait()
        if self._channel.fileno() >= 0:
            self._channel.close()
            metrics.DECODERS.dec()
        self._nowhere.cleanup()

    def sample(
        self, body: bytes, cut: Cut, deadline_s: float, *, helpers: int = 0, spent_cpu_s: float = 0.0
    ) -> list[Clip]:
        """The clips of a video, or the `CaptionError` that the process, once ready, reports. After `Died` it is gone.

        `deadline_s` is wall-clock time; the processor time is that of the limits, for all threads together, less what
        another process has spent on the video. Beyond either, `Hung`.
        """
        max_segments = self._limits.max_segments if cut.into_segments else 1
        began_s = time.monotonic()
        memory = os.memfd_create("clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, max(len(body), max_segments * math.prod(self._frames_shape)))
            os.pwrite(memory, body, 0)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            request = {"body_bytes": len(body), "cut": asdict(cut), "helpers": helpers}
            reply = self._ask(request, memory, deadline_s, spent_cpu_s)
            self.clips += 1
            if (
                reply.get("error") == Overloaded.__name__
                and time.monotonic() - began_s >= self._limits.decode_deadline_s
            ):
                raise Hung("it was held up")
            try:
                return _validated(reply, memory, self._frames_shape, max_segments)
            except CaptionError:
                raise
            except Exception as error:
                self.end()
                raise Died(f"invalid reply: {error}") from error
        finally:
            os.close(memory)

    def _ask(self, request: Mapping[str, Any], memory: int, deadline_s: float, spent_cpu_s: float) -> Mapping[str, Any]:
        self.clip_cpu_s = spent_cpu_s
        cpu_before_s = self._cpu_s() - spent_cpu_s
        try:
            if deadline_s <= 0:
                raise TimeoutError
            cpu_limit_s = math.ceil(cpu_before_s + self._limits.decode_cpu_s) + 1
            hard_limit_s = resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (cpu_limit_s, hard_limit_s))
            self._channel.settimeout(deadline_s)
            socket.send_fds(self._channel, [json.dumps(request).encode()], [memory])
            message = self._receive_reply(cpu_before_s, deadline_s)
            if not message:
                raise ConnectionResetError("it closed its channel")
            reply = json.loads(message)
            if not isinstance(reply, dict):
                raise ValueError(f"the reply is a {type(reply).__name__}")
        except TimeoutError as error:
            self.clip_cpu_s = self._cpu_s() - cpu_before_s
            self.end()
            raise Hung(f"no reply after {self.clip_cpu_s:.1f} s of CPU time") from error
        except OSError as error:
            self.clip_cpu_s = max(spent_cpu_s, self._cpu_s() - cpu_before_s)  # unknown once somebody has waited for it
            with suppress(subprocess.TimeoutExpired):
                self._program.wait(1.0)
            killed = self._program.returncode == -signal.SIGKILL
            self.end()
            if self._program.returncode == -signal.SIGXCPU:
                self.clip_cpu_s = self._limits.decode_cpu_s
                raise Hung("it reached its limit of CPU time") from error
            raise Died(f"{error}", killed_from_outside=killed) from error
        except (ValueError, RecursionError) as error:
            self.end()
            raise Died(f"{error}") from error
        self.clip_cpu_s = self._cpu_s() - cpu_before_s
        return reply

    def _receive_reply(self, cpu_before_s: float, deadline_s: float) -> bytes:
        """Raises `TimeoutError` when the time of the wall clock or of the processor is used up."""
        ends_s, cpu_ends_s = time.monotonic() + deadline_s, cpu_before_s + self._limits.decode_cpu_s + GRACE_S
        return self._receive(lambda: min(ends_s - time.monotonic(), cpu_ends_s - self._cpu_s()))

    def _receive(self, left_s: Callable[[], float]) -> bytes:
        """The next message. Raises `TimeoutError` if none comes while time is left."""
        while (seconds := left_s()) > 0:
            self._channel.settimeout(max(min(seconds, STEP_S), _CLOCK_TICK_S))
            with suppress(TimeoutError):
                return self._channel.recv(MESSAGE_BYTES)
            metrics.STEPS.inc()
        raise TimeoutError

    def _cpu_s(self) -> float:
        """User and system time. Source: proc_pid_stat(5), fields 14 and 15."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) * _CLOCK_TICK_S


def _validated(reply: Mapping[str, Any], memory: int, shape: tuple[int, ...], max_segments: int) -> list[Clip]:
    """The clips of a reply. Raises `CaptionError` if the reply is one, and anything else if the reply is invalid."""
    if "bug" in reply:
        _log.error("a decoder process reports a bug in etenet: %.2000r", reply["bug"])
        raise InternalError("the video could not be decoded because of a bug in the server")
    if "error" in reply:
        raise _ERRORS[reply["error"]](str(reply["message"])[:_MESSAGE_LETTERS])
    if not 1 <= len(reply["clips"]) <= max_segments:
        raise ValueError(f"a reply with {len(reply['clips'])} segments, {max_segments} at most")
    return [_clip(fields, memory, number, shape) for number, fields in enumerate(reply["clips"])]


def _clip(fields: Mapping[str, Any], memory: int, number: int, shape: tuple[int, ...]) -> Clip:
    info = ClipInfo(**{**fields, "times_s": tuple(fields["times_s"])})
    seconds = (*info.times_s, info.duration_s, info.picture_start_s, info.start_s, info.end_s, info.decode_ms)
    sizes = (info.distinct_frames, info.width_px, info.height_px)
    if len(info.times_s) != FRAMES_PER_CLIP:
        raise ValueError(f"reply field times_s has {len(info.times_s)} entries")
    if not all(isinstance(value, float) and abs(value) < _MOST_SECONDS for value in seconds):
        raise ValueError(f"reply field out of range: {seconds}")
    if not (isinstance(info.shown_aspect, float) and 0 < info.shown_aspect < math.inf):
        raise ValueError(f"reply field out of range: {info.shown_aspect!r}")
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ValueError(f"reply field out of range: {sizes}")
    if info.codec not in DECODERS:
        raise ValueError(f"reply field out of range: {info.codec!r}")
    frames = np.empty(shape, np.uint8)
    os.preadv(memory, [frames.data], number * frames.nbytes)
    return Clip(frames, info)
