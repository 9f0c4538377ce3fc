"""EtENet: video captioning, from bytes to a sentence (arXiv 1904.02628).

>>> import etenet
>>> captioner = etenet.load("model_store/real.pt")  # doctest: +SKIP
>>> captioner.caption(open("clip.mp4", "rb").read()).text  # doctest: +SKIP
'a dog is running past on the beach'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etenet.captioning.captioner import Captioner, load
    from etenet.captioning.captions import Caption, SegmentCaptions, Sentence
    from etenet.captioning.options import CaptionOptions
    from etenet.errors import CaptionError, EtenetError
    from etenet.video.limits import DecodeLimits
    from etenet.video.segments import Cut

    __version__: str

_HOMES = {
    "etenet.captioning.captioner": ("Captioner", "load"),
    "etenet.captioning.captions": ("Caption", "SegmentCaptions", "Sentence"),
    "etenet.captioning.options": ("CaptionOptions",),
    "etenet.errors": ("CaptionError", "EtenetError"),
    "etenet.video.limits": ("DecodeLimits",),
    "etenet.video.segments": ("Cut",),
}

__all__ = [
    "Caption",
    "CaptionError",
    "CaptionOptions",
    "Captioner",
    "Cut",
    "DecodeLimits",
    "EtenetError",
    "SegmentCaptions",
    "Sentence",
    "load",
]


if not TYPE_CHECKING:  # or a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        """Import a public name on first use: a decoder process needs no torch, and most programs no version."""
        if name == "__version__":
            from importlib.metadata import version

            return version("etenet")
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What Tab completes, before its first use, too."""
    return [*globals(), *__all__]
