"""The frames of a clip -> small JPEGs. Runs outside the decoder processes: the pixels are ours, not a client's."""

from __future__ import annotations

from fractions import Fraction

import av
from av.video.reformatter import Interpolation

from etenet.video.clip import Clip

# FFmpeg's scale from 2 to 31. At 5, all frames of the longest response fit into TorchServe's max_response_size even if
# they show noise.
_QUANTISER = 5


def thumbnails(clip: Clip, *, longer_px: int) -> tuple[bytes, ...]:
    """A JPEG of each frame, in the shape that players show, whose longer side has `longer_px` pixels."""
    aspect = clip.info.shown_aspect
    encoder = av.VideoCodecContext.create("mjpeg", "w")
    encoder.width = max(1, round(longer_px * min(1, aspect)))
    encoder.height = max(1, round(longer_px / max(1, aspect)))
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = "yuvj420p", Fraction(1), 1
    encoder.qmin = encoder.qmax = _QUANTISER
    jpegs = []
    for number, pixels in enumerate(clip.frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            encoder.width, encoder.height, "yuvj420p", interpolation=Interpolation.AREA, threads=1
        )
        frame.pts, frame.time_base = number, encoder.time_base
        jpegs += encoder.encode(frame)
    return tuple(map(bytes, [*jpegs, *encoder.encode()]))
