"""Runs in a decoder process in place of the real worker: takes the action that the body names, with all defences on.

`unfiltered_main` runs without the system-call filter, `no_allow_lists_main` without the allow-lists, `undefended_main`
without both, and `gpu_main` with a stand-in for a GPU. The other functions with `gpu` in the name break it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import platform
import socket
import subprocess
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
from tests.gpu_stand_in import Frames, StandIn


def _spin() -> None:
    while True:
        pass


def _report_a_timeout() -> None:
    """Uses CPU time like a slow clip, then raises what a decoder raises that checks the clock."""
    while time.process_time() % 100 < 0.8:
        pass
    raise DecodeTimeout("too slow")


def _get_half_a_second_of_a_core() -> None:
    end_s = time.process_time() + 0.5
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
    b"call a driver": lambda: fcntl.ioctl(0, 0xC020462A),  # NV_ESC_RM_CONTROL
    b"call nvidia-uvm": lambda: fcntl.ioctl(0, 33),  # UVM_MAP_EXTERNAL_ALLOCATION
    b"set the owner of a socket": lambda: fcntl.ioctl(0, 0x8901),  # FIOSETOWN
    b"type into a terminal": lambda: fcntl.ioctl(0, 0x5412),  # TIOCSTI
    b"crash": lambda: ctypes.string_at(0),
    b"crash after 0.7 s": _crash_after_a_while,
    b"spin": _spin,
    b"report a timeout": _report_a_timeout,
    b"get half a second of a core": _get_half_a_second_of_a_core,
    b"report to be held up": lambda: _report_to_be_held_up(0.0),
    b"report to be held up after a second": lambda: _report_to_be_held_up(1.0),
    b"sleep": lambda: time.sleep(1000),
    b"use up memory": _use_up_memory,
    b"count frames": _count_frames,
    b"bug": lambda: 1 // 0,
}


def _act_or_decode(body: bytes, cut: Cut, **settings: Any) -> list[Clip]:
    if body not in ACTIONS:
        return sample_segments(body, cut, **settings)
    try:
        ACTIONS[body]()
    except OSError as error:
        raise NotAVideo(f"denied: {error.strerror}") from error
    raise NotAVideo("done")


def main(settings: Mapping[str, Any]) -> None:
    worker.sample_segments = _act_or_decode
    worker.main(settings)


def unfiltered_main(settings: Mapping[str, Any]) -> None:
    worker.allow_only_decoding = lambda **_: None
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
    worker.allow_only_decoding = lambda **_: None
    no_allow_lists_main(settings)


def remove_allow_lists() -> None:
    film.OPEN_OPTIONS = {"protocol_whitelist": "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "safe": "0"}
    film.DECODERS = tuple(av.codecs_available)


FAULTY_WIDTH_PX = 128


def gpu_main(settings: Mapping[str, Any]) -> None:
    """Its driver crashes on frames of one width."""
    _with_gpu(settings, StandIn(lambda frames: ctypes.string_at(0) if _any_faulty(frames) else frames))


def hanging_gpu_main(settings: Mapping[str, Any]) -> None:
    _with_gpu(settings, StandIn(lambda frames: time.sleep(1000) if _any_faulty(frames) else frames))


def gpu_that_gives_other_frames_main(settings: Mapping[str, Any]) -> None:
    _with_gpu(settings, StandIn(lambda frames: [frame.reformat(format="gray") for frame in frames]))


def gpu_that_needs_files_main(settings: Mapping[str, Any]) -> None:
    """Its driver opens a device for each video, which works only until the filter is installed."""
    _with_gpu(settings, StandIn(before=lambda: open("/dev/null").close()))


def gpu_on_an_old_kernel_main(settings: Mapping[str, Any]) -> None:
    platform.release = lambda: "5.13.0-7-generic"
    _with_gpu(settings, StandIn())


def gpu_that_crashes_at_once_main(settings: Mapping[str, Any]) -> None:
    _with_gpu(settings, StandIn(before=lambda: ctypes.string_at(0)))


def _with_gpu(settings: Mapping[str, Any], stand_in: StandIn) -> None:
    worker.open_gpu = lambda device: device
    av.open = stand_in.open
    main(settings)


def _any_faulty(frames: Frames) -> bool:
    return any(frame.width == FAULTY_WIDTH_PX for frame in frames)
