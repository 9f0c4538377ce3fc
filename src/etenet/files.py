"""Files that are written whole or not at all, files that are only added to, and the SHA-256 of a file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Self


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a neighbour of `path`; when the block ends without an error, it is synced and takes the place of `path`.

    After an error `path` is as it was. A crash may leave the neighbour, `.NAME.xxxxxxxx`. Makes missing folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(value: object) -> bytes:
    """JSON on one line, readable: only lone surrogates, as in file names that are not UTF-8, are escaped."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


class AppendOnlyLog:
    """A file of JSON lines that is only added to, by one writer at a time.

    Writing is unbuffered: a line that was added is in the kernel, and outlives a kill of this process. Only a full disk
    or a crash of the machine can leave half a line at the end. Makes the file, and missing folders.
    Raises `BlockingIOError` while another writer has the file open, and `OSError` where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _opened(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def lines(self) -> Iterator[bytes]:
        """The lines with their line breaks. Half a line at the end comes last and has none."""
        with self.path.open("rb") as file:
            yield from file

    def cut_off_half_line(self) -> None:
        """To be called before the first `add`, once the lines are known to be of this log and of no other file."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            self._file.seek(start)
            if (at := self._file.read(end - start).rfind(b"\n")) >= 0:
                self._file.truncate(start + at + 1)
                return
            end = start
        self._file.truncate(0)

    def add(self, value: object) -> None:
        """Raises `OSError`; with `ENOSPC` where the disk had room for a part of the line."""
        line = json_line(value)
        if self._file.write(line) != len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def rewrite(self, values: Iterable[object]) -> None:
        """Replace the contents in one step. `values` may come from `lines`."""
        with replacing(self.path) as file:
            file.writelines(map(json_line, values))
        self._file.close()
        self._file = _opened(self.path)


def _opened(path: Path) -> FileIO:
    """Held with flock(2), which ends with the process."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
