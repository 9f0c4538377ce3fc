"""A body that is no video -> what it is, and what to send instead, in one sentence. Reads bytes and decodes nothing.

Sources: ISO/IEC 14496-12 (boxes), ISO/IEC 23001-7 (encryption), ISO/IEC 23008-12 (HEIF), ISO/IEC 23000-19, 7.3.2 (CMAF
segments); the marks of other files are those of file(1).
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator

from etenet.errors import CaptionError, NotAVideo, UndecodableVideo
from etenet.video.ffmpeg import CONTAINERS

_SEND_A_VIDEO = "send a video"
_SEND_THE_FILE = "send the bytes of the video file themselves, for example with curl -T clip.mp4"
CONVERT = "convert it, for example with ffmpeg -i FILE clip.mp4"
_UNPACK = "unpack it and send the video that is in it"
_DOWNLOAD = "send the video that it leads to, for example after ffmpeg -i ADDRESS -c copy clip.mp4"
_A_CONTAINER = f"a container that etenet reads ({', '.join(CONTAINERS)})"
_SEND_BOTH = "send both in one file, for example after cat INIT SEGMENT > clip.mp4"

_VIDEO = re.compile(
    rb".{4}(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|\0\0\x01\xba|FLV|\x30\x26\xb2\x75|GIF8|.{8}AVI |.{188}G",
    re.DOTALL,
)
_PICTURES = {
    rb"\xff\xd8\xff": "JPEG",
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"RIFF.{4}WEBP": "WebP",
    rb"BM.{4}\0{4}": "BMP",
    rb"II\*\0|MM\0\*": "TIFF",
    rb"8BPS": "Photoshop",
    rb"\0\0\x01\0[^\0]": "ICO",
    rb"\xff\x0a|.{4}JXL \r\n": "JPEG XL",
    rb".{4}jP  \r\n": "JPEG 2000",
}
_ANIMATED = {  # by a flag of VP8X, and by a chunk before the first picture
    rb"RIFF.{4}WEBPVP8X.{4}[" + re.escape(bytes(flags for flags in range(256) if flags & 2)) + b"]": "WebP",
    rb"\x89PNG\r\n\x1a\n(?:(?!IDAT).){0,4096}acTL": "PNG",
}
_HEIF_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC"}
_RAW_PHOTOGRAPH = b"crx "  # Canon's CR3 has tracks like a video
_VIDEO_BEHIND = re.compile(rb"\0\0[\0\x01].ftyp[A-Za-z0-9 ]{4}|\x1aE\xdf\xa3.{1,8}B\x86\x81\x01", re.DOTALL)
_NEXT_JPEG = b"\xff\xd9\xff\xd8\xff"  # a photograph has a few smaller ones behind it
_BARE_STREAM = "a bare video stream without a container"
_OTHERS = {
    rb"\x1f\x8b": ("compressed with gzip", f"{_UNPACK}, or send it with the header Content-Encoding: gzip"),
    rb"x[\x01\x5e\x9c\xda]": (
        "compressed with zlib",
        f"{_UNPACK}, or send it with the header Content-Encoding: deflate",
    ),
    rb"\0\x05\x16\x07": ("what macOS keeps beside a file (AppleDouble)", "send the file without ._ in its name"),
    rb"\xfd7zXZ\0|BZh|\x28\xb5\x2f\xfd": ("a compressed file (xz, bzip2 or zstd)", _UNPACK),
    rb"PK\x03\x04": ("a ZIP archive", _UNPACK),
    rb".{257}ustar": ("a tar archive", _UNPACK),
    rb".{32769}(CD001|BEA01)": ("an image of a disc", _UNPACK),
    rb"7z\xbc\xaf\x27\x1c|Rar!": ("an archive (7z or RAR)", _UNPACK),
    rb"(?i:--[^\r\n]{1,100}\r?\ncontent-disposition:)": (
        "a multipart form without its Content-Type",
        "leave that header to the client, for example curl -F data=@clip.mp4",
    ),
    rb"[^\0\r\n]{1,4}ftyp[^\0\r\n]{64,}\Z": (
        "a file without its zeros and line breaks, which curl -d leaves out",
        "send it with curl -T clip.mp4, or with --data-binary in place of -d",
    ),
    rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]": ("an audio file (MP3)", _SEND_A_VIDEO),
    rb"\xff[\xf0\xf1\xf8\xf9]": ("an audio file (AAC)", _SEND_A_VIDEO),
    rb"fLaC": ("an audio file (FLAC)", _SEND_A_VIDEO),
    rb"RIFF.{4}WAVE": ("an audio file (WAV)", _SEND_A_VIDEO),
    rb"FORM.{4}AIF|#!AMR": ("an audio file (AIFF or AMR)", _SEND_A_VIDEO),
    rb"OggS": ("an Ogg file, which etenet does not read", CONVERT),
    rb"\x06\x0e\x2b\x34": ("an MXF file, which etenet does not read", CONVERT),
    rb"\.RMF": ("a RealMedia file, which etenet does not read", CONVERT),
    rb"YUV4MPEG2|DKIF|nut/": ("a video in a container that etenet does not read (YUV4MPEG2, IVF or NUT)", CONVERT),
    rb"\0\0\0?\x01(?!\xba|[a-z]{4})": (_BARE_STREAM, CONVERT),  # nor a program stream, nor a box of 64 bits
    rb"\0{1024}": (
        "a file that begins with zeros, as an unfinished download or copy does",
        "send it again when it is whole",
    ),
    rb"%PDF": ("a PDF document", _SEND_A_VIDEO),
}
_TEXTS = {
    r"<!doctype html|<html|<head": (
        "an HTML page",
        "send the video itself: its address may lead to a page about it, or to a login",
    ),
    r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<MPD\b": ("a DASH manifest, which only lists parts of a video", _DOWNLOAD),
    r"#EXTM3U": ("an HLS playlist, which only lists parts of a video", _DOWNLOAD),
    r"ffconcat|\[playlist\]|<asx|<smil|RTSPtext|\[reference\]": ("a playlist, which only names a video", _DOWNLOAD),
    r"WEBVTT|\[script info\]|\d+\s+\d\d:\d\d:\d\d[,.]\d+ -->": (
        "a file of subtitles",
        "send the video that they are for",
    ),
    r"<svg|<\?xml": ("XML", _SEND_THE_FILE),
    r"data:[^,]*;base64,": ("a data: address with a file in base64", _SEND_THE_FILE),
    r"[a-z][a-z0-9+.-]*://\S+\s*$": ("an address, and the server fetches none", _SEND_THE_FILE),
    r"version https://git-lfs": ("a pointer of Git LFS in place of a file", "fetch the file with git lfs pull"),
    r"%PDF": ("a PDF document", _SEND_A_VIDEO),
    r"""[\[{].*["',][A-Za-z0-9+/_\\-]{64}""": ("JSON with a file in base64", _SEND_THE_FILE),
    r"[\[{]": ("JSON", _SEND_THE_FILE),
}
_SEGMENT_BOXES = frozenset((b"styp", b"sidx", b"ssix", b"moof", b"emsg", b"prft"))
_ENCRYPTION = re.compile(rb"schm\0{4}(cenc|cens|cbc1|cbcs)")
_WEBM_CLUSTER = b"\x1f\x43\xb6\x75"
_BOM = b"\xef\xbb\xbf"
_BASE64 = re.compile(r"""(?:[\w-]+=)?b?["']?([A-Za-z0-9+/_-]{64,})""")  # alone, in quotes, or as a field of a form
_HEAD_BYTES, _SHOWN_LETTERS, _MOST_BOXES, _MOST_BEFORE_BYTES = 4096, 40, 1000, 2**16


def still_image(body: bytes) -> NotAVideo | None:
    """Why a body is refused that FFmpeg would read as a video of one frame; None if it is no still image.

    A HEIF file (HEIC, AVIF) has its picture in a `meta` box. If it moves, it has a `moov` box, too.
    """
    if body[4:8] != b"ftyp":
        return None
    brand = body[8:12]
    if brand == _RAW_PHOTOGRAPH:
        return _refused("a raw photograph (CR3)", _SEND_A_VIDEO)
    starts = dict(_boxes(body))  # of the last one of each kind
    name = _HEIF_BRANDS.get(brand, "HEIF")
    if brand in _HEIF_BRANDS and 0 < starts.get(b"meta", 0) < starts[b"ftyp"]:
        return _motion_photo(name, starts[b"ftyp"])
    if starts.keys() & {b"moov", b"moof"} or (b"meta" not in starts and brand not in _HEIF_BRANDS):
        return None
    if b"mpvd" in starts:
        return _motion_photo(name, starts[b"mpvd"] + 8)
    return _refused(f"a still image ({name})", _SEND_A_VIDEO)


def encrypted() -> UndecodableVideo:
    return UndecodableVideo(
        "the video is encrypted, as DRM does, and cannot be seen without its key; send it decrypted"
    )


def refusal(body: bytes) -> CaptionError:
    """What to say about a body that FFmpeg does not open."""
    if refused := _picture(body) or _segment(body) or _text(body):
        return refused
    for pattern, (what, fix) in _OTHERS.items():
        if re.match(pattern, body, re.DOTALL):
            return _refused(what, fix)
    if _ENCRYPTION.search(body):
        return encrypted()
    if _was_text(body):
        return _refused("a file that was read as text, which changes its bytes", "read it as binary, and send that")
    if _VIDEO.match(body):
        return UndecodableVideo(
            "the file starts like a video but its structure is damaged or cut short; send it again whole"
        )
    if behind := _VIDEO_BEHIND.search(body, 1, _MOST_BEFORE_BYTES):
        return _refused(f"a video behind {behind.start()} bytes of something else", _send_from(behind.start()))
    return _refused(f"no video in {_A_CONTAINER}", f"{_SEND_A_VIDEO}, or {CONVERT}")


def _picture(body: bytes) -> NotAVideo | None:
    for pattern, name in _ANIMATED.items():
        if re.match(pattern, body, re.DOTALL):
            return _refused(f"an animated {name} picture, which etenet does not read", "convert it to MP4 or GIF")
    for pattern, name in _PICTURES.items():
        if re.match(pattern, body, re.DOTALL):
            if name == "JPEG" and body.count(_NEXT_JPEG) > 3:
                return _refused(_BARE_STREAM, CONVERT)
            behind = _VIDEO_BEHIND.search(body) if name == "JPEG" else None
            if behind:
                return _motion_photo(name, behind.start())
            return _refused(f"a still image ({name})", _SEND_A_VIDEO)
    return None


def _motion_photo(name: str, video_at: int) -> NotAVideo:
    return _refused(f"a motion photo: a still image ({name}) with a video behind it", _send_from(video_at))


def _send_from(video_at: int) -> str:
    return f"send the video alone, for example after tail -c +{video_at + 1} FILE > clip.mp4"


def _segment(body: bytes) -> NotAVideo | None:
    if body.startswith(_WEBM_CLUSTER):
        return _refused("a segment of a WebM stream without its initialization segment", _SEND_BOTH)
    kinds = dict(_boxes(body)).keys()
    if kinds & _SEGMENT_BOXES and b"moov" not in kinds:
        return _refused("a segment of a DASH or HLS stream without its initialization segment", _SEND_BOTH)
    return None


def _text(body: bytes) -> NotAVideo | None:
    text = _decoded(body[:_HEAD_BYTES])
    if text is None:
        return None
    for pattern, (what, fix) in _TEXTS.items():
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return _refused(what, fix)
    in_base64 = _BASE64.match("".join(text.split()))
    if in_base64 and _VIDEO.match(b64decode(in_base64[1][: len(in_base64[1]) // 4 * 4], b"-_")):
        return _refused("a video in base64", _SEND_THE_FILE)
    return _refused(
        f"text ({text[:_SHOWN_LETTERS].rstrip()!r}), not a video in {_A_CONTAINER}",
        f"{_SEND_THE_FILE}, or as a form with curl -F data=@clip.mp4",
    )


def _decoded(head: bytes) -> str | None:
    """The text, without white space before it; None if these bytes are no text."""
    # Not utf-8-sig: a sandboxed process cannot import it.
    encoding, head = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8", head.removeprefix(_BOM)
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if len(head) < _HEAD_BYTES - len(_BOM) or error.start < len(head) - 4:
            return None
        text = head[: error.start].decode(encoding)  # only its last letter is cut
    return text.lstrip() if all(letter.isprintable() or letter.isspace() for letter in text) else None


def _was_text(body: bytes) -> bool:
    """Whether all of it is UTF-8, and not only ASCII, as no video is by chance."""
    try:
        return len(body) > _HEAD_BYTES and not body.isascii() and bool(body.decode())
    except UnicodeDecodeError:
        return False


def _boxes(body: bytes) -> Iterator[tuple[bytes, int]]:
    """The kind and the start of each of the first top-level boxes. Source: ISO/IEC 14496-12, 4.2."""
    start = 0
    for _ in range(_MOST_BOXES):
        size, kind = int.from_bytes(body[start : start + 4], "big"), body[start + 4 : start + 8]
        if size == 1:
            size = int.from_bytes(body[start + 8 : start + 16], "big")
        if len(kind) == 4:
            yield kind, start
        if size < 8:  # 0: up to the end of the file
            return
        start += size


def _refused(what: str, fix: str) -> NotAVideo:
    return NotAVideo(f"this is {what}; {fix}")
