"""Files at URLs, through fsspec: read, listed, and written by way of a copy on this machine.

Every filesystem has errors of its own, and many are no `OSError`. They are translated here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from etenet.errors import UsageError
from etenet.files import cache_folder

PUBLISH_EVERY_S = 60.0
UPLOAD_SHARE = 0.05  # of the time of a job, at most
_SHOWN_CHARACTERS = 200
_FIX_OF_OUT = "; fix that, or name another place with --out"
_SLASH_LEFT_OUT = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")


def is_remote(path: str) -> bool:
    return "://" in path


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """A file to read. Raises `OSError`, whatever the filesystem raises."""
    import fsspec

    with _errors_as(OSError, "cannot be read"), fsspec.open(url, "rb") as file:
        yield file


def find(url: str) -> list[str]:
    """The URLs of all files in a folder, at any depth, or those that match a glob, or of one file the URL itself."""
    with _errors_as(UsageError, f"cannot list {url}", fix="; fix that, or correct the URL"):
        files, path = _filesystem(url)
        if glob.has_magic(path):
            names = files.glob(path)
        elif files.isdir(path):
            names = files.find(path)
        else:
            return [url]
        return sorted(files.unstrip_protocol(name) for name in names)


class Publication:
    """The output of a job at a URL. The job writes to `path` on this machine, from where files are copied to the URL.

    What an earlier run of the job left at `path` is still there, until the job is done.
    """

    def __init__(self, url: str) -> None:
        """Raises `UsageError` if the URL names no file that could be written."""
        self.url = url.rstrip("/")
        with _errors_as(UsageError, f"cannot write {url}", fix=_FIX_OF_OUT):
            self._files, self._place = _filesystem(self.url)
            cache = cache_folder()
        self._above, slash, name = self._place.rpartition("/")
        if not (slash and name):
            raise UsageError(f"{url} names no file; give one with --out, as in {self.url}/captions.jsonl")
        # As a job resolves its output: a cache may be a link to a larger disk.
        self._folder = Path(os.path.realpath(cache / "jobs" / hashlib.sha256(self.url.encode()).hexdigest()[:16]))
        self.path = self._folder / name
        self._next_s = 0.0
        self._published: dict[Path, int] = {}  # file -> how many bytes it had

    def url_of(self, name: str) -> str:
        """Where a file is published that is beside `path`."""
        return f"{self.url.rpartition('/')[0]}/{name}"

    def place_of(self, name: str) -> str:
        """The same as `find` says it."""
        return str(self._files.unstrip_protocol(f"{self._above}/{name}"))

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path | None]:
        """A temporary copy of the file that is published beside the output under this name; None if there is none."""
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / name
            with _errors_as(UsageError, f"cannot read {self.url}", fix=_FIX_OF_OUT):
                if is_there := self._files.exists(f"{self._above}/{name}"):
                    self._files.get_file(f"{self._above}/{name}", str(copy))
            yield copy if is_there else None

    def publish(self, *paths: Path) -> None:
        """Copy files, and all files in folders, to the URL. Raises `OSError`."""
        began_s = time.monotonic()
        try:
            with _errors_as(OSError, f"cannot write {self.url}"):
                for path in paths:
                    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                        if file.is_file():
                            size, inside = file.stat().st_size, file.relative_to(self._folder).as_posix()
                            self._files.put_file(str(file), f"{self._above}/{inside}")
                            self._published[file] = size
        finally:  # a place that takes nothing may need minutes to say so
            self._next_s = time.monotonic() + max(PUBLISH_EVERY_S, (time.monotonic() - began_s) / UPLOAD_SHARE)

    def is_due(self, log: Path) -> bool:
        """Whether it is time to publish what was added to this file."""
        return time.monotonic() > self._next_s and log.stat().st_size != self._published.get(log)

    def close(self) -> None:
        """Remove the files on this machine, now that they are published."""
        shutil.rmtree(self._folder, ignore_errors=True)


def destination(out: str) -> tuple[Path, Publication | None]:
    """Where a job writes, and for a URL that is not on this machine the publication of what it writes.

    Raises `UsageError`, as for a filesystem whose package is not installed.
    """
    if _SLASH_LEFT_OUT.match(out):
        raise UsageError(f"{out} is no URL, and would be a folder here; write {out.replace(':/', '://', 1)}")
    if not is_remote(out):
        return Path(out), None
    from fsspec.implementations.local import LocalFileSystem

    with _errors_as(UsageError, f"cannot write {out}", fix=_FIX_OF_OUT):
        files, path = _filesystem(out)
    if isinstance(files, LocalFileSystem):
        return Path(path), None
    publication = Publication(out)
    return publication.path, publication


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, str(path)


@contextmanager
def _errors_as(kind: type[Exception], doing: str, *, fix: str = "") -> Iterator[None]:
    """Any error of a filesystem as one of this kind, on one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__
        raise kind(f"{doing}: {reason}{fix}") from error
