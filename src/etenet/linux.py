"""prctl(2): what a process asks of the Linux kernel for itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1  # a signal to be sent when the thread that started this process ends
PR_SET_NO_NEW_PRIVS = 38

# How often libgomp's threads look again at a barrier before they sleep. A search passes about a hundred barriers; with
# libgomp's own 300,000 its threads burn the cores that other programs are waiting for. Measured on two cores, p50 of a
# caption: alone 40 ms (37 with libgomp's own, 59 with 1,000, 64 with OMP_WAIT_POLICY=PASSIVE), beside six busy loops
# 330 ms (1,200, 320 and 270).
SPIN_COUNT = "10000"

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: object) -> None:
    """Raises `OSError` where the kernel refuses."""
    words = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    if _libc.prctl(option, *words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment needs before torch is imported; nothing where the user has decided how threads wait."""
    decided = environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {} if decided else {"GOMP_SPINCOUNT": SPIN_COUNT}
