"""Runs in a decoder process in place of the real thing: does what the body says, with every wall in its place.

`unfiltered_main` runs the same without the system-call filter, `credulous_main` without the allow-lists, and
`gpu_main` with a stand-in for a GPU, which others break in some way.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import av

from etenet.errors import DecodeTimeout, NotAVideo
from etenet.sandbox import worker
from etenet.video import sampling
from etenet.video.clip import Clip
from etenet.video.sampling import sample_segments
from etenet.video.segments import Cut
from tests.gpu_stand_in import Frames, StandIn


def _spin() -> None:
    while True:
        pass


def _take_its_time() -> None:
    """As a clip does whose decoder looks at the clock itself."""
    while time.process_time() % 100 < 0.8:
        pass
    raise DecodeTimeout("too slow")


def _eat() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(b"x" * 2**22))


DEEDS: dict[bytes, Callable[[], object]] = {
    b"open": lambda: open("/etc/passwd").close(),
    b"write a file": lambda: open("/dev/null", "w").close(),
    b"make a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    b"run a program": lambda: subprocess.run(["/bin/true"], check=True),
    b"fork": lambda: os.fork() or os._exit(0),
    b"kill": lambda: os.kill(os.getppid(), 0),
    b"choose its cores": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    b"ask a driver": lambda: fcntl.ioctl(0, 0xC020462A),  # NV_ESC_RM_CONTROL
    b"ask nvidia-uvm": lambda: fcntl.ioctl(0, 33),  # UVM_MAP_EXTERNAL_ALLOCATION
    b"own a socket": lambda: fcntl.ioctl(0, 0x8901),  # FIOSETOWN
    b"type for a terminal": lambda: fcntl.ioctl(0, 0x5412),  # TIOCSTI
    b"crash": lambda: ctypes.string_at(0),
    b"spin": _spin,
    b"slow": _take_its_time,
    b"sleep": lambda: time.sleep(1000),
    b"eat": _eat,
    b"bug": lambda: 1 // 0,
}


def _obey(body: bytes, cut: Cut, **settings: Any) -> list[Clip]:
    if body not in DEEDS:
        return sample_segments(body, cut, **settings)
    try:
        DEEDS[body]()
    except OSError as error:
        raise NotAVideo(f"denied: {error.strerror}") from error
    raise NotAVideo("done")


def main(settings: Mapping[str, Any]) -> None:
    worker.sample_segments = _obey
    worker.main(settings)


def unfiltered_main(settings: Mapping[str, Any]) -> None:
    worker.allow_only_decoding = lambda **_: None
    main(settings)


def lying_main(settings: Mapping[str, Any]) -> None:
    """Answers with what the body holds, instead of decoding it."""
    worker._reply = lambda file, request, *_: json.loads(os.pread(file, request["body_bytes"], 0))
    worker.main(settings)


def credulous_main(settings: Mapping[str, Any]) -> None:
    """Decodes for real, but opens whatever a file asks for."""
    believe_everything()
    worker.main(settings)


def credulous_unfiltered_main(settings: Mapping[str, Any]) -> None:
    worker.allow_only_decoding = lambda **_: None
    credulous_main(settings)


def believe_everything() -> None:
    sampling.OPEN_OPTIONS = {"protocol_whitelist": "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "safe": "0"}
    sampling.DECODERS = tuple(av.codecs_available)


DEADLY_WIDTH_PX = 128


def gpu_main(settings: Mapping[str, Any]) -> None:
    """Its driver crashes on frames of one width."""
    _with_gpu(settings, StandIn(lambda frames: ctypes.string_at(0) if _any_deadly(frames) else frames))


def hanging_gpu_main(settings: Mapping[str, Any]) -> None:
    _with_gpu(settings, StandIn(lambda frames: time.sleep(1000) if _any_deadly(frames) else frames))


def gpu_that_gives_other_frames_main(settings: Mapping[str, Any]) -> None:
    _with_gpu(settings, StandIn(lambda frames: [frame.reformat(format="gray") for frame in frames]))


def gpu_that_needs_files_main(settings: Mapping[str, Any]) -> None:
    """Its driver opens a device for each video, as it can before the wall is up."""
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


def _any_deadly(frames: Frames) -> bool:
    return any(frame.width == DEADLY_WIDTH_PX for frame in frames)
