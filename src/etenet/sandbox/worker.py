"""What runs inside a decoder process: bytes come in, frames go out, and nothing else can.

A request is one message with the body's length and how to cut it, and a memory file that holds the body; the frames of
its segments are written over the body, one after the other, and one message says what they are, or what is wrong with
the clip. `sandbox.py` is the other side, and believes nothing that this side says.

Where it is to decode on a GPU, it first proves that it can, once without the wall and once behind it; one that cannot
says why and ends, so that no process keeps what only the GPU needs. Behind the wall the other side opens the GPU's
device files for it, which are all that it gets.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from etenet.assets import CANARY_CLIP, MOVING_CLIP
from etenet.errors import CaptionError, TooMuchMemory
from etenet.linux import PR_SET_PDEATHSIG, prctl
from etenet.sandbox.seccomp import allow_only_decoding
from etenet.video.ffmpeg import import_all_of_pyav
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding, hold
from etenet.video.sampling import sample_frames, sample_on_gpu, sample_segments
from etenet.video.segments import WHOLE, Cut

MESSAGE_BYTES = 128 * 1024  # enough for `config.MOST_SEGMENTS`

_MORE_FILES = 12  # beyond the channel and what a GPU's driver holds
_STDOUT, _STDERR = 1, 2


def main(settings: Mapping[str, Any]) -> None:
    """Serve requests until the other side closes the channel.

    Settings: `channel` and `parent`, a file descriptor and a process id; `resize_px`; `limits`, of `DecodeLimits`;
    `gpu`, of `GpuDecoding`, or None.
    """
    _end_with(settings["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group
    channel, resize_px = socket.socket(fileno=settings["channel"]), settings["resize_px"]
    limits = DecodeLimits(**settings["limits"])
    gpu = GpuDecoding(**settings["gpu"]) if settings["gpu"] else None
    # Whatever decoding imports, opens or starts for good happens now: later it could not.
    import_all_of_pyav()
    unhurried = replace(limits, decode_deadline_s=60.0)
    sample_frames(CANARY_CLIP.read_bytes(), resize_px=resize_px, limits=unhurried)
    proof = _GpuProof(gpu, resize_px, unhurried) if gpu else None
    gpu_fault = proof and proof.fault(unhurried)
    _limit_resources(limits)
    os.dup2(_STDOUT, _STDERR)  # which is /dev/null: the log is not open to what a clip makes FFmpeg say
    listener = filter_fault = None
    try:
        listener = allow_only_decoding(gpu=gpu is not None)
    except OSError as error:
        filter_fault = str(error)
    if listener is not None:
        socket.send_fds(channel, [b"{}"], [listener])
        os.close(listener)
    if proof and not gpu_fault:
        gpu_fault = filter_fault  # no wall, no GPU
        if not gpu_fault and (fault := proof.fault(limits)):
            gpu_fault = f"behind the wall, {fault}"
    channel.send(json.dumps({"filter_fault": filter_fault, "gpu_fault": gpu_fault}).encode())
    while not gpu_fault:
        message, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        if not message:
            return
        asked = json.loads(message)
        answer = _answer(files[0], asked, resize_px, limits, gpu if asked["may_use_gpu"] else None)
        os.close(files[0])
        channel.send(json.dumps(answer).encode())


class _GpuProof:
    """Whether a GPU decodes a clip to the very bytes that the software does. It holds the GPU for its own life."""

    def __init__(self, gpu: GpuDecoding, resize_px: int, limits: DecodeLimits) -> None:
        self._device, self._resize_px = gpu.device, resize_px
        self._held: object = None
        self._clip = MOVING_CLIP.read_bytes()
        self._expected = sample_frames(self._clip, resize_px=resize_px, limits=limits).frames

    def fault(self, limits: DecodeLimits) -> str | None:
        """Why it does not; None where it does."""
        try:
            self._held = self._held or hold(self._device)
            (seen,) = sample_on_gpu(
                self._clip,
                WHOLE,
                device=self._device,
                resize_px=self._resize_px,
                limits=limits,
                started=time.monotonic(),
            )
        except Exception as error:
            return f"the GPU's decoder fails: {error}"
        return None if np.array_equal(seen.frames, self._expected) else "the GPU's decoder gives other frames"


def _answer(
    file: int, asked: Mapping[str, Any], resize_px: int, limits: DecodeLimits, gpu: GpuDecoding | None
) -> dict[str, Any]:
    try:
        body = os.pread(file, asked["body_bytes"], 0)
        videos = sample_segments(body, Cut(**asked["cut"]), resize_px=resize_px, limits=limits, gpu=gpu)
        for number, video in enumerate(videos):
            os.pwrite(file, video.frames.data, number * video.frames.nbytes)
    except CaptionError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        needed = f"decoding it takes more than {limits.max_memory_bytes // 2**20} MiB of memory; scale the video down"
        return {"error": TooMuchMemory.__name__, "message": needed}
    except Exception:
        return {"bug": traceback.format_exc()[-MESSAGE_BYTES // 2 :]}
    return {"videos": [asdict(replace(video, frames=np.empty(0, np.uint8))) | {"frames": None} for video in videos]}


def _end_with(parent: int) -> None:
    """Be killed when the parent's thread that started this process ends, however it ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"decoder process: the parent {parent} ended meanwhile")


def _limit_resources(limits: DecodeLimits) -> None:
    """No core dumps, few open files, and as much memory as the limit says. The CPU's limit comes with each clip."""
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    open_files = len(os.listdir("/proc/self/fd"))
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, open_files + _MORE_FILES),
        (resource.RLIMIT_AS, reserved + limits.max_memory_bytes),
    ):
        resource.setrlimit(kind, (most, most))
