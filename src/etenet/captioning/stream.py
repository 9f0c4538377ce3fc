"""Many videos -> an outcome for each: decoding, encoding and searching overlap.

The one schedule of these steps, for a batch of requests as for a job of a million files. Knows no network: the steps
are those of whoever calls (`captioner.py`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Generic, Protocol, TypeVar

from etenet.captioning.captions import Caption, Outcome, Sentence, Timing, outcome_of
from etenet.captioning.options import CaptionOptions
from etenet.errors import BadOption, CaptionError, InternalError, Overloaded, UsageError
from etenet.video.clip import Clip

JOB_DECODE_TRIES = 3

_log = logging.getLogger(__name__)

KeyT = TypeVar("KeyT", bound=Hashable)
OnCaption = Callable[[KeyT, Caption], None]
"""Called with a video's key and the caption of each of its segments, in order, each as soon as it is there."""


@dataclass(frozen=True, slots=True)
class Stage(Generic[KeyT]):
    """What was done at a time: decode (with the wait for a decoder), encode or search. Times are of `perf_counter`."""

    name: str
    videos: frozenset[KeyT]  # their keys
    began_s: float
    ended_s: float


OnStage = Callable[[Stage[KeyT]], None]


@dataclass(frozen=True, slots=True)
class Video(Generic[KeyT]):
    """A video to caption. `key` names it in the output, and no other video of its stream has the same.

    `fresh`: it is decoded and encoded even if it is known. Raises `UsageError` if the body is not bytes.
    """

    key: KeyT
    body: bytes
    options: CaptionOptions
    fresh: bool = False

    def __post_init__(self) -> None:
        try:
            memoryview(self.body)
        except TypeError as error:
            kind = type(self.body).__name__
            raise UsageError(
                f"a video is given as its bytes, not as a {kind}; read its file first: Path('clip.mp4').read_bytes()"
            ) from error


@dataclass(frozen=True, slots=True)
class EncodedClip(Clip):
    """A clip whose features are known. It may have no frames."""

    features: Any


class Steps(Protocol):
    """From bytes to sentences. Clips go by numbers; one that a step fails on is missing in the result."""

    def refusal(self, options: CaptionOptions) -> BadOption | None:
        """Why videos with these options are not even decoded; None if they are."""

    def decode(self, video: Video[Any]) -> Future[list[Clip]]: ...

    def encode(self, clips: Mapping[int, Clip]) -> Mapping[int, Any]:
        """Clips -> features."""

    def search(
        self, features: Mapping[int, Any], options: Mapping[int, CaptionOptions]
    ) -> Mapping[int, tuple[Sentence, ...]]: ...

    def thumbnails(self, clip: Clip, options: CaptionOptions) -> tuple[bytes, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How far the steps run ahead of each other.

    Clips are encoded once `encode_clips` are decoded, at most `max_batch` at a time, and searched once `search_clips`
    are encoded, or when no further ones are on their way. While `max_clips` clips are on their way, or bodies of
    `max_bytes` are decoded, no further video is taken. With `continue_cuts`, the segments beyond the `max_segments` of
    a cut are decoded after those before. A video that the machine was too busy to decode is decoded `decode_tries`
    times in all.
    """

    encode_clips: float = 1
    search_clips: float = math.inf
    max_batch: int | None = None
    max_clips: float = math.inf
    max_bytes: float = math.inf
    continue_cuts: bool = False
    decode_tries: int = 1


Accept = Callable[[list[Clip], int], list[Clip] | CaptionError]
"""Called with the clips of a video and how many videos are still being decoded: the clips, or why they are refused."""


@dataclass(slots=True)
class _Decoding(Generic[KeyT]):
    """A video that is being decoded, and since when (perf_counter)."""

    video: Video[KeyT]
    began_s: float
    ended_s: float | None = None

    def end(self, _: Future[list[Clip]]) -> None:
        self.ended_s = time.perf_counter()

    @property
    def stage(self) -> Stage[KeyT]:
        """Once it is decoded; the callback that says when may come a moment later."""
        return Stage("decode", frozenset((self.video.key,)), self.began_s, self.ended_s or time.perf_counter())


@dataclass(frozen=True, slots=True)
class _Part(Generic[KeyT]):
    """A clip on its way, or the error of its video."""

    video: Video[KeyT]
    clip: Clip | CaptionError
    is_last: bool  # of its video


def caption_videos(
    steps: Steps,
    videos: Iterable[Video[KeyT]],
    schedule: Schedule,
    *,
    accept: Accept = lambda clips, _: clips,
    on_caption: OnCaption[KeyT] = lambda *_: None,
    on_stage: OnStage[KeyT] = lambda _: None,
) -> Iterator[tuple[KeyT, Outcome]]:
    """One outcome per video, by its key, in the order in which they are ready.

    Raises `UsageError` for a video with the key of another that is on its way.
    """
    started, encode_s = time.perf_counter(), 0.0
    captions: dict[KeyT, list[Caption | CaptionError]] = {}
    unread, more, numbers = _with_keys_of_their_own(videos, captions), True, count()
    unfinished: deque[Video[KeyT]] = deque()
    held_up: Counter[KeyT] = Counter()
    decoding: dict[Future[list[Clip]], _Decoding[KeyT]] = {}
    decoded: dict[int, _Part[KeyT]] = {}
    encoded: dict[int, _Part[KeyT]] = {}
    features: dict[int, Any] = {}

    def has_room() -> bool:
        held_bytes = sum(len(each.video.body) for each in decoding.values())
        clips = len(decoding) + len(decoded) + len(encoded)
        return clips < schedule.max_clips and (not decoding or held_bytes < schedule.max_bytes)

    while True:
        while (unfinished or more) and has_room():
            video = unfinished.popleft() if unfinished else next(unread, None)
            if video is None:
                more = False
            elif refusal := steps.refusal(video.options):
                decoded[next(numbers)] = _Part(video, refusal, is_last=True)
            else:
                under_way = _Decoding(video, time.perf_counter())
                future = steps.decode(video)
                future.add_done_callback(under_way.end)
                decoding[future] = under_way
        if encoded and (len(encoded) >= schedule.search_clips or not (decoded or decoding)):
            clips = _clips(encoded)
            options = {number: encoded[number].video.options for number in clips}
            began = time.perf_counter()
            of_clips = captions_of(steps, clips, features, options, encode_s=encode_s, started=started)
            on_stage(Stage("search", _keys(encoded), began, time.perf_counter()))
            for number, part in encoded.items():
                key, of_clip = part.video.key, part.clip if isinstance(part.clip, CaptionError) else of_clips[number]
                captions[key].append(of_clip)
                if isinstance(of_clip, Caption):
                    on_caption(key, of_clip)
                if part.is_last:
                    yield key, outcome_of(captions.pop(key), part.video.options.cut)
            encoded, features, encode_s = {}, {}, 0.0
        elif decoded and (len(decoded) >= schedule.encode_clips or not decoding):
            began = time.perf_counter()
            batch = dict(islice(decoded.items(), schedule.max_batch))
            features |= steps.encode(_clips(batch))
            ended = time.perf_counter()
            on_stage(Stage("encode", _keys(batch), began, ended))
            encode_s += ended - began
            encoded |= batch
            decoded = {number: part for number, part in decoded.items() if number not in batch}
        elif decoding:
            done, _ = wait(decoding, return_when=FIRST_COMPLETED)
            for future in done:
                under_way = decoding.pop(future)
                on_stage(under_way.stage)
                video = under_way.video
                without_body = replace(video, body=b"")
                result = _decoded_by(future)
                if isinstance(result, Overloaded):
                    held_up[video.key] += 1
                    if held_up[video.key] < schedule.decode_tries:
                        unfinished.append(video)
                        continue
                held_up.pop(video.key, None)
                if not isinstance(result, CaptionError):
                    result = accept(result, len(decoding))
                if isinstance(result, CaptionError):
                    decoded[next(numbers)] = _Part(without_body, result, is_last=True)
                    continue
                rest = None
                if schedule.continue_cuts:
                    rest = video.options.cut.rest(result[-1].info.end_s, result[-1].info.duration_s)
                for clip in result:
                    decoded[next(numbers)] = _Part(without_body, clip, is_last=clip is result[-1] and rest is None)
                if rest:
                    unfinished.append(replace(video, options=replace(video.options, cut=rest)))
        else:
            return


def _with_keys_of_their_own(
    videos: Iterable[Video[KeyT]], captions: dict[KeyT, list[Caption | CaptionError]]
) -> Iterator[Video[KeyT]]:
    """The videos, each with an empty list for its captions."""
    for video in videos:
        if video.key in captions:
            raise UsageError(
                f"two videos have the key {video.key!r}, so their captions would be mixed; give each a key of its own"
            )
        captions[video.key] = []
        yield video


def captions_of(
    steps: Steps,
    clips: Mapping[int, Clip],
    features: Mapping[int, Any],
    options: Mapping[int, CaptionOptions],
    *,
    encode_s: float,
    started: float,
) -> dict[int, Caption | CaptionError]:
    """Features -> captions, by the number of their clip. `started` is when the work on them began (perf_counter)."""
    began = time.perf_counter()
    sentences = steps.search(features, options) if features else {}
    now = time.perf_counter()
    captions: dict[int, Caption | CaptionError] = {}
    for number, clip in clips.items():
        timing = Timing(
            decode=clip.info.decode_ms,
            encode=1000 * encode_s,
            search=1000 * (now - began),
            total=1000 * (now - started),
            cached=isinstance(clip, EncodedClip),
        )
        captions[number] = (
            Caption(
                sentences=sentences[number],
                video=clip.info,
                timing_ms=timing,
                min_confidence=options[number].min_confidence,
                thumbnails=steps.thumbnails(clip, options[number]),
            )
            if number in sentences
            else InternalError("the network gave no caption for this clip; the log says why")
        )
    return captions


def _decoded_by(future: Future[list[Clip]]) -> list[Clip] | CaptionError:
    """The result of `Steps.decode`. An unexpected error is logged and becomes an `InternalError`."""
    try:
        return future.result()
    except CaptionError as error:
        return error.without_frames()
    except Exception:
        _log.exception("decoding failed because of a bug in etenet")
        return InternalError("the video could not be decoded because of a bug in the server")


def _keys(parts: Mapping[int, _Part[KeyT]]) -> frozenset[KeyT]:
    """Of the videos that have clips among the parts."""
    return frozenset(part.video.key for part in parts.values() if isinstance(part.clip, Clip))


def _clips(parts: Mapping[int, _Part[KeyT]]) -> dict[int, Clip]:
    return {number: part.clip for number, part in parts.items() if isinstance(part.clip, Clip)}
