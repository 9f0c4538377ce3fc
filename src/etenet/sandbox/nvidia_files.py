"""The GPU's device files, handed to a decoder process that can open nothing: what its parent does for it.

NVIDIA's driver opens them anew for whatever it maps. Behind the wall, who tries to open a file waits for an answer from
the parent (seccomp's user notification). That reads the name in the waiting process's memory and, if it is to the
letter one that it knew before, opens the file itself and hands in the descriptor. All else is EPERM. To change the name
meanwhile is of no use, as it is never opened. Source: seccomp_unotify(2), linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

_NAME = re.compile(r"/dev/nvidia(\d+|ctl|-uvm|-uvm-tools|-caps/[a-z0-9-]+)")
_RECEIVE, _ANSWER, _HAND_IN = 0xC0502100, 0xC0182101, 0x40182103  # SECCOMP_IOCTL_NOTIF_RECV, _SEND and _ADDFD
_AND_ANSWER = 2  # SECCOMP_ADDFD_FLAG_SEND
_LONGEST_NAME = 4096  # PATH_MAX
_AT_ONCE, _AT_ONCE_S = 200, 0.1  # no more questions in this time: a process that floods holds up itself alone


class _Question(ctypes.Structure):  # struct seccomp_notif
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("thread", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("system_call", ctypes.c_int32),
        ("architecture", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Answer(ctypes.Structure):  # struct seccomp_notif_resp
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("value", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    )


class _Descriptor(ctypes.Structure):  # struct seccomp_notif_addfd
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("ours", ctypes.c_uint32),
        ("theirs", ctypes.c_uint32),
        ("their_flags", ctypes.c_uint32),
    )


def of_the_gpu() -> frozenset[str]:
    """Those of this machine, or of this container, that this process may open."""
    found = map(str, [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("nvidia-caps/*")])
    return frozenset(name for name in found if _NAME.fullmatch(name) and os.access(name, os.R_OK))


def hand_in(listener: int, pid: int, names: Collection[str]) -> None:
    """Answer a process whenever it opens a file, until it has ended; for a thread of its own.

    Closes the listener. Were the process there still, it would get ENOSYS from then on.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they would interrupt an answer
    # Its memory is opened once, so that no other process is ever taken for it.
    with (
        open(listener, "rb", 0),
        suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/mem", "rb", 0) as memory,
    ):
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        answered, began_s = 0, time.monotonic()
        while waiting.poll()[0][1] & select.POLLIN:  # or else it has ended
            with suppress(FileNotFoundError):  # who asked has died, or was interrupted, and waits no more
                _answer(listener, memory.fileno(), names)
            answered += 1
            if answered % _AT_ONCE == 0:
                time.sleep(max(0.0, began_s + _AT_ONCE_S - time.monotonic()))
                began_s = time.monotonic()


def _answer(listener: int, memory: int, names: Collection[str]) -> None:
    question = _Question()
    ioctl(listener, _RECEIVE, question)
    _, place, flags, *_ = question.arguments
    if (name := _name(memory, place)) in names:
        with suppress(OSError):  # we cannot open it, or the process has as many open as it may
            file = os.open(name, flags & os.O_ACCMODE | os.O_CLOEXEC)
            try:
                ioctl(listener, _HAND_IN, _Descriptor(question.id, _AND_ANSWER, file, 0, os.O_CLOEXEC))
                return
            finally:
                os.close(file)
    ioctl(listener, _ANSWER, _Answer(question.id, 0, -errno.EPERM, 0))


def _name(memory: int, place: int) -> str:
    """What is written at that place; empty where there is no end to it, or no memory."""
    with suppress(OSError, OverflowError):
        name, end, _ = os.pread(memory, _LONGEST_NAME, place).partition(b"\0")
        return os.fsdecode(name) if end else ""
    return ""
