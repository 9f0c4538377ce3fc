"""Headers that claim false sizes, times and counts, and nested boxes (ISO/IEC 14496-12, Matroska, RIFF)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from tests import clips
from tests.hostile.boxes import MEDIA, TABLE, TRACK, box, patched
from tests.hostile.damage import containers
from tests.hostile.file import HostileFile

_LARGEST = 0xFFFFFFFF


def files() -> Iterator[HostileFile]:
    mp4 = containers()["mp4"]
    yield from _claims(mp4)
    yield from _boxes(mp4)
    yield from _other_containers()


def _claims(mp4: bytes) -> Iterator[HostileFile]:
    hours = 10 * 3600 * 12800
    yield HostileFile("a track of 65535 x 65535", "accept", patched(mp4, (*TRACK, b"tkhd"), 76, _LARGEST, _LARGEST))
    yield HostileFile(
        "a picture of 65535 x 65535", "either", patched(mp4, (*TABLE, b"stsd"), 40, 65535, 65535, form="H")
    )
    yield HostileFile("a picture of 0 x 0", "either", patched(mp4, (*TABLE, b"stsd"), 40, 0, 0, form="H"))
    yield HostileFile("a movie that claims ten hours", "accept", patched(mp4, (b"moov", b"mvhd"), 16, hours))
    yield HostileFile("a track that claims ten hours", "accept", patched(mp4, (*MEDIA, b"mdhd"), 16, hours))
    yield HostileFile("a track that claims no time", "accept", patched(mp4, (*MEDIA, b"mdhd"), 16, 0))
    for scale in (0, 1, _LARGEST >> 1, _LARGEST):
        yield HostileFile(f"a movie's time scale of {scale}", "either", patched(mp4, (b"moov", b"mvhd"), 12, scale))
        yield HostileFile(f"a track's time scale of {scale}", "either", patched(mp4, (*MEDIA, b"mdhd"), 12, scale))
    for table, offset in (
        (b"stts", 4),
        (b"stts", 8),
        (b"stsz", 8),
        (b"stco", 4),
        (b"stsc", 4),
        (b"stss", 4),
        (b"ctts", 4),
    ):
        for count in (0, 1 << 20, _LARGEST):
            lie = patched(mp4, (*TABLE, table), offset, count)
            yield HostileFile(f"{count} in {table.decode()} at {offset}", "either", lie)
    yield HostileFile("samples of 4 GB", "either", patched(mp4, (*TABLE, b"stsz"), 4, _LARGEST))
    yield HostileFile("samples beyond the end", "reject", patched(mp4, (*TABLE, b"stco"), 8, _LARGEST - 8))
    yield HostileFile("frames that last forever", "either", patched(mp4, (*TABLE, b"stts"), 12, _LARGEST >> 1))
    yield HostileFile("an edit that starts late", "either", patched(mp4, (*TRACK, b"edts", b"elst"), 12, _LARGEST >> 2))
    yield HostileFile("an edit of 4 G units", "either", patched(mp4, (*TRACK, b"edts", b"elst"), 8, _LARGEST))
    yield HostileFile("4 G edits", "either", patched(mp4, (*TRACK, b"edts", b"elst"), 4, _LARGEST))


def _boxes(mp4: bytes) -> Iterator[HostileFile]:
    at = mp4.index(b"mdat") - 4
    head, rest = mp4[:at], mp4[at + 8 :]
    moov = mp4[mp4.index(b"moov") - 4 :]
    yield HostileFile("an mdat of 2 GB", "reject", head + struct.pack(">I", 1 << 31) + b"mdat" + rest)
    yield HostileFile("an mdat of 2^62 bytes", "reject", head + struct.pack(">I4sQ", 1, b"mdat", 1 << 62) + rest)
    yield HostileFile("an mdat to the end of the file", "reject", head + struct.pack(">I", 0) + b"mdat" + rest)
    nested = b""
    for _ in range(2000):
        nested = box(b"moov", nested)
    yield HostileFile("2,000 nested boxes", "reject", box(b"ftyp", b"isom\0\0\2\0isom") + nested)
    nested = moov[8:]
    for _ in range(50):
        nested = box(b"udta", nested)
    yield HostileFile("an index nested in 50 boxes", "either", mp4[: -len(moov)] + box(b"moov", nested))
    yield HostileFile("a million free boxes before", "either", mp4[:32] + box(b"free") * 1_000_000 + mp4[32:])
    yield HostileFile("a million free boxes after", "accept", mp4 + box(b"free") * 1_000_000)
    yield HostileFile("a box of 7 bytes", "either", mp4 + struct.pack(">I", 7) + b"free")
    yield HostileFile("a hundred indexes", "either", mp4 + moov * 100)
    for name, claimed, packed in (
        ("bomb", 1 << 28, zlib.compress(bytes(1 << 28), 9)),
        ("of a false size", _LARGEST, zlib.compress(moov)),
        ("that is not compressed", len(moov), b"no zlib" * 10),
    ):
        compressed = box(b"dcom", b"zlib") + box(b"cmvd", struct.pack(">I", claimed) + packed)
        lie = mp4[: -len(moov)] + box(b"moov", box(b"cmov", compressed))
        yield HostileFile(f"a compressed index {name}", "reject", lie)


def _other_containers() -> Iterator[HostileFile]:
    avi, mkv, ts, flv = (containers()[kind] for kind in ("avi", "mkv", "ts", "flv"))
    header = avi.index(b"avih") + 8
    for name, offset in (("width", 32), ("height", 36), ("frames", 16), ("streams", 24), ("rate", 0)):
        lie = avi[: header + offset] + struct.pack("<I", _LARGEST) + avi[header + offset + 4 :]
        yield HostileFile(f"an avi of 4 G {name}", "either", lie)
    picture = avi.index(b"strf") + 8
    lie = avi[: picture + 4] + struct.pack("<ii", 65535, 65535) + avi[picture + 12 :]
    yield HostileFile("an avi's picture of 65535 x 65535", "either", lie)
    width = mkv.index(b"\xb0", mkv.index(b"\xe0"))  # PixelWidth in Video
    yield HostileFile("an mkv of 65535 wide", "either", mkv[: width + 2] + b"\xff" + mkv[width + 3 :])
    cluster = mkv.index(b"\x1f\x43\xb6\x75") + 4
    yield HostileFile(
        "an mkv cluster of 2^56 bytes", "either", mkv[:cluster] + b"\x01" + b"\xff" * 7 + mkv[cluster + 8 :]
    )
    yield HostileFile("500 nested mkv segments", "either", mkv[: cluster - 4] + b"\x18\x53\x80\x67\xff" * 500)
    yield HostileFile("a ts of one packet, 20,000 times", "either", ts[:188] * 20_000)
    yield HostileFile("a ts of sync bytes only", "either", (b"G" + bytes(187)) * 5000)
    yield HostileFile("an flv tag of 16 MB", "either", flv[:14] + b"\xff\xff\xff" + flv[17:])
    yield HostileFile("two clips in one file", "accept", containers()["mp4"] + containers()["mkv"])
    yield HostileFile("a clip after a megabyte of zeros", "reject", bytes(1 << 20) + clips.video())
