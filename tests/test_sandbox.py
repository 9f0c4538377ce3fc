"""What happens in a decoder process stays there: every wall is run against, and taken down once to see it missed."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from etenet.errors import CaptionError, DecoderCrashed, DecodeTimeout, EtenetError, InternalError, TooMuchMemory
from etenet.sandbox import pool, quarantine
from etenet.sandbox.pool import InProcess, Sandbox
from etenet.sandbox.quarantine import Quarantine
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut
from tests import clips
from tests.conftest import REPOSITORY, decoders_of, runs, wait_until

LIMITS = DecodeLimits(decode_deadline_s=1.0, max_memory_bytes=256 * 2**20)


@contextmanager
def decoding(
    entry: str = "tests.misbehaving:main", limits: DecodeLimits = LIMITS, processes: int = 1
) -> Iterator[Sandbox]:
    walled = Sandbox(resize_px=64, limits=limits, processes=processes, entry=entry)
    try:
        yield walled
    finally:
        walled.close()


@pytest.fixture(scope="module")
def walled() -> Iterator[Sandbox]:
    with decoding() as sandbox:
        yield sandbox


def error_of(walled: Sandbox | InProcess, body: bytes) -> CaptionError:
    error = walled.submit(body).exception(timeout=30)
    assert isinstance(error, CaptionError), error
    return error


def only(walled: Sandbox) -> int:
    (pid,) = walled.pids
    return pid


@pytest.mark.parametrize("make", [clips.video, clips.audio_only, clips.png, lambda: b"", lambda: b"no video"])
def test_a_clip_fares_as_it_does_without_the_wall(walled: Sandbox, make: Callable[[], bytes]) -> None:
    body, outside = make(), InProcess(resize_px=64)
    try:
        (plain,) = outside.submit(body).result()
    except CaptionError as error:
        with pytest.raises(type(error), match=f"^{error}$".replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
            walled.submit(body).result()
        return
    (clip,) = walled.submit(body).result()
    np.testing.assert_array_equal(clip.frames, plain.frames)
    assert replace(clip.info, decode_ms=0) == replace(plain.info, decode_ms=0)


FORBIDDEN = [b"open", b"write a file", b"make a socket", b"run a program", b"fork", b"kill", b"choose its cores"]


@pytest.mark.parametrize("deed", FORBIDDEN)
def test_no_system_call_but_those_that_decoding_needs(walled: Sandbox, deed: bytes) -> None:
    assert walled.filter_fault is None
    assert str(error_of(walled, deed)) == "denied: Operation not permitted"


def test_without_the_filter_they_succeed() -> None:
    with decoding("tests.misbehaving:unfiltered_main") as unfiltered:
        for deed in FORBIDDEN:
            assert str(error_of(unfiltered, deed)) == "done", deed


def test_a_crash_is_the_clips_own_and_is_remembered() -> None:
    with decoding() as walled:
        before = only(walled)
        assert isinstance(error_of(walled, b"crash"), DecoderCrashed)
        assert walled.submit(clips.video()).result()[0].info.codec == "h264"
        after = only(walled)
        assert after != before
        again = error_of(walled, b"crash")
        assert isinstance(again, DecoderCrashed)
        assert "refused for an hour" in str(again)
        assert only(walled) == after


def test_a_decoder_that_dies_of_something_else_costs_no_clip() -> None:
    with decoding() as walled:
        for _ in range(3):
            os.kill(only(walled), signal.SIGKILL)
            assert walled.submit(clips.video()).result()[0].info.codec == "h264"


def test_a_clip_that_spins_is_ended_and_remembered() -> None:
    with decoding() as walled:
        started = time.monotonic()
        assert isinstance(error_of(walled, b"spin"), DecodeTimeout)
        assert time.monotonic() - started < LIMITS.decode_deadline_s + 0.5
        assert walled.submit(clips.video()).result()[0].info.codec == "h264"
        pid = only(walled)
        assert isinstance(error_of(walled, b"spin"), DecodeTimeout)
        assert only(walled) == pid
        cut_otherwise = [str(walled.submit(b"spin", Cut(end_s=1.0)).exception(timeout=30)) for _ in range(2)]
        assert ["refused for an hour" in message for message in cut_otherwise] == [False, True]


def test_a_clip_that_takes_its_time_and_says_so_is_remembered_too() -> None:
    with decoding() as walled:
        assert isinstance(error_of(walled, b"slow"), DecodeTimeout)
        assert "refused for an hour" in str(error_of(walled, b"slow"))


def test_a_clip_whose_decoders_were_killed_from_outside_may_come_again() -> None:
    with decoding(limits=replace(LIMITS, decode_deadline_s=10.0)) as walled:
        future = walled.submit(b"sleep")
        first = only(walled)
        wait_until(lambda: _at_work(first), 10)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: walled.pids not in ([], [first]) and _at_work(only(walled)), 10)
        os.kill(only(walled), signal.SIGKILL)
        assert isinstance(future.exception(), DecoderCrashed)
        assert not walled.submit(b"sleep").done()


def _at_work(pid: int) -> bool:
    """Whether it holds a clip: /dev/null three times, the channel, and the clip's memory file."""
    return len(os.listdir(f"/proc/{pid}/fd")) == 5


def test_a_clip_whose_decoder_was_stopped_may_come_again() -> None:
    with decoding() as walled:
        os.kill(only(walled), signal.SIGSTOP)
        assert isinstance(error_of(walled, clips.video()), DecodeTimeout)
        assert walled.submit(clips.video()).result()[0].info.codec == "h264"


def test_memory_is_limited_and_given_back(walled: Sandbox) -> None:
    error = error_of(walled, b"eat")
    assert isinstance(error, TooMuchMemory)
    assert "more than 256 MiB" in str(error)
    status = Path(f"/proc/{only(walled)}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert 100 * 1024 < peak_kib < (256 + 64) * 1024
    assert walled.submit(clips.video()).result()[0].info.codec == "h264"


LARGE = clips.video(16, size=(3840, 2160), preset="ultrafast")


def test_a_process_keeps_nothing_of_the_large_clips_it_has_decoded() -> None:
    """Their wanted frames take 200 MB each time: what is kept of three would be too much."""
    limits = DecodeLimits(decode_deadline_s=60.0, max_memory_bytes=512 * 2**20)
    with decoding("etenet.sandbox.worker:main", limits) as walled:
        for _ in range(6):
            assert walled.submit(LARGE).result()[0].info.width_px == 3840


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])  # the first calls it invalid data
def test_a_clip_that_takes_too_much_memory_is_told_so_and_not_that_it_is_damaged(codec: str) -> None:
    large = LARGE if codec == "libx264" else clips.video(4, size=(3840, 2160), codec=codec)
    limits = DecodeLimits(decode_deadline_s=60.0, max_memory_bytes=24 * 2**20)
    with decoding("etenet.sandbox.worker:main", limits) as walled:
        error = error_of(walled, large)
        assert isinstance(error, TooMuchMemory)
        assert "more than 24 MiB" in str(error)


def test_a_bug_of_ours_is_no_fault_of_the_clips(walled: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    pid = only(walled)
    assert isinstance(error_of(walled, b"bug"), InternalError)
    assert "ZeroDivisionError" in caplog.text
    assert only(walled) == pid


VIDEO = {
    "times_s": [0.0] * 16,
    "distinct_frames": 1,
    "codec": "h264",
    "width_px": 1,
    "height_px": 1,
    "duration_s": 1.0,
    "start_s": 0.0,
    "end_s": 1.0,
    "decode_ms": 1.0,
}


@pytest.mark.parametrize(
    "lie",
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
        {"clips": [{**VIDEO, "width_px": -1}]},
        {"clips": [{**VIDEO, "width_px": True}]},
        {"clips": [{**VIDEO, "codec": "../../etc/passwd"}]},
        {"clips": [{**VIDEO, "on_gpu": 1}]},
        {"clips": [{**VIDEO, "more": 1}]},
        {"clips": []},
        {"clips": [VIDEO] * 2},
        {"clips": VIDEO},
    ],
)
def test_what_a_decoder_says_is_not_believed(lie: object) -> None:
    with decoding("tests.misbehaving:lying_main") as lying:
        assert lying.submit(json.dumps({"clips": [VIDEO]}).encode()).result()[0].info.codec == "h264"
        assert isinstance(error_of(lying, json.dumps(lie).encode()), DecoderCrashed)


def test_a_process_owns_nothing_but_its_channel(walled: Sandbox) -> None:
    process = Path(f"/proc/{only(walled)}")
    opened = sorted(os.readlink(file) for file in (process / "fd").iterdir())
    assert opened[:3] == ["/dev/null"] * 3
    assert len(opened) == 4
    assert opened[3].startswith("socket:")
    assert os.readlink(process / "cwd").endswith("(deleted)")
    assert resource.prlimit(only(walled), resource.RLIMIT_CORE) == (0, 0)


def test_a_process_is_replaced_after_many_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLIPS_PER_PROCESS", 2)
    with decoding() as walled:
        first = only(walled)
        for _ in range(2):
            walled.submit(clips.video()).result()
        wait_until(lambda: walled.pids not in ([], [first]), 10)
        assert walled.submit(clips.video()).result()[0].info.codec == "h264"


def test_processes_end_with_the_sandbox_closed_or_forgotten() -> None:
    with decoding(processes=2) as walled:
        closed = walled.pids
    with pytest.raises(ValueError, match="closed"):
        walled.submit(clips.video())
    forgotten = Sandbox(resize_px=64, limits=LIMITS, processes=2).pids
    assert len(closed) == len(forgotten) == 2
    gc.collect()
    wait_until(lambda: not any(runs(pid) for pid in closed + forgotten), 10)


HOST = """
from etenet.video.limits import DecodeLimits
from etenet.sandbox.pool import Sandbox
walled = Sandbox(resize_px=64, limits=DecodeLimits(decode_deadline_s=2.0), processes=1, entry="tests.misbehaving:main")
future = walled.submit(b"spin")
print("spinning", flush=True)
future.exception()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_spinning_process_ends_with_its_host_and_by_its_cpu_limit_if_the_host_is_held_up(end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, cwd=REPOSITORY) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"spinning\n"
        (decoder,) = decoders_of(host.pid)
        host.send_signal(end)
        wait_until(lambda: not runs(decoder), 15)
        host.kill()


def test_poison_is_forgotten_after_an_hour_and_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    known = Quarantine(clock=lambda: now[0])
    known.add(b"bad", DecoderCrashed("it crashed"))
    assert isinstance(known.verdict(b"bad"), DecoderCrashed)
    assert known.verdict(b"bat") is None
    now[0] = quarantine.REFUSED_S + 1
    assert known.verdict(b"bad") is None
    monkeypatch.setattr(quarantine, "MAX_ENTRIES", 2)
    for body in (b"one", b"two", b"six"):
        known.add(body, DecoderCrashed("it crashed"))
    assert [known.verdict(body) is None for body in (b"one", b"two", b"six")] == [True, False, False]


def test_a_sandbox_that_cannot_start_says_so() -> None:
    with pytest.raises(EtenetError, match="do not start"):
        Sandbox(resize_px=64, processes=1, entry="tests.misbehaving:DEEDS")
