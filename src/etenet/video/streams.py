"""Which of a file's video streams is the film. Decodes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from av.stream import Disposition
from av.video import VideoStream

from etenet.video.ffmpeg import DECODERS

_DEFAULT_FLAG_PX = 5_000_000


def without_covers(streams: Iterable[VideoStream]) -> list[VideoStream]:
    """All streams but cover art."""
    return [stream for stream in streams if not stream.disposition & Disposition.attached_pic]


def film_of(streams: Sequence[VideoStream], packet_counts: Mapping[int, int]) -> VideoStream:
    """The stream that FFmpeg's own command takes. A single picture, or a codec we do not read, is the last choice.

    Source: FFmpeg, `map_auto_video` in fftools/ffmpeg_mux_init.c. Of the streams with packets it is the largest, where
    the default flag counts as five million pixels; of equals, it is the first.
    """

    def rank(stream: VideoStream) -> tuple[bool, bool, int]:
        count, context = packet_counts[stream.index], stream.codec_context
        if not count or context is None:
            return False, False, 0
        extra_px = _DEFAULT_FLAG_PX if stream.disposition & Disposition.default else 0
        return context.codec.canonical_name in DECODERS, count > 1, context.width * context.height + extra_px

    return max(streams, key=rank)
