"""Videos on their way through decoding, encoding and searching: what is held of them, and their keys."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Schedule, Video, caption_videos
from etenet.errors import UndecodableVideo, UsageError
from etenet.video.clip import Clip

BODY_BYTES = 4 * 2**20
VIDEOS = 32


def damaged(_: Video[int]) -> Future[list[Clip]]:
    future: Future[list[Clip]] = Future()
    future.set_exception(UndecodableVideo("damaged"))
    return future


STEPS: Any = SimpleNamespace(refusal=lambda _: None, decode=damaged, encode=lambda _: {}, search=lambda *_: {})


def test_the_body_of_a_video_is_held_only_until_it_is_decoded() -> None:
    def videos() -> Iterator[Video[int]]:
        for number in range(VIDEOS):
            yield Video(number, bytes(BODY_BYTES), CaptionOptions())

    tracemalloc.start()
    try:
        outcomes = list(caption_videos(STEPS, videos(), Schedule(encode_clips=8, max_bytes=BODY_BYTES)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(outcomes) == VIDEOS
    assert peak_bytes < 4 * BODY_BYTES


def test_two_videos_with_one_key_are_refused_while_they_would_be_mixed() -> None:
    video = Video("film", b"", CaptionOptions())
    with pytest.raises(UsageError, match="two videos have the key 'film'"):
        list(caption_videos(STEPS, [video, video], Schedule(encode_clips=8)))
    one_after_the_other = caption_videos(STEPS, [video, video], Schedule(max_clips=1))
    assert [key for key, _ in one_after_the_other] == ["film", "film"]
