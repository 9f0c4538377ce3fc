"""prctl(2): what a process asks of the Linux kernel for itself."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1  # a signal to be sent when the thread that started this process ends
PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: object) -> None:
    """Raises `OSError` where the kernel refuses."""
    words = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    if _libc.prctl(option, *words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
