"""What happens in a decoder process stays there. Each defence is attacked, and once removed to see the attack work."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from etenet.errors import CaptionError, DecoderCrashed, InternalError, TooMuchMemory
from etenet.sandbox.pool import InProcess, Sandbox
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut
from tests import clips
from tests.conftest import REPOSITORY

LIMITS = DecodeLimits(decode_cpu_s=1.0, decode_deadline_s=60.0, max_memory_bytes=256 * 2**20)


@contextmanager
def decoding(
    entry: str = "tests.misbehaving:main", limits: DecodeLimits = LIMITS, processes: int = 1
) -> Iterator[Sandbox]:
    sandbox = Sandbox(resize_px=64, limits=limits, processes=processes, entry=entry)
    try:
        yield sandbox
    finally:
        sandbox.close()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with decoding() as started:
        yield started


def error_of(sandbox: Sandbox | InProcess, body: bytes) -> CaptionError:
    error = sandbox.submit(body).exception(timeout=30)
    assert isinstance(error, CaptionError), error
    return error


def only_pid(sandbox: Sandbox) -> int:
    (pid,) = sandbox.pids
    return pid


@pytest.mark.parametrize("make", [clips.video, clips.audio_only, clips.png, lambda: b"", lambda: b"no video"])
def test_a_clip_gets_the_same_outcome_with_and_without_the_sandbox(sandbox: Sandbox, make: Callable[[], bytes]) -> None:
    body, outside = make(), InProcess(resize_px=64)
    try:
        (plain,) = outside.submit(body).result()
    except CaptionError as error:
        with pytest.raises(type(error), match=f"^{error}$".replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
            sandbox.submit(body).result()
        return
    (clip,) = sandbox.submit(body).result()
    np.testing.assert_array_equal(clip.frames, plain.frames)
    assert replace(clip.info, decode_ms=0) == replace(plain.info, decode_ms=0)


def test_the_size_of_a_clip_is_that_of_its_first_frame_whatever_its_header_says(sandbox: Sandbox) -> None:
    decoder = only_pid(sandbox)
    (clip,) = sandbox.submit(clips.after_the_first_key_frame()).result()
    assert (clip.info.width_px, clip.info.height_px) == (96, 64)
    assert only_pid(sandbox) == decoder


FORBIDDEN = [b"open", b"write a file", b"make a socket", b"run a program", b"fork", b"kill", b"choose its cores"]
FORBIDDEN += [b"control a device"]


@pytest.mark.parametrize("action", FORBIDDEN)
def test_system_calls_that_decoding_does_not_need_are_denied(sandbox: Sandbox, action: bytes) -> None:
    assert sandbox.filter_fault is None
    assert str(error_of(sandbox, action)) == "denied: Operation not permitted"


def test_without_the_filter_these_system_calls_succeed() -> None:
    with decoding("tests.misbehaving:unfiltered_main") as unfiltered:
        for action in FORBIDDEN:
            assert str(error_of(unfiltered, action)) == "done", action


THREAD = """
import socket, threading
from etenet.sandbox.seccomp import allow_only_decoding
filtered = threading.Event()
def work():
    filtered.wait()
    try:
        socket.socket().close()
    except PermissionError:
        print("denied")
thread = threading.Thread(target=work)
thread.start()
{install}
filtered.set()
thread.join()
"""


@pytest.mark.parametrize(("install", "message"), [("allow_only_decoding()", "denied\n"), ("", "")])
def test_the_filter_holds_for_threads_that_were_started_before_it(install: str, message: str) -> None:
    code = THREAD.format(install=install)
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == message


def test_memory_is_limited_and_freed(sandbox: Sandbox) -> None:
    error = error_of(sandbox, b"use up memory")
    assert isinstance(error, TooMuchMemory)
    assert "more than 256 MiB" in str(error)
    status = Path(f"/proc/{only_pid(sandbox)}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert 100 * 1024 < peak_kib < (256 + 64) * 1024
    assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"


LARGE = clips.video(
    pictures=[clips.pattern(number, 3840, 2160) for number in range(2)] * 8,
    size=(3840, 2160),
    preset="ultrafast",
    moments=range(0, 80, 5),
)


def test_a_process_keeps_nothing_of_the_large_clips_it_has_decoded(thorough: bool) -> None:
    """The sampled frames of each take 200 MB: a process that kept those of three would exceed its limit."""
    limits = DecodeLimits(decode_cpu_s=60.0, decode_deadline_s=120.0, max_memory_bytes=512 * 2**20)
    with decoding("etenet.sandbox.worker:main", limits) as sandbox:
        decoder = psutil.Process(only_pid(sandbox))
        memory_bytes = []
        for number in range(200 if thorough else 6):
            cut = Cut(segment_s=1.0) if number % 2 else Cut()
            made = sandbox.submit(LARGE, cut).result()
            assert [clip.info.width_px for clip in made] == [3840] * (3 if number % 2 else 1)
            memory_bytes.append(decoder.memory_info().rss)
        assert max(memory_bytes) - max(memory_bytes[:4]) < 32 * 2**20


def test_a_process_does_not_wait_for_the_garbage_collector(sandbox: Sandbox) -> None:
    """PyAV's frames refer to themselves once their side data was read."""
    sandbox.submit(clips.video()).result()
    assert str(error_of(sandbox, b"count frames")) == "0 frames"


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])  # the decoder of h264 reports a lack of memory as invalid data
@pytest.mark.parametrize("max_memory_mib", [1, 4, 8, 24])
def test_a_clip_that_needs_too_much_memory_is_not_reported_as_damaged(codec: str, max_memory_mib: int) -> None:
    large = LARGE if codec == "libx264" else clips.video(4, size=(3840, 2160), codec=codec)
    limits = DecodeLimits(decode_cpu_s=60.0, decode_deadline_s=120.0, max_memory_bytes=max_memory_mib * 2**20)
    with decoding("etenet.sandbox.worker:main", limits) as sandbox:
        decoder = only_pid(sandbox)
        for cut in (Cut(), Cut(segment_s=1.0), Cut(segment="scenes")):
            error = sandbox.submit(large, cut).exception(timeout=60)
            assert isinstance(error, TooMuchMemory)
            assert f"more than {max_memory_mib} MiB" in str(error)
        assert only_pid(sandbox) == decoder


def test_a_bug_in_the_worker_is_an_internal_error_and_does_not_end_the_process(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    pid = only_pid(sandbox)
    assert isinstance(error_of(sandbox, b"bug"), InternalError)
    assert "ZeroDivisionError" in caplog.text
    assert only_pid(sandbox) == pid


VIDEO = {
    "times_s": [0.0] * 16,
    "distinct_frames": 1,
    "codec": "h264",
    "width_px": 1,
    "height_px": 1,
    "shown_aspect": 1.0,
    "duration_s": 1.0,
    "picture_start_s": 0.0,
    "start_s": 0.0,
    "end_s": 1.0,
    "decode_ms": 1.0,
}


@pytest.mark.parametrize(
    "reply",
    [
        [],
        {},
        {"error": "SystemExit", "message": "?"},
        {"error": "InternalError", "message": "?"},
        {"error": "Overloaded", "message": "?"},
        {"clips": [{**VIDEO, "times_s": [0.0]}]},
        {"clips": [{**VIDEO, "times_s": ["soon"] * 16}]},
        {"clips": [{**VIDEO, "duration_s": float("inf")}]},
        {"clips": [{**VIDEO, "duration_s": 10**400}]},
        {"clips": [{**VIDEO, "shown_aspect": float("nan")}]},
        {"clips": [{**VIDEO, "shown_aspect": 0.0}]},
        {"clips": [{**VIDEO, "shown_aspect": "wide"}]},
        {"clips": [{**VIDEO, "width_px": -1}]},
        {"clips": [{**VIDEO, "width_px": True}]},
        {"clips": [{**VIDEO, "codec": "../../etc/passwd"}]},
        {"clips": [{**VIDEO, "more": 1}]},
        {"clips": []},
        {"clips": [VIDEO] * 2},
        {"clips": VIDEO},
    ],
)
def test_an_invalid_reply_is_treated_as_a_crash(reply: object) -> None:
    with decoding("tests.misbehaving:lying_main") as lying:
        assert lying.submit(json.dumps({"clips": [VIDEO]}).encode()).result()[0].info.codec == "h264"
        assert isinstance(error_of(lying, json.dumps(reply).encode()), DecoderCrashed)


def test_a_process_has_nothing_open_but_its_channel(sandbox: Sandbox) -> None:
    process = Path(f"/proc/{only_pid(sandbox)}")
    opened = sorted(os.readlink(file) for file in (process / "fd").iterdir())
    assert opened[:3] == ["/dev/null"] * 3
    assert len(opened) == 4
    assert opened[3].startswith("socket:")
    assert os.readlink(process / "cwd").endswith("(deleted)")
    assert resource.prlimit(only_pid(sandbox), resource.RLIMIT_CORE) == (0, 0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_limits_are_positive_and_finite(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"decode_deadline_s must be positive and finite, got {wrong}"):
        DecodeLimits(decode_deadline_s=wrong)
