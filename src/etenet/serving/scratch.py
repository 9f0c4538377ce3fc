"""The folder of a server, which is deleted at its end, and what killed servers have left.

Anyone may put anything into a shared folder such as /tmp. So no link is followed, nothing is waited for, and only
folders of this user that nobody else can write to are deleted. Knows of TorchServe only which paths it can use.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etenet.errors import UsageError

_PREFIX, _LOCK = "etenet-", "lock"
_CAREFULLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# A colon divides Java's class path, its settings change backslashes and what is not ASCII, and the path of a socket
# (.ts.sock.9000 in the new folder) has at most 107 bytes.
_USABLE = re.compile(r"[\w+,./=@~-]{1,76}", re.ASCII)
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def scratch_folder(log: Callable[[str], None]) -> Iterator[Path]:
    """A new folder with a short path. Raises `UsageError` if there is no room or no usable path for it."""
    above = tempfile.gettempdir()
    if not _USABLE.fullmatch(above):
        raise UsageError(
            f"TorchServe cannot use temporary files in {above}: the path must have at most 76 characters, all of them "
            "letters, digits or +,-./=@_~; set TMPDIR to another folder, such as /tmp"
        )
    for lock in Path(above).glob(f"{_PREFIX}*/{_LOCK}"):
        if _is_abandoned(lock.parent, log):
            shutil.rmtree(lock.parent, ignore_errors=True)
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    except OSError as error:
        raise UsageError(f"cannot make a folder in {above}: {error.strerror}; set TMPDIR") from error
    with (
        made as path,
        (Path(path) / "unlocked").open("w") as file,
        _opened(Path(path), os.O_DIRECTORY) as folder,
    ):
        # systemd-tmpfiles deletes what is ten days old in /tmp, but nothing in a locked folder (tmpfiles.d(5), "Age").
        fcntl.flock(folder, fcntl.LOCK_SH)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(file.name, Path(path) / _LOCK)
        yield Path(path)


def _is_abandoned(folder: Path, log: Callable[[str], None]) -> bool:
    """Whether it is the folder of a server of this user that no longer runs."""
    try:
        with _opened(folder, os.O_DIRECTORY) as above:
            made = os.fstat(above)
            if made.st_uid == os.geteuid() and not made.st_mode & _OTHERS_MAY_WRITE:
                with _opened(_LOCK, dir_fd=above) as lock:
                    if stat.S_ISREG(os.fstat(lock).st_mode):
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return True
    except (FileNotFoundError, PermissionError, BlockingIOError):
        return False  # just deleted, another user's, or that of a server that runs
    except OSError:
        pass  # a link, or no file
    log(f"{folder} is left alone: no server of this user makes such a folder; delete it if it is yours")
    return False


@contextmanager
def _opened(path: Path | str, flags: int = 0, *, dir_fd: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, _CAREFULLY | flags, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
