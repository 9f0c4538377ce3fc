"""A decoded frame -> a small upright picture. Knows one frame and those beside it, nothing of clips."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from etenet.errors import UndecodableVideo
from etenet.video.deinterlacing import Window, deinterlaced, without_flag
from etenet.video.filters import filtered
from etenet.video.presentation import UNCROPPED, Crop
from etenet.video.tone_mapping import is_hdr, to_sdr

# Code points of ITU-T H.273 for the matrix between YUV and RGB.
_COLOUR_SPACE_UNKNOWN, _COLOUR_SPACE_BT2020 = 2, 9
_COLOUR_SPACES_THAT_SWSCALE_KNOWS = frozenset({0, 1, 2, 4, 5, 6, 7, 9})


class Resizer:
    """Frames of one clip -> RGB pictures (size_px, size_px, 3) uint8, by one scaler that is made once."""

    def __init__(self, crop: Crop = UNCROPPED) -> None:
        self.crop = crop
        self._reformatter = VideoReformatter()

    def upright(self, window: Window, size_px: int) -> tuple[NDArray[np.uint8], bool]:
        """As a player shows it: deinterlaced, cropped, in SDR, rotated and mirrored by the display matrix.

        Also whether it was turned by a quarter.
        """
        try:
            frame = self._cropped(deinterlaced(window))
            hdr = is_hdr(frame.color_trc)
            small = self._resized(frame, size_px, "rgb48le" if hdr else "rgb24")
        except av.FFmpegError as error:
            raise _unreadable(window.frame, error) from error
        pixels = _pixels(small)
        if hdr:
            pixels = to_sdr(pixels, transfer=frame.color_trc, primaries=frame.color_primaries)
        return _upright(pixels, small)

    def as_coded(self, frame: av.VideoFrame, size_px: int) -> NDArray[np.uint8]:
        """For comparisons between frames: whatever else a player does to them changes no scene."""
        try:
            return _pixels(self._resized(without_flag(frame), size_px, "rgb24"))
        except av.FFmpegError as error:
            raise _unreadable(frame, error) from error

    def _cropped(self, frame: av.VideoFrame) -> av.VideoFrame:
        """As FFmpeg's own command does: at even places where the chroma is subsampled."""
        if not self.crop:
            return frame
        width, height = self.crop.of(frame.width, frame.height)
        return next(filtered([frame], "crop", f"{width}:{height}:{self.crop.left}:{self.crop.top}"))

    def _resized(self, frame: av.VideoFrame, size_px: int, pixel_format: str) -> av.VideoFrame:
        if frame.colorspace not in _COLOUR_SPACES_THAT_SWSCALE_KNOWS:
            frame.colorspace = _COLOUR_SPACE_UNKNOWN
        if frame.colorspace == _COLOUR_SPACE_UNKNOWN and is_hdr(frame.color_trc):
            frame.colorspace = _COLOUR_SPACE_BT2020
        return self._reformatter.reformat(
            frame,
            width=size_px,
            height=size_px,
            format=pixel_format,
            interpolation=Interpolation.BILINEAR,
            threads=1,
        )


def _unreadable(frame: av.VideoFrame, error: av.FFmpegError) -> UndecodableVideo:
    check_memory(error, (frame.width, frame.height))
    return UndecodableVideo(f"pictures of the kind {frame.format.name} cannot be read; use yuv420p")


def check_memory(error: av.FFmpegError, size_px: tuple[int, int]) -> None:
    """Raises `MemoryError` if an error of FFmpeg means that.

    H.264's decoder reports invalid data if there is no memory for a picture, so we try to allocate as much.
    """
    if isinstance(error, MemoryError):
        raise error
    np.empty((*size_px, 3), np.uint16)


def _pixels(frame: av.VideoFrame) -> NDArray[Any]:
    """Of an RGB frame, (height, width, 3)."""
    return frame.to_ndarray()


def _upright(pixels: NDArray[np.uint8], small: av.VideoFrame) -> tuple[NDArray[np.uint8], bool]:
    """Apply the display matrix, rounded to quarter turns, to a square picture; also whether width became height.

    The matrix is read from the small frame: reading `side_data` makes a reference cycle, so the frame lives until the
    garbage collector runs.
    Source: ISO/IEC 14496-12, 8.5.3: a point (x, y) is shown at (a x + c y, b x + d y).
    """
    try:
        matrix = bytes(small.side_data["DISPLAYMATRIX"])  # type: ignore[typeddict-item]  # a gap in the stub
    except KeyError:
        return pixels, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32, count=5).tolist()
    turned = abs(b) > abs(a)
    if turned:
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1], turned
