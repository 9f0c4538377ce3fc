"""What FFmpeg may do: the containers and codecs that it may read, and the versions that are trusted with them."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import av

from etenet.errors import UsageError

CONTAINERS = ("mov", "mp4", "3gp", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "gif")
DECODERS = (
    *("h264", "hevc", "vvc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "h263"),
    *("mjpeg", "flv1", "wmv1", "wmv2", "wmv3", "vc1", "gif"),
)

# Before 8.1, encryption data of a mov file make FFmpeg write out of bounds (CVE-2026-40962). Every PyAV that
# pyproject.toml allows carries 8.1.2 in its wheels; one that was built from source carries what it was built with.
OLDEST_FFMPEG = "8.1.2"
_OLDEST_LIBRARIES = {"libavformat": (62, 12, 102), "libavcodec": (62, 28, 102), "libswscale": (9, 5, 102)}

_DECODER_NAMES = {"av1": "libdav1d", "flv1": "flv"}  # where decoder and codec have different names
CODEC_WHITELIST = ",".join(_DECODER_NAMES.get(codec, codec) for codec in DECODERS)
# These bind the decoders that probe a container. `decoder.py` binds the decoder that is used.
OPEN_OPTIONS = {
    "protocol_whitelist": "none",
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": CODEC_WHITELIST,
    "max_streams": "100",
    "probesize": "5000000",  # bytes
    "analyzeduration": "5000000",  # microseconds
}

# A clip is not refused because its tags are not UTF-8. PyAV 19 accepts such tags and has no such argument.
LENIENT_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def require_supported_ffmpeg() -> str:
    """The version of FFmpeg. Raises `UsageError` if it is older than the one that these rules were tested with."""
    for library, oldest in _OLDEST_LIBRARIES.items():
        found = av.library_versions[library]
        if found < oldest:
            raise UsageError(
                f"{library} {'.'.join(map(str, found))} is older than FFmpeg {OLDEST_FFMPEG}, whose fixes are "
                "needed against hostile clips (CVE-2026-40962): pip install --upgrade --only-binary av av"
            )
    return str(av.ffmpeg_version_info)


def import_all_of_pyav() -> None:
    """PyAV imports some parts when a file first needs them. A sandboxed process cannot import anything later."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


def missing_decoders() -> list[str]:
    """Decoders of the allow-list that this build of FFmpeg lacks."""
    return [name for name in DECODERS if not _can_decode(name)]


def _can_decode(name: str) -> bool:
    try:
        return bool(av.Codec(_DECODER_NAMES.get(name, name), "r").is_decoder)
    except ValueError:
        return False
