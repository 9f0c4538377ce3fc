"""Decoder processes that crash, hang, or are killed or stopped: only a clip that does this pays for it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest
from prometheus_client import REGISTRY

from etenet.errors import DecoderCrashed, DecodeTimeout, EtenetError, Overloaded
from etenet.sandbox import pool, process
from etenet.sandbox.pool import Sandbox
from etenet.video.segments import Cut
from tests import clips
from tests.conftest import REPOSITORY, decoders_of, runs, wait_until
from tests.test_sandbox import LIMITS, decoding, error_of, only_pid

HASTY = replace(LIMITS, decode_deadline_s=1.0)


def test_a_clip_that_crashes_its_decoder_is_quarantined_and_harms_no_other() -> None:
    with decoding() as sandbox:
        before = only_pid(sandbox)
        assert isinstance(error_of(sandbox, b"crash"), DecoderCrashed)
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"
        after = only_pid(sandbox)
        assert after != before
        again = error_of(sandbox, b"crash")
        assert isinstance(again, DecoderCrashed)
        assert "refused for an hour" in str(again)
        assert only_pid(sandbox) == after


def test_no_clip_is_lost_if_a_decoder_is_killed_from_outside() -> None:
    with decoding() as sandbox:
        for _ in range(3):
            os.kill(only_pid(sandbox), signal.SIGKILL)
            assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"


def test_a_clip_for_which_no_decoder_can_be_started_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with decoding() as sandbox:
        with monkeypatch.context() as broken:
            broken.setattr(process, "_START", "")
            os.kill(only_pid(sandbox), signal.SIGKILL)
            assert isinstance(error_of(sandbox, clips.video()), Overloaded)
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"


def test_a_process_that_cannot_be_started_leaves_the_videos_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    body = clips.video()
    with decoding(processes=2) as sandbox:
        monkeypatch.setattr(process, "_START", "")
        os.kill(sandbox.pids[0], signal.SIGKILL)
        errors = [future.exception() for future in [sandbox.submit(body) for _ in range(40)]]
    assert sum(isinstance(error, Overloaded) for error in errors) <= 3
    assert sum(error is None for error in errors) >= 37


def test_an_old_process_goes_on_where_no_new_one_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLIPS_PER_PROCESS", 2)
    with decoding() as sandbox:
        old = only_pid(sandbox)
        monkeypatch.setattr("tempfile.TemporaryDirectory", raising(OSError("no space left")))
        for _ in range(4):
            assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"
        assert only_pid(sandbox) == old
        monkeypatch.undo()


def raising(error: Exception) -> Callable[..., NoReturn]:
    def call(*_: object, **__: object) -> NoReturn:
        raise error

    return call


def test_the_time_until_a_decoder_is_ready_is_that_of_the_clip_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with decoding(limits=HASTY) as sandbox:
        monkeypatch.setattr(process, "_START", "import time; time.sleep(60)")
        os.kill(only_pid(sandbox), signal.SIGKILL)
        began_s = time.monotonic()
        for _ in range(3):
            assert isinstance(error_of(sandbox, clips.video()), Overloaded)
        assert time.monotonic() - began_s < 3 * (HASTY.decode_deadline_s + 1)


def test_a_clip_that_hangs_its_decoder_is_stopped_and_quarantined() -> None:
    with decoding() as sandbox:
        assert isinstance(error_of(sandbox, b"spin"), DecodeTimeout)
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"
        pid = only_pid(sandbox)
        assert isinstance(error_of(sandbox, b"spin"), DecodeTimeout)
        assert only_pid(sandbox) == pid
        with_another_cut = [str(sandbox.submit(b"spin", Cut(end_s=1.0)).exception(timeout=30)) for _ in range(2)]
        assert ["refused for an hour" in message for message in with_another_cut] == [False, True]


def test_two_tries_of_a_clip_share_its_processor_time() -> None:
    with decoding() as sandbox:
        assert isinstance(error_of(sandbox, b"crash after 0.7 s"), DecodeTimeout)
        assert "refused for an hour" in str(error_of(sandbox, b"crash after 0.7 s"))


def test_a_clip_whose_decoder_reports_a_timeout_is_quarantined() -> None:
    with decoding() as sandbox:
        assert isinstance(error_of(sandbox, b"report a timeout"), DecodeTimeout)
        assert "refused for an hour" in str(error_of(sandbox, b"report a timeout"))


def test_a_clip_whose_decoders_were_killed_from_outside_is_not_quarantined() -> None:
    with decoding(limits=replace(LIMITS, decode_deadline_s=10.0)) as sandbox:
        future = sandbox.submit(b"sleep")
        first = only_pid(sandbox)
        wait_until(lambda: _has_a_clip(first), 10)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: sandbox.pids not in ([], [first]) and _has_a_clip(only_pid(sandbox)), 10)
        os.kill(only_pid(sandbox), signal.SIGKILL)
        assert isinstance(future.exception(), DecoderCrashed)
        assert not sandbox.submit(b"sleep").done()


def _has_a_clip(pid: int) -> bool:
    """Whether a process has five open files: /dev/null three times, its channel, and a clip's memory file."""
    return len(os.listdir(f"/proc/{pid}/fd")) == 5


def test_a_clip_whose_decoder_was_stopped_may_come_again() -> None:
    with decoding(limits=HASTY) as sandbox:
        os.kill(only_pid(sandbox), signal.SIGSTOP)
        error = error_of(sandbox, clips.video())
        assert isinstance(error, Overloaded)
        assert "in 1 s decoding got 0.0 s of processor time; send it again" in str(error)
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"


def test_a_clip_that_got_too_little_of_a_core_may_come_again() -> None:
    """Beside other work, any clip takes longer than the deadline; only processor time says that it is too long."""
    with decoding(limits=replace(LIMITS, decode_deadline_s=2.0)) as sandbox:
        for _ in range(2):
            error = error_of(sandbox, b"get a fifth of a second of a core")
            assert isinstance(error, Overloaded)
            assert "in 2 s decoding got 0.2 s of processor time" in str(error)


def test_a_decoder_that_reports_to_have_been_held_up_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 30.0)
    with decoding(limits=HASTY) as sandbox:
        pid = only_pid(sandbox)
        assert isinstance(error_of(sandbox, b"report to be held up after a second"), Overloaded)
        assert only_pid(sandbox) == pid
        assert isinstance(error_of(sandbox, b"report to be held up"), DecoderCrashed)  # the time was not over


def test_a_kernel_that_ends_a_decoder_for_its_processor_time_has_not_crashed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 30.0)
    with decoding() as sandbox:
        assert isinstance(error_of(sandbox, b"spin"), DecodeTimeout)
        assert "refused for an hour" in str(error_of(sandbox, b"spin"))


def test_a_process_is_replaced_after_many_clips_which_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes() -> float:
        return REGISTRY.get_sample_value("etenet_decoder_processes_replaced_total") or 0.0

    monkeypatch.setattr(pool, "CLIPS_PER_PROCESS", 2)
    with decoding() as sandbox:
        first, before = only_pid(sandbox), crashes()
        for _ in range(2):
            sandbox.submit(clips.video()).result()
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"
        second = only_pid(sandbox)
        assert second != first
        assert crashes() == before
        os.kill(second, signal.SIGKILL)
        assert sandbox.submit(clips.video()).result()[0].info.codec == "h264"
        assert crashes() == before + 1


def test_processes_end_when_the_sandbox_is_closed_or_garbage_collected() -> None:
    with decoding(processes=2) as sandbox:
        closed = sandbox.pids
    with pytest.raises(ValueError, match="closed"):
        sandbox.submit(clips.video())
    collected = Sandbox(resize_px=64, limits=LIMITS, processes=2).pids
    assert len(closed) == len(collected) == 2
    gc.collect()
    wait_until(lambda: not any(runs(pid) for pid in closed + collected), 10)


HOST = """
from etenet.video.limits import DecodeLimits
from etenet.sandbox.pool import Sandbox
sandbox = Sandbox(resize_px=64, limits=DecodeLimits(decode_deadline_s=2.0), processes=1, entry="tests.misbehaving:main")
future = sandbox.submit(b"spin")
print("spinning", flush=True)
future.exception()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_hanging_process_ends_with_its_host_or_at_its_cpu_limit_if_the_host_is_stopped(sent: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, cwd=REPOSITORY) as host:
        try:
            assert host.stdout is not None
            assert host.stdout.readline() == b"spinning\n"
            (decoder,) = decoders_of(host.pid)
            host.send_signal(sent)
            wait_until(lambda: not runs(decoder), 15)
        finally:
            host.kill()


def test_a_sandbox_that_cannot_start_raises_an_error() -> None:
    with pytest.raises(EtenetError, match="do not start"):
        Sandbox(resize_px=64, processes=1, entry="tests.misbehaving:ACTIONS")
