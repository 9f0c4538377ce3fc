"""Features by content: a video that comes again is neither decoded nor encoded, only searched.

It is the same if its bytes are (SHA-256) and if it is cut in the same way, because nothing else decides about frames. A
cache belongs to one captioner, and so to one checkpoint. What failed is not kept: it may succeed when it comes again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from etenet import metrics
from etenet.captioning.captions import Sentence
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import EncodedClip, Steps, Video
from etenet.errors import BadOption
from etenet.runtime.interface import Features
from etenet.video.clip import Clip, ClipInfo
from etenet.video.segments import Cut

DEFAULT_BYTES = 256 * 2**20

_OBJECTS_BYTES = 4096  # about what a clip takes beside its features
_NO_FRAMES = np.empty((0, 0, 0, 3), np.uint8)

_Key = tuple[bytes, Cut]
_X = TypeVar("_X")
_Y = TypeVar("_Y")


@dataclass(frozen=True, slots=True)
class _Features:
    """Of one clip: features (L, D), in the memory of the CPU, from where every network takes them."""

    info: ClipInfo
    features: NDArray[np.float32]

    @classmethod
    def kept(cls, info: ClipInfo, features: Features) -> _Features:
        """A copy: the features may be a view of those of a whole batch."""
        return cls(info, np.array(features if isinstance(features, np.ndarray) else features.cpu().numpy()))

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + _OBJECTS_BYTES

    def of(self, clip: Clip) -> EncodedClip:
        return EncodedClip(clip.frames, clip.info, self.features)


class FeatureCache:
    """The videos that were captioned last, up to `max_bytes`. Serves any number of threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._videos: OrderedDict[_Key, tuple[_Features, ...]] = OrderedDict()  # the least recently used first
        self._bytes = 0

    def get(self, key: _Key) -> tuple[_Features, ...]:
        """Those of all segments of a video; empty if it is unknown."""
        with self._lock:
            segments = self._videos.get(key, ())
            if segments:
                self._videos.move_to_end(key)
        (metrics.FEATURE_CACHE_HITS if segments else metrics.FEATURE_CACHE_MISSES).inc()
        return segments

    def put(self, key: _Key, segments: tuple[_Features, ...]) -> None:
        """Not if they alone take more than all may."""
        if _nbytes(segments) > self.max_bytes:
            return
        with self._lock:
            before = self._bytes
            self._bytes += _nbytes(segments) - _nbytes(self._videos.pop(key, ()))
            self._videos[key] = segments
            while self._bytes > self.max_bytes:
                _, oldest = self._videos.popitem(last=False)
                self._bytes -= _nbytes(oldest)
            metrics.FEATURE_CACHE_BYTES.inc(self._bytes - before)


def _nbytes(segments: tuple[_Features, ...]) -> int:
    return sum(features.nbytes for features in segments)


@dataclass(frozen=True, slots=True)
class _NewVideo:
    """A video whose segments are being encoded: `features` by their numbers."""

    key: _Key
    count: int
    features: dict[int, _Features] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _NewClip(Clip):
    """A segment of it."""

    video: _NewVideo
    number: int


class CachedSteps:
    """Other steps, of which videos in a cache take only the last. `Steps` of the schedule."""

    def __init__(self, steps: Steps, cache: FeatureCache) -> None:
        self._steps, self._cache = steps, cache

    def refusal(self, options: CaptionOptions) -> BadOption | None:
        return self._steps.refusal(options)

    def decode(self, video: Video[Any]) -> Future[list[Clip]]:
        """A known video is decoded only if its frames are asked for."""
        if video.fresh:
            return self._steps.decode(video)
        key = hashlib.sha256(video.body).digest(), video.options.cut
        known = self._cache.get(key)
        if known and not video.options.thumbnails:
            decoded: Future[list[Clip]] = Future()
            decoded.set_result([each.of(Clip(_NO_FRAMES, replace(each.info, decode_ms=0.0))) for each in known])
            return decoded
        return _changed(self._steps.decode(video), partial(_known, known) if known else partial(_new, key))

    def encode(self, clips: Mapping[int, Clip]) -> Mapping[int, Any]:
        known = {number: clip.features for number, clip in clips.items() if isinstance(clip, EncodedClip)}
        encoded = self._steps.encode({number: clip for number, clip in clips.items() if number not in known})
        for number, features in encoded.items():
            if isinstance(clip := clips[number], _NewClip):
                video = clip.video
                video.features[clip.number] = _Features.kept(clip.info, features)
                if len(video.features) == video.count:
                    self._cache.put(video.key, tuple(video.features[segment] for segment in range(video.count)))
        return {**known, **encoded}

    def search(
        self, features: Mapping[int, Any], options: Mapping[int, CaptionOptions]
    ) -> Mapping[int, tuple[Sentence, ...]]:
        return self._steps.search(features, options)

    def thumbnails(self, clip: Clip, options: CaptionOptions) -> tuple[bytes, ...]:
        return self._steps.thumbnails(clip, options)


def _known(known: tuple[_Features, ...], clips: list[Clip]) -> list[Clip]:
    return [each.of(clip) for each, clip in zip(known, clips, strict=True)]


def _new(key: _Key, clips: list[Clip]) -> list[Clip]:
    video = _NewVideo(key, len(clips))
    return [_NewClip(clip.frames, clip.info, video, number) for number, clip in enumerate(clips)]


def _changed(future: Future[_X], change: Callable[[_X], _Y]) -> Future[_Y]:
    """The same future with another result, or with the same error. An error of `change` is one of it, too."""
    changed: Future[_Y] = Future()

    def finish(done: Future[_X]) -> None:
        try:
            changed.set_result(change(done.result()))
        except BaseException as error:  # or whoever waits for it would wait for ever
            changed.set_exception(error)

    future.add_done_callback(finish)
    return changed
