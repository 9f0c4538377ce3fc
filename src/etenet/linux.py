"""What a process asks of Linux: to end with its parent, how many cores it may use, how threads wait, who writes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

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


def is_open_for_writing(path: Path) -> bool:
    """Whether a program has a file open for writing. False where Linux does not say: of files of others, on networks.

    Source: fcntl(2), "Leases": nobody gets one to read a file while somebody writes it.
    """
    try:
        with path.open("rb") as file:
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # it is ignored, and SIGIO would end this process
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment before torch is imported; nothing if the user has chosen how threads wait."""
    chosen = environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {} if chosen else {"GOMP_SPINCOUNT": SPIN_COUNT}
