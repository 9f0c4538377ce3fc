"""Runs in a decoder process with a stand-in for a GPU: opens a file; the body, "way: name", says how and which."""

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

_other_thread = ThreadPoolExecutor(1)
_act_or_decode = misbehaving._act_or_decode


def _use(name: bytes) -> str:
    """Does with a file what NVIDIA's driver does with its devices."""
    file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.fcntl(file, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert os.write(file, b"four") == 4
        return str(os.read(file, 4))
    finally:
        os.close(file)


def _open_at(place: int) -> int:
    """Calls the C library, because Python itself would refuse some names."""
    system = ctypes.CDLL(None, use_errno=True)
    file: int = system.openat(-100, ctypes.c_void_p(place), os.O_RDONLY)  # AT_FDCWD
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return file


def _open_endless(name: bytes) -> str:
    """Opens a name at the very end of a page, with no zero byte and no memory after it."""
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE) == 0
    page_end = start + mmap.PAGESIZE
    ctypes.memmove(page_end - len(name), name, len(name))
    return str(_open_at(page_end - len(name)))


def _read_while_the_name_changes(names: bytes) -> str:
    """Opens while another thread swaps two names of one length. Gives what was read and whether a call was refused."""
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


def _open_many(name: bytes) -> str:
    files = []
    try:
        while True:
            files.append(os.open(name, os.O_RDONLY))
    except PermissionError:
        return str(len(files))
    finally:
        for file in files:
            os.close(file)


def _open_repeatedly(name: bytes) -> str:
    opened, until_s = 0, time.monotonic() + 0.5
    while time.monotonic() < until_s:
        os.close(os.open(name, os.O_RDONLY))
        opened += 1
    return str(opened)


WAYS: dict[bytes, Callable[[bytes], object]] = {
    b"use": _use,
    b"use from another thread": lambda name: _other_thread.submit(_use, name).result(),
    b"read": lambda name: os.close(os.open(name, os.O_RDONLY)),
    b"create": lambda name: os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600)),
    b"find": lambda name: os.close(os.open(name, os.O_PATH)),
    b"list": lambda name: os.close(os.open(name, os.O_RDONLY | os.O_DIRECTORY)),
    b"read by an endless name": _open_endless,
    b"read by an address": lambda place: _open_at(int(place)),
    b"read while the name changes": _read_while_the_name_changes,
    b"duplicate": lambda _: fcntl.fcntl(0, fcntl.F_DUPFD, 0),
    b"set the owner": lambda _: fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid()),
    b"fcntl with the number of ioctl": lambda _: fcntl.fcntl(0, 16),  # 16 is F_GETOWN_EX and the system call ioctl
    b"import": lambda name: __import__(name.decode()),
    b"open many": _open_many,
    b"open repeatedly": _open_repeatedly,
}


def _open_or_act(body: bytes, *arguments: Any, **settings: Any) -> list[Clip]:
    way, _, name = body.partition(b": ")
    if way not in WAYS:
        return _act_or_decode(body, *arguments, **settings)
    try:
        result = WAYS[way](name)
    except (OSError, ImportError) as error:
        raise NotAVideo(f"denied: {error}") from error
    raise NotAVideo(f"done: {result}")


def main(settings: Mapping[str, Any]) -> None:
    _other_thread.submit(int).result()  # no thread can start once the filter is installed
    misbehaving._act_or_decode = _open_or_act
    misbehaving.gpu_main(settings)
