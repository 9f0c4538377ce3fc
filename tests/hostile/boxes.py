"""Find, overwrite and move the boxes of an .mp4 (ISO/IEC 14496-12)."""

from __future__ import annotations

import struct

TRACK = (b"moov", b"trak")
MEDIA = (*TRACK, b"mdia")
TABLE = (*MEDIA, b"minf", b"stbl")


def box(kind: bytes, contents: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(contents)) + kind + contents


def payload(mp4: bytes, path: tuple[bytes, ...]) -> int:
    """Where the contents of a box begin."""
    at, end = 0, len(mp4)
    for kind in path:
        while mp4[at + 4 : at + 8] != kind:
            at += struct.unpack_from(">I", mp4, at)[0]
            if at >= end:
                raise LookupError(path)
        end = at + struct.unpack_from(">I", mp4, at)[0]
        at += 8
    return at


def patched(mp4: bytes, path: tuple[bytes, ...], offset: int, *words: int, form: str = "I") -> bytes:
    """The file with the numbers at `offset` in the contents of a box overwritten."""
    at, raw = payload(mp4, path) + offset, struct.pack(f">{len(words)}{form}", *words)
    return mp4[:at] + raw + mp4[at + len(raw) :]


def with_index_first(mp4: bytes) -> bytes:
    """What `-movflags faststart` makes: the index before the data, and its chunk offsets moved by its length."""
    data, index = mp4.index(b"mdat") - 4, mp4.index(b"moov") - 4
    moov = mp4[index:]
    table = payload(mp4, (*TABLE, b"stco"))
    (count,) = struct.unpack_from(">I", mp4, table + 4)
    offsets = struct.unpack_from(f">{count}I", mp4, table + 8)
    moved = patched(mp4, (*TABLE, b"stco"), 8, *(offset + len(moov) for offset in offsets))
    return moved[:data] + moved[index:] + moved[data:index]
