"""Watch the trap that hostile files name: a file and a port that no decoder may open."""

from __future__ import annotations

import ctypes
import os
import select
import socket
from pathlib import Path

from tests import clips
from tests.hostile.playlists import Trap

IN_OPEN = 0x20  # inotify(7)


class Alarm:
    """Sees whether the file of the trap was opened, or its port connected to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.trap = Trap(folder / "secret.mp4", self._listener.getsockname()[1])
        self.trap.clip.write_bytes(clips.video(5))
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._watch, str(self.trap.clip).encode(), IN_OPEN) > 0

    def triggered(self) -> bool:
        """Whether the trap was touched since the last call."""
        touched, _, _ = select.select([self._watch, self._listener], [], [], 0)
        if self._watch in touched:
            os.read(self._watch, 65536)
        if self._listener in touched:
            self._listener.accept()[0].close()
        return bool(touched)

    def close(self) -> None:
        os.close(self._watch)
        self._listener.close()
