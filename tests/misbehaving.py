"""Runs in a decoder process in place of the real worker: takes the action that the body names, with all defences on.

After "in a helper: ", a thread takes it that helps to decode. `unfiltered_main` runs without the system-call filter,
`no_allow_lists_main` without the allow-lists, `undefended_main` without both.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import socket
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from typing import Any

import av

from etenet.errors import DecodeTimeout, NotAVideo, Overloaded
from etenet.sandbox import worker
from etenet.video import film
from etenet.video.clip import Clip
from etenet.video.sampling import sample_segments
from etenet.video.segments import Cut
from etenet.video.sharing import Helpers


def _spin() -> None:
    while True:
        pass


def _report_a_timeout() -> None:
    """Uses CPU time like a slow clip, then raises what a decoder raises that checks the clock."""
    end_s = time.process_time() + 0.8
    while time.process_time() < end_s:
        pass
    raise DecodeTimeout("too slow")


def _get_a_fifth_of_a_second_of_a_core() -> None:
    end_s = time.process_time() + 0.2
    while time.process_time() < end_s:
        pass
    time.sleep(1000)


def _report_to_be_held_up(after_s: float) -> None:
    time.sleep(after_s)
    raise Overloaded("too slow")


def _crash_after_a_while() -> None:
    end_s = time.process_time() + 0.7
    while time.process_time() < end_s:
        pass
    ctypes.string_at(0)


def _use_up_memory() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(b"x" * 2**22))


def _count_frames() -> None:
    raise NotAVideo(f"{sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())} frames")


ACTIONS: dict[bytes, Callable[[], object]] = {
    b"open": lambda: open("/etc/passwd").close(),
    b"write a file": lambda: open("/dev/null", "w").close(),
    b"make a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    b"run a program": lambda: subprocess.run(["/bin/true"], check=True),
    b"fork": lambda: os.fork() or os._exit(0),
    b"kill": lambda: os.kill(os.getppid(), 0),
    b"choose its cores": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    b"control a device": lambda: fcntl.ioctl(0, termios.FIOCLEX),
    b"crash": lambda: ctypes.string_at(0),
    b"crash after 0.7 s": _crash_after_a_while,
    b"spin": _spin,
    b"report a timeout": _report_a_timeout,
    b"get a fifth of a second of a core": _get_a_fifth_of_a_second_of_a_core,
    b"report to be held up": lambda: _report_to_be_held_up(0.0),
    b"report to be held up after a second": lambda: _report_to_be_held_up(1.0),
    b"sleep": lambda: time.sleep(1000),
    b"use up memory": _use_up_memory,
    b"count frames": _count_frames,
    b"bug": lambda: 1 // 0,
}


IN_A_HELPER = b"in a helper: "


def _act_or_decode(body: bytes, cut: Cut, *, helpers: Helpers | None, **settings: Any) -> list[Clip]:
    if body == b"count helpers":
        raise NotAVideo(f"{helpers.count if helpers else 0} helpers")
    name = body.removeprefix(IN_A_HELPER)
    if name not in ACTIONS:
        return sample_segments(body, cut, helpers=helpers, **settings)
    try:
        if name == body:
            ACTIONS[name]()
        else:
            assert helpers
            helpers.executor.submit(ACTIONS[name]).result()
    except OSError as error:
        raise NotAVideo(f"denied: {error.strerror}") from error
    raise NotAVideo("done")


def main(settings: Mapping[str, Any]) -> None:
    worker.sample_segments = _act_or_decode
    worker.main(settings)


def unfiltered_main(settings: Mapping[str, Any]) -> None:
    worker.allow_only_decoding = lambda: None
    main(settings)


def lying_main(settings: Mapping[str, Any]) -> None:
    """Replies with what the body holds instead of decoding it."""
    worker._reply = lambda file, request, *_: json.loads(os.pread(file, request["body_bytes"], 0))
    worker.main(settings)


def no_allow_lists_main(settings: Mapping[str, Any]) -> None:
    """Decodes, and opens whatever a file asks for."""
    remove_allow_lists()
    worker.main(settings)


def undefended_main(settings: Mapping[str, Any]) -> None:
    worker.allow_only_decoding = lambda: None
    no_allow_lists_main(settings)


def remove_allow_lists() -> None:
    film.OPEN_OPTIONS = {"protocol_whitelist": "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "safe": "0"}
    film.DECODERS = tuple(av.codecs_available)
