"""Runs in a decoder process with a stand-in for a GPU: opens the file that the body names, in the way that it says."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etenet.errors import NotAVideo
from etenet.video.clip import Clip
from tests import misbehaving

ENDLESS = b"a name without an end"
_other_thread = ThreadPoolExecutor(1)
_obey = misbehaving._obey


def _use(name: bytes) -> str:
    """As NVIDIA's driver uses its own."""
    file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.fcntl(file, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert os.write(file, b"four") == 4
        return str(os.read(file, 4))
    finally:
        os.close(file)


def _open_at(place: int) -> int:
    """By the C library, as Python would refuse some names itself."""
    system = ctypes.CDLL(None, use_errno=True)
    file: int = system.openat(-100, ctypes.c_void_p(place), os.O_RDONLY)  # AT_FDCWD
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return file


def _open_endless(name: bytes) -> str:
    """The name ends where memory ends, with no zero after it."""
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE) == 0
    page_end = start + mmap.PAGESIZE
    ctypes.memmove(page_end - len(name), name, len(name))
    return str(_open_at(page_end - len(name)))


def _read_while_it_changes(names: bytes) -> str:
    """Of two names of the same length; says what was read, and whether there was a refusal."""
    one, other = names.split()
    written, done, values, refused = ctypes.create_string_buffer(one), threading.Event(), set(), False

    def change() -> None:
        for name in itertools.cycle((other, one)):
            written.value = name
            if done.is_set():
                return

    changing, until_s = _other_thread.submit(change), time.monotonic() + 0.5
    while time.monotonic() < until_s:
        try:
            file = _open_at(ctypes.addressof(written))
        except PermissionError:
            refused = True
        else:
            values.add(os.read(file, 1))
            os.close(file)
    done.set()
    changing.result()
    return f"{sorted(values)} {refused}"


def _hoard(name: bytes) -> str:
    files = []
    try:
        while True:
            files.append(os.open(name, os.O_RDONLY))
    except PermissionError:
        return str(len(files))
    finally:
        for file in files:
            os.close(file)


def _flood(name: bytes) -> str:
    asked, until_s = 0, time.monotonic() + 0.5
    while time.monotonic() < until_s:
        os.close(os.open(name, os.O_RDONLY))
        asked += 1
    return str(asked)


WAYS: dict[bytes, Callable[[bytes], object]] = {
    b"use": _use,
    b"use from another thread": lambda name: _other_thread.submit(_use, name).result(),
    b"read": lambda name: os.close(os.open(name, os.O_RDONLY)),
    b"create": lambda name: os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600)),
    b"find": lambda name: os.close(os.open(name, os.O_PATH)),
    b"list": lambda name: os.close(os.open(name, os.O_RDONLY | os.O_DIRECTORY)),
    b"read endless": _open_endless,
    b"read at": lambda place: _open_at(int(place)),
    b"read while it changes": _read_while_it_changes,
    b"copy": lambda _: fcntl.fcntl(0, fcntl.F_DUPFD, 0),
    b"own": lambda _: fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid()),
    b"ask as if it were ioctl": lambda _: fcntl.fcntl(0, 16),  # F_GETOWN_EX, and ioctl's own number
    b"import": lambda name: __import__(name.decode()),
    b"hoard": _hoard,
    b"flood": _flood,
}


def _open_or_obey(body: bytes, *arguments: Any, **settings: Any) -> list[Clip]:
    way, _, name = body.partition(b": ")
    if way not in WAYS:
        return _obey(body, *arguments, **settings)
    try:
        result = WAYS[way](name)
    except (OSError, ImportError) as error:
        raise NotAVideo(f"denied: {error}") from error
    raise NotAVideo(f"done: {result}")


def main(settings: Mapping[str, Any]) -> None:
    _other_thread.submit(int).result()  # it has to be there before the wall
    misbehaving._obey = _open_or_obey
    misbehaving.gpu_main(settings)
