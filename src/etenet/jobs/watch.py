"""Folders that videos arrive in, and which of these are whole.

A file is whole when it has stood still for a while and no program has it open for writing, as far as Linux can tell.
Folders are looked at again and again: unlike inotify, that also works where another machine writes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from etenet.errors import UsageError, named
from etenet.jobs import inputs
from etenet.jobs.inputs import JobClip, Skipped, id_of
from etenet.linux import is_open_for_writing

LOOK_EVERY_S = 0.5
LOOKING_SHARE = 0.05  # of the time, at most, in large folders
STILL_S = 2.0

_State = tuple[int, int, int]  # inode, size, time of change


class Watch:
    """Gives each file once, unless it goes away and another one of its name comes."""

    def __init__(self, folders: Sequence[str], *, still_s: float = STILL_S) -> None:
        """Raises `UsageError` if one is no folder."""
        if others := [folder for folder in folders if not Path(folder).is_dir()]:
            raise UsageError(f"--watch needs folders, and {named(others)} is none; make it, or name another")
        self._folders, self._still_s = [Path(folder) for folder in folders], still_s
        self._given: set[Path] = set()
        self._waiting: dict[Path, tuple[_State, float]] = {}

    def __str__(self) -> str:
        return ", ".join(map(str, self._folders))

    def rounds(self, meanwhile: Callable[[], object] = lambda: None) -> Iterator[Iterator[JobClip]]:
        """The clips that are whole, until there are none for now; and so on, without end.

        `meanwhile` is called again and again while nothing arrives.
        """
        while True:
            began_s = time.monotonic()
            if whole := self.look():
                yield self._clips(whole)
            else:
                meanwhile()
                looked_s = time.monotonic() - began_s
                time.sleep(max(LOOK_EVERY_S, looked_s / LOOKING_SHARE))

    def _clips(self, whole: list[Path]) -> Iterator[JobClip]:
        while whole:
            for path in whole:
                yield from inputs.in_tar(JobClip(id_of(str(path)), str(path)), Skipped())
            whole = self.look()

    def look(self) -> list[Path]:
        """The files that have become whole since the last look. One without contents is waited for."""
        now_s, whole, waiting = time.monotonic(), list[Path](), dict[Path, tuple[_State, float]]()
        skipped = Skipped()
        there = [path for folder in self._folders for path in inputs.videos_in(folder, skipped)]
        if not skipped.unreadable_folders:
            self._given.intersection_update(there)
        for path in there:
            if path in self._given or path.name.startswith("."):
                continue
            with suppress(OSError):  # it has gone away
                status = os.stat(path)
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                before, since_s = self._waiting.get(path, (state, now_s))
                since_s = since_s if before == state else now_s
                if state[1] and now_s - since_s >= self._still_s and not is_open_for_writing(path):
                    self._given.add(path)
                    whole.append(path)
                else:
                    waiting[path] = state, since_s
        self._waiting = waiting
        return whole


@contextmanager
def until_stopped() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block, and nothing else."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
