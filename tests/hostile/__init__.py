"""Files that a hostile or unlucky user might upload, made from a seed, each with its expected outcome."""

from __future__ import annotations

from collections.abc import Iterator

from tests.hostile import bombs, damage, foreign, lies, odd, playlists
from tests.hostile.file import Expected, HostileFile
from tests.hostile.playlists import Trap

__all__ = ["Expected", "HostileFile", "Trap", "hostile_files"]


def hostile_files(trap: Trap, seed: int = 0) -> Iterator[HostileFile]:
    """All hostile files. Those that name a file or an address name the `trap`."""
    yield from damage.files(seed)
    yield from lies.files()
    yield from bombs.files()
    yield from playlists.files(trap)
    yield from foreign.files(seed)
    yield from odd.files()
