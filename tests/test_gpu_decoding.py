"""A GPU decodes to the same frames as the software, and whatever goes wrong on a GPU, the software decodes instead.

No GPU is needed: a stand-in returns the software's frames in a GPU's layout. What only a real GPU can prove, a decoder
process checks when it starts.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from etenet import errors, metrics
from etenet.assets import MOVING_CLIP
from etenet.sandbox.pool import Sandbox
from etenet.sandbox.process import DecoderProcess
from etenet.video.clip import Clip
from etenet.video.ffmpeg import CODEC_WHITELIST, LENIENT_METADATA, OPEN_OPTIONS
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import sample_segments
from etenet.video.segments import WHOLE, Cut
from tests import clips
from tests.conftest import REPOSITORY
from tests.gpu_stand_in import Frames, StandIn
from tests.misbehaving import FAULTY_WIDTH_PX
from tests.test_sandbox import FORBIDDEN, HASTY, LIMITS, error_of, only_pid
from tests.test_timelines import Recipe
from tests.test_video import RENDERED, SIZE_PX

ALL = GpuDecoding(from_pixels=1)
NO_GPU_HERE = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
HEVC = {"codec": "libx265", "x265-params": "log-level=none"}
FOR_A_GPU = {
    "h264": clips.video(60, bf="3", g="20"),
    "h264 in ts": RENDERED["h264 in ts"],
    "open groups of pictures": RENDERED["open groups of pictures"],
    "full range": clips.video(20, pixels="yuvj420p"),
    "BT.709": clips.video(20, size=(320, 240), colorspace="bt709", color_primaries="bt709", color_trc="bt709"),
    "rotated": clips.with_display_matrix(clips.video(20), (0, 1, -1, 0)),
    "hevc": clips.video(30, **HEVC),  # type: ignore[arg-type]  # the keys are names of options
    "hevc of 10 bits": clips.video(30, pixels="yuv420p10le", **HEVC),  # type: ignore[arg-type]
    "vp9": RENDERED["vp9 in webm"],
    "between key frames": Recipe(container="mpegts", kind="h264, open", skip=5).body(),
    "leading pictures": Recipe(container="mp4", kind="hevc, radl", skip=10).body(),
    "two clocks": Recipe(container="mpegts", kind="h264", clock="back").body(),
}
FOR_THE_SOFTWARE = {
    "vp8": RENDERED["vp8 in webm"],
    "mpeg4": RENDERED["mpeg4 in avi"],
    "mpeg2": RENDERED["mpeg2 in ts"],
    "mjpeg": clips.video(20, container="avi", codec="mjpeg", pixels="yuvj420p"),
    "av1": clips.video(20, size=(96, 64), codec="libsvtav1"),
    "h264 of 4:4:4": clips.video(20, pixels="yuv444p"),
}


def sampled(
    body: bytes, *, cut: Cut = WHOLE, gpu: GpuDecoding | None = ALL, limits: DecodeLimits = LIMITS
) -> list[Clip]:
    return sample_segments(body, cut, resize_px=SIZE_PX, limits=limits, gpu=gpu)


def assert_same(actual: list[Clip], expected: list[Clip], *, on_gpu: bool) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        assert replace(one.info, decode_ms=0) == replace(other.info, decode_ms=0, on_gpu=on_gpu)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(av, "open", stand_in.open)
    return stand_in


@pytest.mark.parametrize("name", FOR_A_GPU)
@pytest.mark.parametrize("cut", [WHOLE, Cut(start_s=0.2, segment_s=1.0)], ids=["whole", "segments"])
def test_a_gpu_decodes_to_the_same_frames_as_the_software(stand_in: StandIn, name: str, cut: Cut) -> None:
    body = FOR_A_GPU[name]
    assert_same(sampled(body, cut=cut), sampled(body, cut=cut, gpu=None), on_gpu=True)
    assert len(stand_in.keywords) == 1


@pytest.mark.parametrize("name", FOR_THE_SOFTWARE)
def test_codecs_and_pixel_formats_that_are_not_on_the_list_never_reach_the_gpu(stand_in: StandIn, name: str) -> None:
    body = FOR_THE_SOFTWARE[name]
    assert_same(sampled(body), sampled(body, gpu=None), on_gpu=False)
    assert not stand_in.keywords


def test_small_frames_and_scenes_never_reach_the_gpu(stand_in: StandIn) -> None:
    body = clips.video(30, size=(320, 240))
    threshold = GpuDecoding(from_pixels=320 * 240)
    assert [clip.info.on_gpu for clip in sampled(body, gpu=threshold)] == [True]
    assert [clip.info.on_gpu for clip in sampled(body, gpu=replace(threshold, from_pixels=320 * 240 + 1))] == [False]
    assert not any(clip.info.on_gpu for clip in sampled(body, gpu=threshold, cut=Cut(segment="scenes")))
    assert len(stand_in.keywords) == 1


def test_the_gpus_decoder_is_opened_with_the_same_allow_lists_and_limits(stand_in: StandIn) -> None:
    sampled(FOR_A_GPU["h264"], gpu=GpuDecoding(device=3, from_pixels=1))
    (accelerator,) = stand_in.accelerators
    assert (accelerator.device_id, accelerator.options) == (3, {"primary_ctx": "1"})
    assert stand_in.keywords == [{"options": OPEN_OPTIONS, **LENIENT_METADATA}]
    assert stand_in.settings["options"] == {"max_pixels": str(LIMITS.max_pixels), "codec_whitelist": CODEC_WHITELIST}
    assert stand_in.settings["thread_count"] == 1


def failing(error: Exception, after: int) -> Callable[[Frames], Frames]:
    """Raises `error` once more than `after` frames have come."""
    count = 0

    def alter(frames: Frames) -> Frames:
        nonlocal count
        count += len(frames)
        if count > after:
            raise error
        return frames

    return alter


def with_shifted_times(frames: Frames) -> Frames:
    for frame in frames:
        frame.pts += 1
    return frames


def without_times(frames: Frames) -> Frames:
    for frame in frames:
        frame.pts = None
    return frames


BROKEN: dict[str, Callable[[Frames], Frames]] = {
    "a driver that fails at once": failing(av.error.ExternalError(1, "cuda"), 0),
    "a driver that fails midway": failing(av.error.InvalidDataError(1, "cuda"), 25),
    "no memory on the GPU": failing(MemoryError(), 10),
    "a runtime error": failing(RuntimeError("?"), 10),
    "a type error": failing(TypeError("?"), 10),
    "shifted times": with_shifted_times,
    "no times": without_times,
    "no frames": lambda _: [],
    "every frame twice": lambda frames: [frame for frame in frames for _ in range(2)],
    "frames of another size": lambda frames: [frame.reformat(frame.width + 2, frame.height) for frame in frames],
    "frames larger than allowed": lambda frames: [frame.reformat(4096, 4096) for frame in frames],
    "an error of our own": failing(errors.TooManyPixels("?"), 0),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_software_decodes_what_a_gpu_decodes_wrongly(stand_in: StandIn, fault: str) -> None:
    body = FOR_A_GPU["h264"]
    stand_in.alter = BROKEN[fault]
    assert_same(sampled(body), sampled(body, gpu=None), on_gpu=False)
    assert stand_in.decode_calls


@pytest.mark.parametrize("error", [NotImplementedError("?"), RuntimeError("?"), av.error.PermissionError(1, "?")])
def test_the_software_decodes_if_the_gpu_cannot_be_opened(stand_in: StandIn, error: Exception) -> None:
    def refuse() -> None:
        raise error

    stand_in.before = refuse
    body = FOR_A_GPU["h264"]
    assert_same(sampled(body), sampled(body, gpu=None), on_gpu=False)


def test_a_context_that_decodes_in_software_is_not_reported_as_a_gpu(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpu_stand_in.Context.is_hwaccel", False)
    assert [clip.info.on_gpu for clip in sampled(FOR_A_GPU["h264"])] == [False]
    assert len(stand_in.keywords) == 1


def test_the_gpu_and_the_software_after_it_share_one_deadline(stand_in: StandIn) -> None:
    def slow(_: Frames) -> Frames:
        time.sleep(wait_s)
        raise av.error.ExternalError(1, "cuda")

    stand_in.alter = slow
    wait_s = HASTY.decode_deadline_s * 0.3
    assert [clip.info.on_gpu for clip in sampled(FOR_A_GPU["h264"], limits=HASTY)] == [False]
    wait_s = HASTY.decode_deadline_s * 1.1
    with pytest.raises(errors.Overloaded):
        sampled(FOR_A_GPU["h264"], limits=HASTY)


@pytest.mark.usefixtures("stand_in")
def test_a_clip_is_refused_for_the_same_reason_with_and_without_a_gpu() -> None:
    for body, cut in ((FOR_A_GPU["h264"], Cut(start_s=99)), (FOR_A_GPU["h264"][:1500], WHOLE)):
        messages = []
        for gpu in (ALL, None):
            with pytest.raises(errors.CaptionError) as caught:
                sampled(body, cut=cut, gpu=gpu)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1]


@NO_GPU_HERE
@pytest.mark.parametrize("name", [*RENDERED, *FOR_A_GPU])
def test_without_a_gpu_every_clip_gives_the_same_frames(name: str) -> None:
    body = (RENDERED | FOR_A_GPU)[name]
    assert_same(sampled(body), sampled(body, gpu=None), on_gpu=False)


@contextmanager
def decoding(entry: str, limits: DecodeLimits = LIMITS, processes: int = 1) -> Iterator[Sandbox]:
    sandbox = Sandbox(resize_px=SIZE_PX, limits=limits, processes=processes, gpu=ALL, entry=entry)
    try:
        yield sandbox
    finally:
        sandbox.close()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with decoding("tests.misbehaving:gpu_main") as started:
        yield started


def test_a_decoder_process_decodes_on_a_gpu_and_counts_the_videos(sandbox: Sandbox) -> None:
    assert (sandbox.filter_fault, sandbox.gpu_fault) == (None, None)
    before = metrics.GPU_DECODED._value.get()
    for name in ("h264", "hevc", "vp9"):
        assert_same(sandbox.submit(FOR_A_GPU[name]).result(), sampled(FOR_A_GPU[name], gpu=None), on_gpu=True)
    assert not sandbox.submit(FOR_THE_SOFTWARE["vp8"]).result()[0].info.on_gpu
    assert metrics.GPU_DECODED._value.get() == before + 3


def test_a_clip_that_crashes_the_gpus_driver_is_decoded_in_software(sandbox: Sandbox) -> None:
    body, before = clips.video(30, size=(FAULTY_WIDTH_PX, 96)), only_pid(sandbox)
    for _ in range(2):  # twice: the clip is not quarantined
        assert_same(sandbox.submit(body).result(), sampled(body, gpu=None), on_gpu=False)
    assert only_pid(sandbox) != before
    assert sandbox.submit(FOR_A_GPU["h264"]).result()[0].info.on_gpu


def test_a_driver_that_hangs_times_the_clip_out_without_quarantining_it() -> None:
    body = clips.video(30, size=(FAULTY_WIDTH_PX, 96))
    with decoding("tests.misbehaving:hanging_gpu_main", HASTY) as sandbox:
        for _ in range(2):
            assert "refused for an hour" not in str(error_of(sandbox, body))
        assert sandbox.submit(FOR_A_GPU["h264"]).result()[0].info.on_gpu


@pytest.mark.parametrize("action", FORBIDDEN)
def test_a_process_with_a_gpu_is_denied_the_same_system_calls_as_the_others(sandbox: Sandbox, action: bytes) -> None:
    assert str(error_of(sandbox, action)) == "denied: Operation not permitted"


def test_a_process_with_a_gpu_may_make_ioctl_requests_to_its_driver_and_no_others(sandbox: Sandbox) -> None:
    for action in (b"call a driver", b"call nvidia-uvm"):
        assert str(error_of(sandbox, action)) == "denied: Inappropriate ioctl for device"
    for action in (b"set the owner of a socket", b"type into a terminal"):
        assert str(error_of(sandbox, action)) == "denied: Operation not permitted"


def test_a_process_without_a_gpu_may_make_no_ioctl_request() -> None:
    software = Sandbox(resize_px=SIZE_PX, limits=LIMITS, processes=1, entry="tests.misbehaving:main")
    for action in (b"call a driver", b"call nvidia-uvm", b"set the owner of a socket"):
        assert str(error_of(software, action)) == "denied: Operation not permitted"
    software.close()


THREAD = """
import os, socket, threading
from etenet.sandbox.seccomp import allow_only_decoding
filtered = threading.Event()
def work():
    filtered.wait()
    try:
        socket.socket().close()
    except PermissionError:
        print("denied")
    try:
        open("/dev/null").close()
    except OSError as error:
        print(error.strerror)
thread = threading.Thread(target=work)
thread.start()
{install}
filtered.set()
thread.join()
"""


@pytest.mark.parametrize(
    ("install", "messages"),
    [
        ("allow_only_decoding()", "denied\nOperation not permitted\n"),
        ("os.close(allow_only_decoding(gpu=True))", "denied\nFunction not implemented\n"),  # the listener is not served
        ("", ""),
    ],
)
def test_the_filter_holds_for_threads_that_were_started_before_it(install: str, messages: str) -> None:
    code = THREAD.format(install=install)
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == messages


UNUSABLE = {
    "gpu_that_gives_other_frames_main": "gives other frames",
    "gpu_that_needs_files_main": "behind the system-call filter, the GPU's decoder fails: .*Operation not permitted",
    "gpu_on_an_old_kernel_main": r"Linux 5\.13\.0-7-generic cannot hand files to a filtered process",
    "gpu_that_crashes_at_once_main": "ended before it was ready",
}


@pytest.mark.parametrize("entry", UNUSABLE)
def test_a_gpu_that_fails_its_check_is_not_used(entry: str, caplog: pytest.LogCaptureFixture) -> None:
    with decoding(f"tests.misbehaving:{entry}", processes=2) as sandbox:
        check_that_everything_is_decoded_in_software(sandbox, caplog, because=UNUSABLE[entry])


def test_a_gpu_that_is_lost_later_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with decoding("tests.misbehaving:gpu_main") as sandbox:
        (supervisor,) = sandbox._supervisors
        entry = "tests.misbehaving:gpu_that_crashes_at_once_main"
        supervisor._new_process = partial(DecoderProcess, SIZE_PX, LIMITS, entry)
        for _ in range(2):
            os.kill(only_pid(sandbox), signal.SIGKILL)
            assert not sandbox.submit(FOR_A_GPU["h264"]).result()[0].info.on_gpu
        assert caplog.text.count("decodes all videos in software") == 1


@NO_GPU_HERE
def test_without_a_gpu_one_warning_is_logged_and_processes_decode_in_software(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with decoding("tests.misbehaving:main", processes=2) as sandbox:
        check_that_everything_is_decoded_in_software(
            sandbox, caplog, because=r"libcuda\.so\.1: cannot open shared object file"
        )


def check_that_everything_is_decoded_in_software(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, *, because: str
) -> None:
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sandbox.gpu_fault
    assert sandbox.gpu_fault in warning
    assert re.search(because, warning)
    pids = sandbox.pids
    for body in (FOR_A_GPU["h264"], MOVING_CLIP.read_bytes()):
        assert_same(sandbox.submit(body).result(), sampled(body, gpu=None), on_gpu=False)
    assert str(error_of(sandbox, b"call a driver")) == "denied: Operation not permitted"
    assert sandbox.pids == pids
    assert len(pids) == 2
    assert all(b"CUDA" not in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids)


def test_invalid_settings_are_refused() -> None:
    for wrong in ({"device": -1}, {"from_pixels": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            GpuDecoding(**wrong)
