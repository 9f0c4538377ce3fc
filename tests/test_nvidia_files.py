"""A decoder process with a GPU gets the GPU's device files from its parent, and can open no other file."""

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

from etenet.errors import DecoderCrashed, Overloaded
from etenet.sandbox import nvidia_files, seccomp
from etenet.sandbox.pool import Sandbox
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from tests.conftest import wait_until
from tests.test_gpu_decoding import ALL, FOR_A_GPU
from tests.test_sandbox import FORBIDDEN, LIMITS, error_of, only_pid

device_files = nvidia_files.device_files
ZERO = "/dev/zero"  # stands in for a GPU's device
ZERO_RESULT = f"done: {bytes(4)}"


@contextmanager
def decoding(
    *files: str, entry: str = "tests.opening:main", gpu: GpuDecoding | None = ALL, limits: DecodeLimits = LIMITS
) -> Iterator[Sandbox]:
    before = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvidia_files, "device_files", lambda: frozenset(files))
        sandbox = Sandbox(resize_px=64, limits=limits, processes=1, gpu=gpu, entry=entry)
        try:
            yield sandbox
        finally:
            sandbox.close()
            wait_until(lambda: set(threading.enumerate()) <= before, 10)


def served_processes() -> int:
    """The number of processes for which this one opens files."""
    return sum(thread.name == "device files" for thread in threading.enumerate())


def outcome_of(sandbox: Sandbox, way: str, name: object = "") -> str:
    return str(error_of(sandbox, f"{way}: {name}".encode()))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with decoding(ZERO) as started:
        assert (started.filter_fault, started.gpu_fault) == (None, None)
        yield started


def test_a_filtered_process_opens_reads_and_writes_a_device_from_any_thread(sandbox: Sandbox) -> None:
    assert outcome_of(sandbox, "use", ZERO) == ZERO_RESULT
    assert outcome_of(sandbox, "use from another thread", ZERO) == ZERO_RESULT


def test_a_driver_that_opens_its_device_for_each_video_works() -> None:
    with decoding("/dev/null", entry="tests.misbehaving:gpu_that_needs_files_main") as sandbox:
        assert sandbox.gpu_fault is None
        for _ in range(2):
            assert sandbox.submit(FOR_A_GPU["h264"]).result()[0].info.on_gpu


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
        ("read by an endless name", ZERO),
        ("read by an address", 0),
        ("read by an address", 2**47),
        ("read by an address", 2**64 - 1),
        ("list", "/dev"),
        ("find", "/dev"),
        ("create", "/tmp/made by a clip"),
        ("create", "/dev/zero2"),
    ],
)
def test_no_other_file_is_opened_however_it_is_named(sandbox: Sandbox, way: str, name: object) -> None:
    assert outcome_of(sandbox, way, name).startswith("denied: [Errno 1] Operation not permitted")
    assert not name or not str(name).startswith("/tmp") or not Path(str(name)).exists()


def test_files_with_names_similar_to_the_devices_are_not_opened(tmp_path: Path) -> None:
    device, *others = (tmp_path / name for name in ("gpu", "gpu0", "gp", "GPU", "a gpu"))
    for file in (device, *others):
        file.touch()
    with decoding(str(device)) as sandbox:
        assert outcome_of(sandbox, "read", device) == "done: None"
        for name in (*others, f"{device}\n", f" {device}", device.relative_to("/")):
            assert outcome_of(sandbox, "read", name).startswith("denied: [Errno 1] Operation not permitted")


def test_a_module_cannot_be_imported_after_the_filter_is_installed(sandbox: Sandbox) -> None:
    assert outcome_of(sandbox, "import", "this").startswith("denied: ")


def test_a_name_that_changes_while_it_is_checked_opens_the_device_or_nothing(sandbox: Sandbox) -> None:
    assert outcome_of(sandbox, "read while the name changes", f"{ZERO} /dev/null") == f"done: {[bytes(1)]} True"


def test_a_process_does_not_keep_the_listener_of_its_own_filter(sandbox: Sandbox) -> None:
    opened = sorted(os.readlink(file) for file in Path(f"/proc/{only_pid(sandbox)}/fd").iterdir())
    assert [name.partition(":")[0] for name in opened] == ["/dev/null"] * 3 + ["socket"]


@pytest.mark.parametrize("action", FORBIDDEN)
def test_all_other_system_calls_are_still_denied(sandbox: Sandbox, action: bytes) -> None:
    assert str(error_of(sandbox, action)) == "denied: Operation not permitted"


@pytest.mark.parametrize("way", ["duplicate", "set the owner", "fcntl with the number of ioctl"])
def test_fcntl_may_only_read_whether_a_descriptor_is_inherited(sandbox: Sandbox, way: str) -> None:
    assert outcome_of(sandbox, way) == "denied: [Errno 1] Operation not permitted"


def test_a_process_opens_only_as_many_files_as_its_limit_allows(sandbox: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert 5 <= int(outcome_of(sandbox, "open many", ZERO).removeprefix("done: ")) <= 15
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_floods_its_parent_with_requests_is_slowed_down(sandbox: Sandbox) -> None:
    most = nvidia_files._MAX_REQUESTS * (0.5 / nvidia_files._PERIOD_S + 2)
    assert 100 < int(outcome_of(sandbox, "open repeatedly", ZERO).removeprefix("done: ")) <= most


def test_a_process_without_a_gpu_opens_no_device_and_is_not_served() -> None:
    before = served_processes()
    with decoding(ZERO, gpu=None) as sandbox:
        assert outcome_of(sandbox, "use", ZERO).startswith("denied: [Errno 1] Operation not permitted")
        assert served_processes() == before


def waits_to_open(pid: int) -> bool:
    """Whether the main thread of a process waits in openat."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(seccomp._ARCHITECTURES[machine()].openat)
    return False


def test_a_process_that_dies_while_it_waits_harms_no_other(tmp_path: Path) -> None:
    os.mkfifo(slow := tmp_path / "slow")  # opening it blocks until another process opens it to write
    before, served_before = len(os.listdir("/proc/self/fd")), served_processes()
    with decoding(str(slow), ZERO, limits=replace(LIMITS, decode_deadline_s=4.0)) as sandbox:
        assert isinstance(error_of(sandbox, f"read: {slow}".encode()), Overloaded)
        assert outcome_of(sandbox, "use", ZERO) == ZERO_RESULT
        future = sandbox.submit(f"read: {slow}".encode())
        for _ in range(2):
            wait_until(lambda: any(map(waits_to_open, sandbox.pids)), 10)
            os.kill(died := only_pid(sandbox), signal.SIGSEGV)
            wait_until(lambda: died not in sandbox.pids, 10)
        assert isinstance(future.exception(), DecoderCrashed)
        assert outcome_of(sandbox, "use", ZERO) == ZERO_RESULT
        slow.open("w").close()
        wait_until(lambda: served_processes() == served_before + 1, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_was_stopped_while_it_waited_opens_the_file_later(tmp_path: Path) -> None:
    os.mkfifo(slow := tmp_path / "slow")
    with decoding(str(slow), limits=replace(LIMITS, decode_deadline_s=4.0)) as sandbox:
        future = sandbox.submit(f"read: {slow}".encode())
        wait_until(lambda: waits_to_open(only_pid(sandbox)), 10)
        os.kill(only_pid(sandbox), signal.SIGSTOP)
        wait_until(lambda: psutil.Process(only_pid(sandbox)).status() == psutil.STATUS_STOPPED, 10)
        os.kill(only_pid(sandbox), signal.SIGCONT)

        def opened() -> bool:
            with suppress(OSError):  # it has no reader yet
                os.close(os.open(slow, os.O_WRONLY | os.O_NONBLOCK))
            return future.done()

        wait_until(opened, 10)
        assert str(future.exception()) == "done: None"


def test_fifty_processes_leave_no_descriptor_and_no_thread_behind() -> None:
    with decoding(ZERO) as sandbox:
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(50):
            os.kill(only_pid(sandbox), signal.SIGKILL)
            assert outcome_of(sandbox, "use", ZERO) == ZERO_RESULT
        wait_until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) == before, 10)


def test_device_files_are_the_readable_ones_that_nvidias_driver_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps/nvidia-cap1"]
    others = ["nvidia-modeset", "nvidia", "nvidia0p1", "nvidia-caps", "nvidia-fs0"]
    monkeypatch.setattr(Path, "glob", lambda folder, _: [folder / name for name in files + others])
    monkeypatch.setattr(os, "access", lambda name, _: name != "/dev/nvidia12")
    assert device_files() == {f"/dev/{name}" for name in files if name != "nvidia12"}
