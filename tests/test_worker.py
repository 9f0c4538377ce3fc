"""The reply of a decoder process, computed in this process: clips over the body, or what is wrong with the video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from etenet.sandbox import worker
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_segments
from etenet.video.segments import WHOLE, Cut
from tests import clips

SIZE_PX = 64
LIMITS = DecodeLimits(max_memory_bytes=256 * 2**20)


def reply_to(body: bytes, cut: Cut = WHOLE) -> tuple[Mapping[str, Any], bytes]:
    """The reply, and what the memory file holds afterwards."""
    file = os.memfd_create("clip")
    try:
        os.pwrite(file, body, 0)
        request = {"body_bytes": len(body), "cut": asdict(cut)}
        reply = worker._reply(file, request, SIZE_PX, LIMITS, None)
        return reply, os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)


def test_the_clips_of_all_segments_are_written_over_the_body() -> None:
    body, cut = clips.video(100), Cut(segment_s=1.5)
    reply, memory = reply_to(body, cut)
    expected = sample_segments(body, cut, resize_px=SIZE_PX)
    assert len(expected) == 3
    frames = np.frombuffer(memory, np.uint8, count=len(expected) * expected[0].frames.size)
    np.testing.assert_array_equal(frames, np.concatenate([clip.frames.ravel() for clip in expected]))
    infos = [{**fields, "decode_ms": 0} for fields in reply["clips"]]
    assert infos == [asdict(replace(clip.info, decode_ms=0)) for clip in expected]


def test_an_error_is_named_with_its_message() -> None:
    reply, _ = reply_to(b"not a video")
    assert reply["error"] == "NotAVideo"
    assert "a container that etenet reads" in reply["message"]


@pytest.mark.parametrize(
    ("error", "reply_has"),
    [
        (MemoryError(), {"error": "TooMuchMemory"}),
        (ZeroDivisionError("of ours"), {"bug": "ZeroDivisionError: of ours"}),
    ],
)
def test_a_lack_of_memory_and_a_bug_are_no_fault_of_the_file(
    error: Exception, reply_has: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker, "sample_segments", fails)
    reply, _ = reply_to(clips.video(3))
    ((name, text),) = reply_has.items()
    assert text in reply[name]
    assert "256 MiB" in reply.get("message", "256 MiB")
