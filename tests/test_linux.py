"""What processes ask of Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from etenet import linux
from etenet.linux import CORES_VARIABLE, cores
from tests.conftest import REPOSITORY, runs, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")

UNSET = {name: value for name, value in os.environ.items() if name not in (CORES_VARIABLE, "OMP_NUM_THREADS")}

# A parent that starts a child, prints its pid, and waits to be killed.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
child.wait()
"""
CHILD = """
import signal, sys, time
from etenet.linux import end_with_parent
end_with_parent(signal.SIGKILL, parent=int(sys.argv[1]))
print("ready", flush=True)
time.sleep(600)
"""


@contextmanager
def parent() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process and the pid of its child."""
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid, ready = process.stdout.readline().split()
        assert ready == "ready"
        try:
            yield process, int(pid)
        finally:
            process.kill()


def test_a_process_ends_with_its_parent() -> None:
    with parent() as (process, child):
        assert runs(child)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not runs(child), 10)


def test_a_process_whose_parent_has_ended_already_does_not_go_on() -> None:
    someone_else = str(os.getppid())
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, someone_else], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == f"the parent {someone_else} has ended\n"


def test_cores_are_those_that_this_process_may_use() -> None:
    code = """
import os
from etenet import linux
from etenet.linux import CORES_VARIABLE, cores
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(cores())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=UNSET, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "1\n"


V2, V1 = "cgroup2", "cgroup"
UNLIMITED = {"cpu.max": "max 100000\n"}


def process_in(folder: Path, kind: str, groups: dict[str, dict[str, str]], *, path: str, root: str = "/") -> Path:
    """What /proc says of a process in the group `path`, where the mount shows the tree from `root` downwards."""
    top = folder / "a mount" / "cpu"
    for name, files in groups.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (top / name / file).write_text(text)
    process = folder / "process"
    process.mkdir()
    escaped, options = str(top).replace(" ", "\\040"), "rw" if kind == V2 else "rw,cpu,cpuacct"
    elsewhere = f"40 1 0:9 / {folder}/memory rw - cgroup cgroup rw,memory\n"
    (process / "mountinfo").write_text(
        f"30 1 0:8 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n{elsewhere}"
        f"41 1 0:9 {root} {escaped} rw,nosuid shared:2 master:3 - {kind} {kind} {options}\n"
    )
    of_v1 = f"5:memory:{path}\n3:cpuacct,cpu:{path}\n1:name=systemd:{path}\n"
    (process / "cgroup").write_text(of_v1 if kind == V1 else f"0::{path}\n")
    return process


def quota_v1(us: int, period_us: int = 100_000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{us}\n", "cpu.cfs_period_us": f"{period_us}\n"}


@pytest.mark.parametrize(
    ("kind", "groups", "path", "root", "expected"),
    [
        (V2, {"": {}, "a": {"cpu.max": "200000 100000\n"}}, "/a", "/", 2),
        (V2, {"": {}, "a": {"cpu.max": "250000 100000\n"}}, "/a", "/", 3),  # rounded up
        (V2, {"": {}, "a": {"cpu.max": "1000 100000\n"}}, "/a", "/", 1),
        (V2, {"": {}, "a": UNLIMITED}, "/a", "/", 64),
        (V2, {"": {}, "a": {"cpu.max": "300000 100000\n"}, "a/b c": UNLIMITED}, "/a/b c", "/", 3),  # of the one around
        (V2, {"": {"cpu.max": "400000 100000\n"}}, "/", "/", 4),  # a container with a name space of its own
        (V2, {"": {"cpu.max": "400000 100000\n"}}, "/../../elsewhere", "/", 4),
        (V2, {"": {"cpu.max": "nonsense\n"}}, "/", "/", 64),
        (V2, {}, "/gone", "/", 64),
        (V1, {"": quota_v1(-1), "docker/x": quota_v1(150_000)}, "/docker/x", "/", 2),
        (V1, {"": quota_v1(-1), "x": quota_v1(-1)}, "/x", "/", 64),
        (V1, {"": quota_v1(500_000)}, "/docker/x", "/docker/x", 5),  # a container without a name space
        (V1, {"": quota_v1(-1), "y": quota_v1(50_000, 25_000)}, "/docker/x/y", "/docker/x", 2),
    ],
)
def test_a_quota_of_processor_time_counts_as_so_many_cores(
    kind: str,
    groups: dict[str, dict[str, str]],
    path: str,
    root: str,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores(process_in(tmp_path, kind, groups, path=path, root=root), {}) == expected


def test_without_control_groups_affinity_alone_counts(tmp_path: Path) -> None:
    assert cores(tmp_path, {}) == len(os.sched_getaffinity(0))


def test_a_variable_overrules_affinity_and_quota(tmp_path: Path) -> None:
    process = process_in(tmp_path, V2, {"": {"cpu.max": "100000 100000\n"}}, path="/")
    assert [cores(process, {CORES_VARIABLE: text}) for text in ("7", " 3 ", "")] == [7, 3, 1]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_variable_that_is_no_number_of_cores_is_wrong_use(text: str) -> None:
    command = [sys.executable, "-m", "etenet", "score", "--predictions", "missing", "--references", "missing"]
    environment = {**UNSET, CORES_VARIABLE: text}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    message = f"ETENET_CORES must be a whole number of at least 1, got {text!r}; correct it"
    assert ended.stderr == f"etenet score: {message}\n"


def test_decoders_torch_and_batches_follow_one_count() -> None:
    code = """
import os
from etenet.linux import thread_settings
os.environ.update(thread_settings(os.environ))
from etenet.sandbox.pool import InProcess, Sandbox
import torch
print(len(Sandbox(resize_px=16).pids), InProcess(resize_px=16)._threads._max_workers, torch.get_num_threads())
"""
    environment = {**UNSET, CORES_VARIABLE: "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "1 1 1\n"


def test_a_thread_keeps_its_stack_for_signals() -> None:
    def stack() -> tuple[int, int]:
        now = linux._SignalStack()
        assert linux._libc.sigaltstack(None, ctypes.byref(now)) == 0
        return now.ss_sp, now.ss_flags

    memory = ctypes.create_string_buffer(2**16)
    other = linux._SignalStack(ctypes.addressof(memory), 0, len(memory))
    before = stack()
    with linux.same_signal_stack():
        assert linux._libc.sigaltstack(ctypes.byref(other), None) == 0
        assert stack()[0] == ctypes.addressof(memory)
    assert stack() == before
