"""How a container says that its pictures are shown: what to crop, and as which kind of Dolby Vision.

PyAV gives neither, but FFmpeg prints both about every container, so its text is read.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from av import logging
from av.container import InputContainer

from etenet.errors import UndecodableVideo

# FFmpeg's lines about a stream. Tags cannot look like them: a line break in a tag becomes an indented colon.
_STREAM = re.compile(r"^ +Stream #0:(\d+)", re.MULTILINE)
_CROP = re.compile(r"^ +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)$", re.MULTILINE | re.IGNORECASE)
_DOLBY_VISION = re.compile(r"^ +DOVI configuration record: .*profile: (\d+),.* compatibility id: (\d+)", re.MULTILINE)

_LEAST_PX = 4  # the chroma of some formats has a pixel for four
_log_level = threading.Lock()  # of PyAV, for all threads


@dataclass(frozen=True, slots=True)
class Crop:
    """Pixels that are not shown, at each side of a decoded picture before it is rotated."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return self != UNCROPPED

    def of(self, width_px: int, height_px: int) -> tuple[int, int]:
        """The size of what is left. Raises `UndecodableVideo` if that is not a picture."""
        if not self:
            return width_px, height_px
        shown = width_px - self.left - self.right, height_px - self.top - self.bottom
        if min(shown) < _LEAST_PX:
            raise UndecodableVideo(
                f"the file crops its {width_px} x {height_px} pixels to {shown[0]} x {shown[1]}; correct its header"
            )
        return shown


UNCROPPED = Crop()


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a container says about a stream, beside the stream itself."""

    crop: Crop = UNCROPPED
    needs_dolby_vision: bool = False  # its base layer has colours that nothing else can show


def presentation(container: InputContainer, stream_index: int) -> Presentation:
    """Matroska's PixelCrop, MP4's `clap`, and the configuration record of Dolby Vision, wherever it stands."""
    text = _described(container)
    starts = [found for found in _STREAM.finditer(text) if int(found[1]) == stream_index]
    if not starts:
        return Presentation()
    following = _STREAM.search(text, starts[0].end())
    about = text[starts[0].start() : following.start() if following else None]
    crop, dolby = _CROP.search(about), _DOLBY_VISION.search(about)
    return Presentation(
        crop=Crop(*map(int, crop.groups())) if crop else UNCROPPED,
        needs_dolby_vision=dolby is not None and _base_layer_is_unviewable(*map(int, dolby.groups())),
    )


def _base_layer_is_unviewable(profile: int, compatibility: int) -> bool:
    """Source: Dolby Vision Profiles and Levels, table 2: profiles 5, 10.0 and 20.0. Others have an HDR or SDR base."""
    return profile == 5 or (profile in (10, 20) and compatibility == 0)


def _described(container: InputContainer) -> str:
    with _log_level:
        before = logging.get_level()
        logging.set_level(logging.INFO)  # otherwise PyAV drops the text
        try:
            return str(container.dumps_format())  # type: ignore[attr-defined]  # a gap in the stub
        finally:
            logging.set_level(before)
