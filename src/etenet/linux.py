"""What a process asks of Linux: prctl(2), to end with its parent, how many cores it may use, and how threads wait."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

# How many rounds libgomp's threads spin at a barrier before they sleep. A search passes about a hundred barriers; with
# libgomp's default of 300,000, its threads hold cores that other programs need. p50 of a caption on two cores, in ms:
#
#                            300,000   10,000   1,000   OMP_WAIT_POLICY=PASSIVE
#     alone                       37       40      59        64
#     beside six busy loops     1200      330     320       270
SPIN_COUNT = "10000"

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: object) -> None:
    """Raises `OSError` where the kernel refuses."""
    words = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    if _libc.prctl(option, *words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def end_with_parent(number: signal.Signals, *, parent: int) -> None:
    """Have this process sent a signal when the parent's thread that started it ends; exit if that is over already."""
    prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(f"the parent {parent} has ended")


def cores() -> int:
    """How many cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment before torch is imported; nothing if the user has chosen how threads wait."""
    chosen = environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {} if chosen else {"GOMP_SPINCOUNT": SPIN_COUNT}
