"""Clips truncated at many points, and clips with flipped bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from tests import clips
from tests.hostile.boxes import with_index_first
from tests.hostile.file import HostileFile

CUTS = (0.002, 0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.995)
FLIPS_PER_CLIP = 7


@cache
def containers() -> dict[str, bytes]:
    """One good clip in each kind of container."""
    return {
        "mp4": clips.video(container="mp4"),
        "faststart": with_index_first(clips.video()),
        "fragmented": clips.video(container="mp4", movflags="frag_keyframe+empty_moov", g="10"),
        "ts": clips.video(container="mpegts"),
        "mkv": clips.video(container="matroska"),
        "webm": clips.video(container="webm", codec="libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
        "avi": clips.video(container="avi", codec="mpeg4"),
        "flv": clips.video(container="flv"),
        "ps": clips.video(container="mpeg", codec="mpeg2video"),
        "asf": clips.video(container="asf", codec="wmv2"),
        "gif": clips.video(12, container="gif", codec="gif", pixels="rgb8"),
    }


def files(seed: int) -> Iterator[HostileFile]:
    rng = np.random.default_rng(seed)
    for kind, whole in containers().items():
        for share in CUTS:
            # An .mp4 with its index at the end cannot be read without most of that index.
            unreadable = share < 0.01 or (kind == "mp4" and share < 0.9)
            cut = whole[: max(1, int(share * len(whole)))]
            yield HostileFile(f"{kind} cut at {share:.1%}", "reject" if unreadable else "either", cut)
        for number in range(FLIPS_PER_CLIP):
            yield HostileFile(f"{kind} with flipped bits {number}", "either", flipped(whole, rng, 4 ** (number % 5)))


def with_one_bit_flipped(whole: bytes, rng: np.random.Generator, start: int = 0, end: int | None = None) -> bytes:
    """The file with one bit changed, somewhere between these places."""
    changed = bytearray(whole)
    changed[int(rng.integers(start, len(whole) if end is None else end))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def flipped(whole: bytes, rng: np.random.Generator, count: int) -> bytes:
    """The file with `count` bits changed, half of them in its first kilobyte, where the headers are."""
    changed = bytearray(whole)
    for number in range(count):
        end = min(1024, len(whole)) if number % 2 else len(whole)
        changed[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    return bytes(changed)
