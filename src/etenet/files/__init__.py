"""Files that are replaced as a whole, logs that only grow, standard output, hashes, caches, folders.

`rows.py` reads tables.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sys
import tempfile
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOSPC
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import IO, Self

from etenet.errors import CannotWrite, OutputLost


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that replaces `path` when the block ends, and is then on the disk. Makes missing folders.

    Its mode is that of the old file, or by the umask. After an error `path` is unchanged. A crash may leave the new
    file beside it, as `.NAME.xxxxxxxx`. Raises `CannotWrite`.
    """
    unfinished = path.parent / f".{path.name}.{token_hex(4)}"
    try:
        _require_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("x+b") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise CannotWrite(error.errno, error.strerror, str(path)) from error
        raise


def require_replaceable(*paths: Path) -> None:
    """Raises `CannotWrite` before long work for what `replacing` would find out after it. Leaves nothing behind."""
    for path in paths:
        try:
            _require_regular(path)
            with tempfile.TemporaryFile(dir=next(above for above in path.parents if above.exists())):
                pass
        except OSError as error:
            raise CannotWrite(error.errno, error.strerror, str(path)) from error


def folders_below(
    folder: Path, *, hidden: bool = True, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names of its files. Without `hidden`, no folder whose name begins with a dot.

    Links to folders are followed, and no folder comes twice, so loops end. A folder goes by its own name rather than
    that of a link to it. `onerror` gets what cannot be listed.
    """
    seen: set[str] = set()
    tops = deque([str(folder)])
    while tops:
        for top, folders, files in os.walk(tops.popleft(), onerror=onerror):
            if (real := os.path.realpath(top)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
            tops.extend(path for name in folders if os.path.islink(path := os.path.join(top, name)))
            yield top, files


def as_it_looks(name: str) -> str:
    """Equal for names that look the same: in Unicode's form NFC (macOS stores NFD), without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


def cache_folder() -> Path:
    """Where what can be made again is kept for the user. Raises `OSError` for a user without a home.

    Source: XDG Base Directory Specification.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etenet"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home (HOME and XDG_CACHE_HOME are not set)") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(value: object) -> bytes:
    """JSON on one line. Only lone surrogates are escaped: they stand for bytes of file names that are not UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def occupy_closed_streams() -> None:
    """Open what the caller has closed (`>&-`). Its number would else go to the next file, and libraries print there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def print_bytes(text: bytes) -> None:
    """Write to standard output at once. Raises `OutputLost`, from `BrokenPipeError` if nobody reads any more."""
    if sys.stdout is None:
        raise OutputLost("standard output is closed; redirect it to a file")
    try:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would write what is left when it ends, fail again, and say so.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise OutputLost(
            f"cannot write to standard output: {error.strerror}; fix that, or redirect it elsewhere"
        ) from error


class AppendOnlyLog:
    """A file of JSON lines that is only added to, by one writer at a time.

    Writing is unbuffered, so a line that was added survives a kill of this process. Only a full disk or a crash of the
    machine can leave half a line at the end. Makes the file and missing folders.
    Raises `BlockingIOError` while another writer has the file open, and `OSError` if it cannot be written.
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
        """The lines with their line breaks. Half a line at the end has none."""
        with self.path.open("rb") as file:
            yield from file

    def cut_off_half_line(self) -> None:
        """Call this before the first `add`, and after a check that the file is a log and not something else."""
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
        """Raises `OSError`, also if the disk has room for only a part of the line (`ENOSPC`)."""
        line = json_line(value)
        if self._file.write(line) != len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def rewrite(self, values: Iterable[object]) -> None:
        """Replace all lines at once. `values` may be made from `lines()`."""
        with replacing(self.path) as file:
            file.writelines(map(json_line, values))
        self._file.close()
        self._file = _opened(self.path)


def _require_regular(path: Path) -> None:
    """Raises `OSError` for a device, a pipe or a folder: reading it may not end, and it must not be replaced."""
    if path.exists() and not path.is_file():
        raise OSError(EINVAL, "it is no regular file", str(path))


def _opened(path: Path) -> io.FileIO:
    """Locked with flock(2), which the kernel undoes when the process ends."""
    _require_regular(path)
    file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError(f"another writer has just replaced {path}")
    except OSError:
        file.close()
        raise
    return file
