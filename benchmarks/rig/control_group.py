"""A control group with a quota of processor time, as a container has one. It can be made by root on many machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 100_000
_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def control_group(cores: float) -> Iterator[Callable[[], None] | None]:
    """A function that puts this process, and what it starts from then on, into a new group with so many cores' time.

    None where no group can be made. At the end this process is where it was; the others have ended by then.
    """
    v1 = (_V1 / "cpu.cfs_quota_us").exists()
    top, quota = _V1 if v1 else _V2, round(cores * PERIOD_US)
    group, before = top / f"etenet-{os.getpid()}", _group_of_this_process("cpu" if v1 else "", top)
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            if v1:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / ("cpu.cfs_quota_us" if v1 else "cpu.max")).write_text(str(quota) if v1 else f"{quota} {PERIOD_US}")
        except OSError:
            yield None
            return
        yield lambda: _move_to(group)
    finally:
        _move_to(before)
        group.rmdir()


def _move_to(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _group_of_this_process(controller: str, top: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return top / path.lstrip("/")
    return top
