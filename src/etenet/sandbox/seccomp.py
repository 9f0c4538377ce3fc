"""A system-call filter for the process that installs it, all its threads, for the rest of its life.

An allow-list: memory, clocks, and reading and writing files that are open already. Everything else (open, socket,
connect, execve, clone, kill, ptrace, ioctl, ...) fails with EPERM. Source: seccomp(2), linux/filter.h, linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from dataclasses import dataclass

from etenet.linux import PR_SET_NO_NEW_PRIVS, prctl


@dataclass(frozen=True, slots=True)
class _Architecture:
    audit: int  # AUDIT_ARCH_*, linux/audit.h
    seccomp: int  # the call that installs a filter
    allowed: dict[str, int]


_X86_64 = _Architecture(
    0xC000003E,
    317,
    {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "pread64": 17, "pwrite64": 18},
        **{"sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47},
        **{"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28},
        **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "restart_syscall": 219},
        **{"sched_yield": 24, "futex": 202, "clock_gettime": 228, "clock_nanosleep": 230, "getrandom": 318},
        **{"getpid": 39, "gettid": 186, "exit": 60, "exit_group": 231},
    },
)
_AARCH64 = _Architecture(
    0xC00000B7,
    277,
    {
        **{"read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "pread64": 67, "pwrite64": 68},
        **{"sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212},
        **{"mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214, "mremap": 216, "madvise": 233},
        **{"rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "restart_syscall": 128},
        **{"sched_yield": 124, "futex": 98, "clock_gettime": 113, "clock_nanosleep": 115, "getrandom": 278},
        **{"getpid": 172, "gettid": 178, "exit": 93, "exit_group": 94},
    },
)
_ARCHITECTURES = {"x86_64": _X86_64, "aarch64": _AARCH64}

_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM
_SYSCALL_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_SET_MODE_FILTER, _OF_ALL_THREADS = 1, 1  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC

_Line = tuple[int, int, int, int]


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def allow_only_decoding() -> None:
    """Install the filter. Raises `OSError` if this kernel or processor has none."""
    architecture = _ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or architecture is None:
        raise OSError(errno.ENOSYS, f"there is no filter for {sys.platform} on {platform.machine()}")
    lines = _lines(architecture)
    program = _Program(len(lines), (_Instruction * len(lines))(*(_Instruction(*line) for line in lines)))
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # prctl would not filter the threads that run already.
    system = ctypes.CDLL(None, use_errno=True)
    result = int(system.syscall(architecture.seccomp, _SET_MODE_FILTER, _OF_ALL_THREADS, ctypes.byref(program)))
    if result:  # the number of a thread that has another filter
        code = ctypes.get_errno() if result < 0 else errno.ESRCH
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def _lines(architecture: _Architecture) -> list[_Line]:
    lines = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _FAIL),
        (_LOAD_WORD, 0, 0, _SYSCALL_NUMBER_AT),
    ]
    for number in architecture.allowed.values():
        lines += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return [*lines, (_RETURN, 0, 0, _FAIL)]
