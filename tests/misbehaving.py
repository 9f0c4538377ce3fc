"""Runs in a decoder process in place of the real thing: does what the body says, with every wall in its place.

`unfiltered_main` runs the same without the system-call filter, `credulous_main` without the allow-lists.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import av

from etenet import decoder_process, video
from etenet.errors import DecodeTimeout, NotAVideo
from etenet.segments import Cut
from etenet.video import SampledVideo, sample_segments


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
    b"crash": lambda: ctypes.string_at(0),
    b"spin": _spin,
    b"slow": _take_its_time,
    b"sleep": lambda: time.sleep(1000),
    b"eat": _eat,
    b"bug": lambda: 1 // 0,
}


def _obey(body: bytes, cut: Cut, **settings: Any) -> list[SampledVideo]:
    if body not in DEEDS:
        return sample_segments(body, cut, **settings)
    try:
        DEEDS[body]()
    except OSError as error:
        raise NotAVideo(f"denied: {error.strerror}") from error
    raise NotAVideo("done")


def main(settings: Mapping[str, Any]) -> None:
    decoder_process.sample_segments = _obey
    decoder_process.main(settings)


def unfiltered_main(settings: Mapping[str, Any]) -> None:
    decoder_process.allow_only_decoding = lambda: None
    main(settings)


def lying_main(settings: Mapping[str, Any]) -> None:
    """Answers with what the body holds, instead of decoding it."""
    decoder_process._answer = lambda file, asked, *_: json.loads(os.pread(file, asked["body_bytes"], 0))
    decoder_process.main(settings)


def credulous_main(settings: Mapping[str, Any]) -> None:
    """Decodes for real, but opens whatever a file asks for."""
    believe_everything()
    decoder_process.main(settings)


def credulous_unfiltered_main(settings: Mapping[str, Any]) -> None:
    decoder_process.allow_only_decoding = lambda: None
    credulous_main(settings)


def believe_everything() -> None:
    video.OPEN_OPTIONS = {"protocol_whitelist": "file,http,tcp,udp,rtp,crypto,concat,subfile,data,pipe", "safe": "0"}
    video.DECODERS = tuple(av.codecs_available)
