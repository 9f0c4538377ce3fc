"""What processes ask of Linux."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from etenet.linux import cores
from tests.conftest import REPOSITORY, runs, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")

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
from etenet.linux import cores
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(cores())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"
    assert cores() == len(os.sched_getaffinity(0))
