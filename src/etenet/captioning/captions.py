"""The captions of a video: values, and the JSON of the HTTP contract. Knows no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from etenet.captioning import html
from etenet.errors import CaptionError
from etenet.video.clip import ClipInfo
from etenet.video.segments import Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One sentence of the beam. `attention` has, per word, the weight of each of the 16 frames.

    `confidence` (0 to 1) is None if the checkpoint has no calibration, or one for a wider beam.
    """

    text: str
    log_prob: float
    confidence: float | None = None
    words: tuple[str, ...]
    word_probs: tuple[float, ...]
    attention: tuple[tuple[float, ...], ...]

    def summary(self) -> dict[str, Any]:
        """The sentence, and how sure the network is of all of it."""
        certain = {} if self.confidence is None else {"confidence": self.confidence}
        return {"caption": self.text, "log_prob": round(self.log_prob, 4), **certain}

    def as_dict(self, *, attention: bool) -> dict[str, Any]:
        fields = self.summary() | {
            "words": [
                {"word": word, "prob": round(prob, 4)} for word, prob in zip(self.words, self.word_probs, strict=True)
            ],
        }
        if attention:
            fields["attention"] = [[round(weight, 4) for weight in weights] for weights in self.attention]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds. `encode` and `search` are those of the whole batch, `total` from its start to its end.

    `cached`: the features were known, so this video took no part of `encode`.
    """

    decode: float
    encode: float
    search: float
    total: float
    cached: bool = False

    def as_dict(self) -> dict[str, Any]:
        stages = {"decode": self.decode, "encode": self.encode, "search": self.search, "total": self.total}
        return {name: round(ms, 1) for name, ms in stages.items()} | ({"cached": True} if self.cached else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """The sentences for one clip, or for one segment of a video; best first."""

    sentences: tuple[Sentence, ...]
    video: ClipInfo
    timing_ms: Timing
    min_confidence: float = 0.0
    thumbnails: tuple[bytes, ...] = ()  # a JPEG of each of the 16 frames, if they were asked for

    @property
    def text(self) -> str | None:
        """The best sentence; None if its confidence is lower than the one asked for."""
        best = self.sentences[0]
        return None if best.confidence is not None and best.confidence < self.min_confidence else best.text

    def as_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """The response of the HTTP contract, except `model`, which only the server knows."""
        return {**self._fields(attention), "video": _video(self.video), "timing_ms": self.timing_ms.as_dict()}

    def as_segment(self, *, attention: bool = False) -> dict[str, Any]:
        """One of the `segments` of the HTTP contract, in seconds from the first frame."""
        times = {"start_s": round(self.video.start_s, 3), "end_s": round(self.video.end_s, 3)}
        return {**times, **self._fields(attention)}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html.of_caption(self, [jpeg_url(thumbnail) for thumbnail in self.thumbnails])

    def _fields(self, attention: bool) -> dict[str, Any]:
        times_s = [round(time_s, 3) for time_s in self.video.times_s]
        frames: dict[str, Any] = {"times_s": times_s, "decoded": self.video.distinct_frames}
        if self.thumbnails:
            frames["thumbnails"] = [jpeg_url(thumbnail) for thumbnail in self.thumbnails]
        return {
            "caption": self.text,
            "captions": [sentence.as_dict(attention=attention) for sentence in self.sentences],
            "frames": frames,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCaptions:
    """The captions of the segments of one video, in order."""

    segments: tuple[Caption, ...]

    def as_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """The response of the HTTP contract to a request for segments."""
        first = self.segments[0]
        return {
            "segments": [caption.as_segment(attention=attention) for caption in self.segments],
            "video": _video(first.video),
            "timing_ms": first.timing_ms.as_dict(),
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html.of_segments(self.segments)


def jpeg_url(jpeg: bytes) -> str:
    """A picture as a URL that `<img src>` takes. Source: RFC 2397."""
    return f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"


Outcome: TypeAlias = Caption | SegmentCaptions | CaptionError


def outcome_of(segments: Sequence[Caption | CaptionError], cut: Cut) -> Outcome:
    """The outcome of a video from those of its segments: the error of one is the error of all."""
    for segment in segments:
        if isinstance(segment, CaptionError) or not cut.into_segments:
            return segment
    return SegmentCaptions(segments=tuple(segment for segment in segments if isinstance(segment, Caption)))


def _video(video: ClipInfo) -> Mapping[str, Any]:
    return {
        "codec": video.codec,
        "width": video.width_px,
        "height": video.height_px,
        "duration_s": round(video.duration_s, 3),
        "start_s": round(video.picture_start_s, 3),
    }
