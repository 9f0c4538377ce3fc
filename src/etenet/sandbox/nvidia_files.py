"""The parent's part: open the GPU's device files for a decoder process that can open nothing.

NVIDIA's driver opens these files again for everything that it maps. Behind the filter, a thread that opens a file waits
for the parent (seccomp's user notification). The parent reads the name in the waiting process's memory. If the name is
exactly one of the known names, the parent opens the file itself and hands in the descriptor; else the call fails with
EPERM. A process gains nothing by changing the name afterwards: the parent opens its own copy of the known name.
Source: seccomp_unotify(2), linux/seccomp.h.
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
_RECEIVE, _SEND, _ADD_FILE = 0xC0502100, 0xC0182101, 0x40182103  # SECCOMP_IOCTL_NOTIF_RECV, _SEND and _ADDFD
_AND_REPLY = 2  # SECCOMP_ADDFD_FLAG_SEND
_LONGEST_NAME = 4096  # PATH_MAX
_MAX_REQUESTS, _PERIOD_S = 200, 0.1  # a process that sends more only slows itself down


class _Request(ctypes.Structure):  # struct seccomp_notif
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("thread", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("system_call", ctypes.c_int32),
        ("architecture", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Reply(ctypes.Structure):  # struct seccomp_notif_resp
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


def device_files() -> frozenset[str]:
    """The GPU's device files on this machine, or in this container, that this process may open."""
    names = map(str, [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("nvidia-caps/*")])
    return frozenset(name for name in names if _NAME.fullmatch(name) and os.access(name, os.R_OK))


def serve(listener: int, pid: int, names: Collection[str]) -> None:
    """Reply to a process whenever it opens a file, until it ends. Runs in a thread of its own.

    Closes the listener at the end; a process that still ran would get ENOSYS from then on.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a signal would interrupt a reply
    # The memory is opened once: a later process with the same number must not be mistaken for this one.
    with (
        open(listener, "rb", 0),
        suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/mem", "rb", 0) as memory,
    ):
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        requests, period_began_s = 0, time.monotonic()
        while waiting.poll()[0][1] & select.POLLIN:  # else the process has ended
            with suppress(FileNotFoundError):  # the thread has died or was interrupted, and no longer waits
                _reply(listener, memory.fileno(), names)
            requests += 1
            if requests % _MAX_REQUESTS == 0:
                time.sleep(max(0.0, period_began_s + _PERIOD_S - time.monotonic()))
                period_began_s = time.monotonic()


def _reply(listener: int, memory: int, names: Collection[str]) -> None:
    request = _Request()
    ioctl(listener, _RECEIVE, request)
    _, address, flags, *_ = request.arguments
    if (name := _name(memory, address)) in names:
        with suppress(OSError):  # we cannot open it, or the process has too many open files
            file = os.open(name, flags & os.O_ACCMODE | os.O_CLOEXEC)
            try:
                ioctl(listener, _ADD_FILE, _Descriptor(request.id, _AND_REPLY, file, 0, os.O_CLOEXEC))
                return
            finally:
                os.close(file)
    ioctl(listener, _SEND, _Reply(request.id, 0, -errno.EPERM, 0))


def _name(memory: int, address: int) -> str:
    """The text at an address; empty if it has no end or if there is no memory."""
    with suppress(OSError, OverflowError):
        name, end, _ = os.pread(memory, _LONGEST_NAME, address).partition(b"\0")
        return os.fsdecode(name) if end else ""
    return ""
