"""A decoder process with a GPU gets the GPU's device files from its parent, and no other file in any way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from platform import machine

import psutil
import pytest

from etenet.errors import DecoderCrashed, DecodeTimeout
from etenet.sandbox import nvidia_files, seccomp
from etenet.sandbox.pool import Sandbox
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from tests.conftest import wait_until
from tests.test_gpu_decoding import ALL, FOR_A_GPU
from tests.test_sandbox import FORBIDDEN, LIMITS, error_of, only

device_files = nvidia_files.device_files
ZERO = "/dev/zero"  # stands in for a GPU's device
ZERO_SAYS = f"done: {bytes(4)}"


@contextmanager
def decoding(
    *files: str, entry: str = "tests.opening:main", gpu: GpuDecoding | None = ALL, limits: DecodeLimits = LIMITS
) -> Iterator[Sandbox]:
    before = threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvidia_files, "device_files", lambda: frozenset(files))
        walled = Sandbox(resize_px=64, limits=limits, processes=1, gpu=gpu, entry=entry)
        try:
            yield walled
        finally:
            walled.close()
            wait_until(lambda: threading.active_count() == before, 10)


def serving() -> int:
    """How many processes are."""
    return sum(thread.name == "device files" for thread in threading.enumerate())


def outcome_of(walled: Sandbox, way: str, name: object = "") -> str:
    return str(error_of(walled, f"{way}: {name}".encode()))


@pytest.fixture(scope="module")
def walled() -> Iterator[Sandbox]:
    with decoding(ZERO) as sandbox:
        assert (sandbox.filter_fault, sandbox.gpu_fault) == (None, None)
        yield sandbox


def test_a_device_is_opened_read_and_written_behind_the_wall_from_any_thread(walled: Sandbox) -> None:
    assert outcome_of(walled, "use", ZERO) == ZERO_SAYS
    assert outcome_of(walled, "use from another thread", ZERO) == ZERO_SAYS


def test_a_driver_that_opens_its_device_for_each_video_decodes() -> None:
    with decoding("/dev/null", entry="tests.misbehaving:gpu_that_needs_files_main") as walled:
        assert walled.gpu_fault is None
        for _ in range(2):
            assert walled.submit(FOR_A_GPU["h264"]).result()[0].info.on_gpu


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("read", "/etc/passwd"),
        ("use", "/dev/null"),
        ("use from another thread", "/dev/null"),
        ("use", f"{ZERO}s"),
        ("use", ZERO[:-1]),
        ("use", f"/{ZERO}"),
        ("use", f"/x{ZERO}"),
        ("use", f"{ZERO}/"),
        ("use", "/dev/../dev/zero"),
        ("use", "/dev/./zero"),
        ("use", "/proc/self/" + "root/dev/zero"),
        ("use", "dev/zero"),
        ("use", "zero"),
        ("use", ""),
        ("read endless", ZERO),
        ("read at", 0),
        ("read at", 2**47),
        ("read at", 2**64 - 1),
        ("list", "/dev"),
        ("find", "/dev"),
        ("create", "/tmp/made by a clip"),
        ("create", "/dev/zero2"),
    ],
)
def test_no_other_file_is_opened_however_it_is_named(walled: Sandbox, way: str, name: object) -> None:
    assert outcome_of(walled, way, name).startswith("denied: [Errno 1] Operation not permitted")
    assert not name or not str(name).startswith("/tmp") or not Path(str(name)).exists()


def test_files_whose_names_are_almost_the_devices_are_not_taken_for_it(tmp_path: Path) -> None:
    device, *others = (tmp_path / name for name in ("gpu", "gpu0", "gp", "GPU", "a gpu"))
    for file in (device, *others):
        file.touch()
    with decoding(str(device)) as walled:
        assert outcome_of(walled, "read", device) == "done: None"
        for name in (*others, f"{device}\n", f" {device}", device.relative_to("/")):
            assert outcome_of(walled, "read", name).startswith("denied: [Errno 1] Operation not permitted")


def test_a_module_that_was_not_imported_before_cannot_be(walled: Sandbox) -> None:
    assert outcome_of(walled, "import", "this").startswith("denied: ")


def test_a_name_that_changes_while_it_is_looked_at_opens_the_device_or_nothing(walled: Sandbox) -> None:
    assert outcome_of(walled, "read while it changes", f"{ZERO} /dev/null") == f"done: {[bytes(1)]} True"


def test_a_process_keeps_nothing_by_which_it_could_answer_itself(walled: Sandbox) -> None:
    opened = sorted(os.readlink(file) for file in Path(f"/proc/{only(walled)}/fd").iterdir())
    assert [name.partition(":")[0] for name in opened] == ["/dev/null"] * 3 + ["socket"]


@pytest.mark.parametrize("deed", FORBIDDEN)
def test_all_else_is_denied_as_ever(walled: Sandbox, deed: bytes) -> None:
    assert str(error_of(walled, deed)) == "denied: Operation not permitted"


@pytest.mark.parametrize("way", ["copy", "own", "ask as if it were ioctl"])
def test_a_descriptor_can_only_be_asked_whether_it_is_inherited(walled: Sandbox, way: str) -> None:
    assert outcome_of(walled, way) == "denied: [Errno 1] Operation not permitted"


def test_a_process_has_as_many_files_as_its_limit_allows(walled: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert 5 <= int(outcome_of(walled, "hoard", ZERO).removeprefix("done: ")) <= 15
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_floods_is_slowed_down(walled: Sandbox) -> None:
    most = nvidia_files._AT_ONCE * (0.5 / nvidia_files._AT_ONCE_S + 2)
    assert 100 < int(outcome_of(walled, "flood", ZERO).removeprefix("done: ")) <= most


def test_a_process_without_a_gpu_opens_none_and_is_not_served() -> None:
    before = serving()
    with decoding(ZERO, gpu=None) as walled:
        assert outcome_of(walled, "use", ZERO).startswith("denied: [Errno 1] Operation not permitted")
        assert serving() == before


def waits_to_open(pid: int) -> bool:
    """Whether its main thread does."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(seccomp._ARCHITECTURES[machine()].openat)
    return False


def test_a_process_that_dies_while_it_waits_harms_nobody(tmp_path: Path) -> None:
    os.mkfifo(slow := tmp_path / "slow")  # to open it takes until somebody writes
    before, served = len(os.listdir("/proc/self/fd")), serving()
    with decoding(str(slow), ZERO, limits=replace(LIMITS, decode_deadline_s=4.0)) as walled:
        assert isinstance(error_of(walled, f"read: {slow}".encode()), DecodeTimeout)
        assert outcome_of(walled, "use", ZERO) == ZERO_SAYS
        asked = walled.submit(f"read: {slow}".encode())
        for _ in range(2):
            wait_until(lambda: any(map(waits_to_open, walled.pids)), 10)
            os.kill(died := only(walled), signal.SIGSEGV)
            wait_until(lambda: died not in walled.pids, 10)
        assert isinstance(asked.exception(), DecoderCrashed)
        assert outcome_of(walled, "use", ZERO) == ZERO_SAYS
        slow.open("w").close()
        wait_until(lambda: serving() == served + 1, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_was_stopped_while_it_waited_asks_again(tmp_path: Path) -> None:
    os.mkfifo(slow := tmp_path / "slow")
    with decoding(str(slow), limits=replace(LIMITS, decode_deadline_s=4.0)) as walled:
        asked = walled.submit(f"read: {slow}".encode())
        wait_until(lambda: waits_to_open(only(walled)), 10)
        os.kill(only(walled), signal.SIGSTOP)
        wait_until(lambda: psutil.Process(only(walled)).status() == psutil.STATUS_STOPPED, 10)
        os.kill(only(walled), signal.SIGCONT)

        def opened() -> bool:
            with suppress(OSError):  # nobody waits to read it
                os.close(os.open(slow, os.O_WRONLY | os.O_NONBLOCK))
            return asked.done()

        wait_until(opened, 10)
        assert str(asked.exception()) == "done: None"


def test_nothing_is_left_of_fifty_processes() -> None:
    with decoding(ZERO) as walled:
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(50):
            os.kill(only(walled), signal.SIGKILL)
            assert outcome_of(walled, "use", ZERO) == ZERO_SAYS
        wait_until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) == before, 10)


def test_only_nvidias_own_files_are_a_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps/nvidia-cap1"]
    others = ["nvidia-modeset", "nvidia", "nvidia0p1", "nvidia-caps", "nvidia-fs0"]
    monkeypatch.setattr(Path, "glob", lambda folder, _: [folder / name for name in files + others])
    monkeypatch.setattr(os, "access", lambda name, _: name != "/dev/nvidia12")
    assert device_files() == {f"/dev/{name}" for name in files if name != "nvidia12"}
