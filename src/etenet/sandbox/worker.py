"""What runs inside a decoder process: bytes come in, frames go out, and the process can do nothing else.

A request is one message with the length of the body, how to cut it and how many threads may help, and a memory file
that holds the body. The frames of the segments are written over the body, one segment after the other, and one message
says what they are, or what is wrong with the video. `process.py` is the other side and trusts nothing that this side
sends.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from etenet.assets import CANARY_CLIP
from etenet.errors import CaptionError, TooMuchMemory
from etenet.linux import end_with_parent
from etenet.sandbox.seccomp import allow_only_decoding
from etenet.video.ffmpeg import import_all_of_pyav
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_frames, sample_segments
from etenet.video.segments import Cut
from etenet.video.sharing import Helpers

MESSAGE_BYTES = 128 * 1024  # enough for `limits.MOST_SEGMENTS`

_MORE_FILES = 12  # beyond the channel
_STDOUT, _STDERR = 1, 2


def main(settings: Mapping[str, Any]) -> None:
    """Serve requests until the other side closes the channel.

    Settings: `channel` and `parent`, a file descriptor and a process id; `resize_px`; `limits`, of `DecodeLimits`;
    `helpers`, how many threads can help to decode a video.
    """
    end_with_parent(signal.SIGKILL, parent=settings["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group
    channel, resize_px = socket.socket(fileno=settings["channel"]), settings["resize_px"]
    limits = DecodeLimits(**settings["limits"])
    # Everything that decoding imports, opens or starts happens now. After the filter is installed it could not.
    import_all_of_pyav()
    patient = replace(limits, decode_cpu_s=60.0, decode_deadline_s=180.0)
    sample_frames(CANARY_CLIP.read_bytes(), resize_px=resize_px, limits=patient)
    helpers = _helpers(settings["helpers"])
    _limit_resources(limits)
    os.dup2(_STDOUT, _STDERR)  # to /dev/null: a clip must not be able to write FFmpeg's messages into the log
    filter_fault = None
    try:
        allow_only_decoding()
    except OSError as error:
        filter_fault = str(error)
    channel.send(json.dumps({"filter_fault": filter_fault}).encode())
    gc.collect()
    gc.freeze()  # so that collecting after each video costs little
    while True:
        message, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        if not message:
            return
        request = json.loads(message)
        reply = _reply(files[0], request, resize_px, limits, helpers)
        os.close(files[0])
        channel.send(json.dumps(reply).encode())
        gc.collect()  # a frame whose side data was read refers to itself


def _helpers(count: int) -> Helpers | None:
    """Threads that run already."""
    if not count:
        return None
    threads, all_run = ThreadPoolExecutor(count), threading.Barrier(count)
    wait([threads.submit(all_run.wait) for _ in range(count)])
    return Helpers(threads, count)


def _reply(
    file: int, request: Mapping[str, Any], resize_px: int, limits: DecodeLimits, helpers: Helpers | None
) -> dict[str, Any]:
    helpers = replace(helpers, count=request["helpers"]) if helpers else None
    try:
        body = os.pread(file, request["body_bytes"], 0)
        clips = sample_segments(body, Cut(**request["cut"]), resize_px=resize_px, limits=limits, helpers=helpers)
        for number, clip in enumerate(clips):
            os.pwrite(file, clip.frames.data, number * clip.frames.nbytes)
    except CaptionError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"error": TooMuchMemory.__name__, "message": str(limits.too_much_memory())}
    except Exception:
        return {"bug": traceback.format_exc()[-MESSAGE_BYTES // 2 :]}
    return {"clips": [asdict(clip.info) for clip in clips]}


def _limit_resources(limits: DecodeLimits) -> None:
    """No core dumps, few open files, and memory up to the limit. The limit of CPU time comes with each video."""
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    open_files = len(os.listdir("/proc/self/fd"))
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, open_files + _MORE_FILES),
        (resource.RLIMIT_AS, reserved + limits.max_memory_bytes),
    ):
        resource.setrlimit(kind, (limit, limit))
