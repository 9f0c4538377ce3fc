"""Many videos, one after the other -> what is said about each: some are decoded while others are encoded."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from etenet.captioning.captioner import Captioner, decoded_by
from etenet.captioning.captions import Caption, Outcome, outcome_of
from etenet.captioning.options import CaptionOptions
from etenet.errors import CaptionError
from etenet.video.sampling import SampledVideo
from etenet.video.segments import Cut

HELD_BYTES = 256 * 2**20  # of bodies: beyond that no further one is asked for
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class _Ready(Generic[KeyT]):
    """A clip, or a segment, that waits for its batch; or what is wrong with it."""

    key: KeyT
    decoded: SampledVideo | CaptionError
    cut: Cut
    is_last: bool  # of its video


def caption_stream(
    captioner: Captioner,
    videos: Iterable[tuple[KeyT, bytes, Cut]],
    options: CaptionOptions,
    *,
    batch_clips: int = 8,
    reached: Callable[[KeyT, float, float], None] = lambda *_: None,
) -> Iterator[tuple[KeyT, Outcome]]:
    """One outcome per video, by its key, as they come; full batches are encoded while the next are decoded.

    A video of more segments than its cut's `max_segments` is decoded so many at a time. Asks for videos as it has
    room: a batch is in memory at most, and another or one video for each core, and fewer where they are large.
    `reached` hears of a video, while it is not whole, until when it is captioned, and how long it is.
    """
    unread, more = iter(videos), True
    unfinished: deque[tuple[KeyT, bytes, Cut]] = deque()
    decoding: dict[Future[list[SampledVideo]], tuple[KeyT, bytes, Cut]] = {}
    ready: deque[_Ready[KeyT]] = deque()
    captions: defaultdict[KeyT, list[Caption | CaptionError]] = defaultdict(list)
    most = batch_clips + max(batch_clips, os.cpu_count() or 1)

    def has_room() -> bool:
        held_bytes = sum(len(body) for _, body, _ in decoding.values())
        return len(decoding) + len(ready) < most and (not decoding or held_bytes < HELD_BYTES)

    while True:
        while (unfinished or more) and has_room():
            video = unfinished.popleft() if unfinished else next(unread, None)
            if video is None:
                more = False
            else:
                _, body, cut = video
                decoding[captioner.decode(body, cut)] = video
        if len(ready) >= batch_clips or (ready and not decoding):
            batch = [ready.popleft() for _ in range(min(batch_clips, len(ready)))]
            captioned = captioner.caption_decoded([clip.decoded for clip in batch], options)
            for clip, caption in zip(batch, captioned, strict=True):
                captions[clip.key].append(caption)
                if clip.is_last:
                    yield clip.key, outcome_of(captions.pop(clip.key), clip.cut)
                elif isinstance(caption, Caption):
                    reached(clip.key, caption.video.end_s, caption.video.duration_s)
        elif decoding:
            done, _ = wait(decoding, return_when=FIRST_COMPLETED)
            for future in done:
                key, body, cut = decoding.pop(future)
                segments = decoded_by(future)
                if isinstance(segments, CaptionError):
                    ready.append(_Ready(key, segments, cut, is_last=True))
                    continue
                rest = cut.rest(segments[-1].end_s, segments[-1].duration_s)
                ends = [*[False] * (len(segments) - 1), rest is None]
                ready.extend(_Ready(key, one, cut, is_last=end) for one, end in zip(segments, ends, strict=True))
                if rest:
                    unfinished.append((key, body, rest))
        else:
            return
