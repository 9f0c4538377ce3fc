"""What a process asks of Linux: to end with its parent, how many cores it may use, how threads wait, who writes.

All that starts threads or processes for work starts `cores()` of them: decoders, the encoder, torch, the frame cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from etenet.errors import UsageError

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

CORES_VARIABLE = "ETENET_CORES"

# How many rounds libgomp's threads spin at a barrier before they sleep. A search by torch passes about a hundred
# barriers. With libgomp's default of 300,000, its threads hold cores that other programs need (docs/performance.md,
# "While other programs run").
SPIN_COUNT = "10000"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

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


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Afterwards this thread takes signals on the same stack as before, whatever a library has done meanwhile."""
    stack = _SignalStack()
    if _libc.sigaltstack(None, ctypes.byref(stack)) != 0:
        yield
        return
    try:
        yield
    finally:
        _libc.sigaltstack(ctypes.byref(stack), None)


def cores(process: Path = Path("/proc/self"), environment: Mapping[str, str] = os.environ) -> int:
    """How many cores this process may use: those of its affinity, or its quota of processor time, rounded up.

    The variable ETENET_CORES overrules both. Raises `UsageError` if it is no such number.
    """
    if text := environment.get(CORES_VARIABLE, "").strip():
        if not (text.isdecimal() and int(text)):
            raise UsageError(f"{CORES_VARIABLE} must be a whole number of at least 1, got {text!r}; correct it")
        return int(text)
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, max(1, math.ceil(_quota(process)))) if sys.platform == "linux" else mine


def _quota(process: Path) -> float:
    """Seconds of processor time per second that the control groups of a process allow it: the least, if any does.

    Source: cgroups(7), "Control Group v2" and "CFS Bandwidth Control" in the kernel's documentation.
    """
    quotas = [float(sys.maxsize)]
    with suppress(OSError, ValueError):
        for group in _groups_with_processor_time(process):
            with suppress(OSError, ValueError, ZeroDivisionError):
                quota, period = _of_v2(group) if (group / "cpu.max").exists() else _of_v1(group)
                if quota > 0:
                    quotas.append(quota / period)
    return min(quotas)


def _of_v2(group: Path) -> tuple[int, int]:
    quota, period = (group / "cpu.max").read_text().split()
    return -1 if quota == "max" else int(quota), int(period)


def _of_v1(group: Path) -> tuple[int, int]:
    return int((group / "cpu.cfs_quota_us").read_text()), int((group / "cpu.cfs_period_us").read_text())


def _groups_with_processor_time(process: Path) -> Iterator[Path]:
    """The folders of the control groups of a process and of those around them, as far as they can be seen from here.

    Where a mount shows only a part of the tree, as in a container, its root is taken off the path of the group.
    """
    mounts = [line.split(" ") for line in (process / "mountinfo").read_text().splitlines()]
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            kind, _, options = mount[mount.index("-", 6) + 1 :]
            if kind != ("cgroup" if controllers else "cgroup2") or (controllers and "cpu" not in options.split(",")):
                continue
            root, top = Path(_unescaped(mount[3])), Path(_unescaped(mount[4]))
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            yield from (top / part for part in (inside, *inside.parents) if ".." not in part.parts)


def _unescaped(text: str) -> str:
    """Of /proc/PID/mountinfo, where a space is \\040. Source: proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def waiting_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """How libgomp's threads wait, for an environment in which torch is not imported yet: as the user has chosen."""
    chosen = {name: environment[name] for name in _WAITING if name in environment}
    return chosen or {"GOMP_SPINCOUNT": SPIN_COUNT}


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The same, with how many threads torch starts."""
    threads = environment.get("OMP_NUM_THREADS") or str(cores(environment=environment))
    return {**waiting_settings(environment), "OMP_NUM_THREADS": threads}


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
