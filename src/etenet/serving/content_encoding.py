"""A body that was compressed for the way -> the body, never larger than a video may be. Source: RFC 9110, 8.4."""

from __future__ import annotations

import zlib

from etenet.errors import NotAVideo, TooLarge

_FORMATS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}  # zlib's `wbits`; some clients send deflate bare
_MOST_MEMBERS = 16  # of gzip data: each costs a copy of those after it


def undo(content_encoding: str, body: bytes, max_bytes: int) -> bytes:
    """Raises `NotAVideo` for another encoding, or for data that is not whole, and `TooLarge` beyond `max_bytes`."""
    codings = [
        coding for coding in content_encoding.lower().replace(" ", "").split(",") if coding not in ("", "identity")
    ]
    if not codings or not body:
        return body
    if len(codings) > 1 or codings[0] not in _FORMATS:
        raise NotAVideo(
            f"Content-Encoding {content_encoding[:40]!r} is not undone here; send the video bare, or in gzip"
        )
    for wbits in _FORMATS[codings[0]]:
        try:
            return _decompressed(body, wbits, max_bytes)
        except zlib.error:
            pass
    raise NotAVideo(
        f"the body is not whole {codings[0]} data, as Content-Encoding says; send it whole, or without that header"
    )


def _decompressed(body: bytes, wbits: int, max_bytes: int) -> bytes:
    video, rest = b"", body
    for _ in range(_MOST_MEMBERS):
        member = zlib.decompressobj(wbits)
        video += member.decompress(rest, max_bytes + 1 - len(video))
        if len(video) > max_bytes:
            raise TooLarge(f"the video has more than {max_bytes} bytes when it is decompressed; send a shorter clip")
        rest = member.unused_data
        if not member.eof:
            break
        if not rest:
            return video
    raise zlib.error("not whole, or of too many members")
