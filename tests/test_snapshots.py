"""A snapshot is whole or absent, and a damaged one is detected."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.errors import UsageError
from tests.conftest import REPOSITORY
from tests.hostile.damage import with_one_bit_flipped
from training.loop import snapshots


def contents(step: int) -> dict[str, object]:
    return {"weights": torch.full((1000,), float(step)), "progress": {"step": step}}


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip_a_bit(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def test_the_newest_of_two_is_loaded_and_older_ones_are_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        snapshots.save(contents(step), tmp_path, step)
    loaded = snapshots.load_newest(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded["weights"], torch.full((1000,), 30.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_snapshot_is_reported_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots.save(contents(1), tmp_path, 1)
    newest = snapshots.save(contents(2), tmp_path, 2)
    flip_a_bit(newest)
    loaded = snapshots.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["progress"] == {"step": 1}
    assert f"{newest} is damaged" in capsys.readouterr().err


def test_no_flipped_bit_of_a_snapshot_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots.save(contents(1), tmp_path, 1)
    newest = snapshots.save(contents(2), tmp_path, 2)
    whole, rng = newest.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        newest.write_bytes(with_one_bit_flipped(whole, rng))
        loaded = snapshots.load_newest(tmp_path)
        assert loaded is not None
        assert loaded["progress"] == {"step": 1}
        assert f"{newest} is damaged" in capsys.readouterr().err


def test_when_all_are_damaged_nothing_is_trained(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(snapshots.save(contents(step), tmp_path, step))
    with pytest.raises(UsageError, match=r"all snapshots in .* are damaged"):
        snapshots.load_newest(tmp_path)


def test_a_full_disk_leaves_earlier_snapshots_whole(tmp_path: Path) -> None:
    snapshots.save(contents(1), tmp_path, 1)
    with files_no_larger_than(2000), pytest.raises(UsageError, match="free some space and continue with --resume"):
        snapshots.save(contents(2), tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 1
    loaded = snapshots.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["progress"] == {"step": 1}


def test_unfinished_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    assert snapshots.load_newest(tmp_path) is None
    (tmp_path / ".step-00000001-x").write_bytes(b"half")
    snapshots.save(contents(1), tmp_path, 1)
    snapshots.load_newest(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


KILLED_SAVES = """
import os, signal, sys
from pathlib import Path
from training.loop import snapshots
from tests.test_snapshots import contents


def killed_at(call, after):
    def kill(*arguments, **options):
        if after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    real = getattr(os, call)
    setattr(os, call, kill)


for call in ("fsync", "replace"):
    for after in (False, True):
        folder = Path(sys.argv[1]) / f"{call} {after}"
        snapshots.save(contents(1), folder, 1)
        if not os.fork():
            killed_at(call, after)
            snapshots.save(contents(2), folder, 2)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
"""


def test_a_kill_during_a_save_leaves_the_previous_snapshot_or_the_whole_new_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_SAVES, str(tmp_path)], cwd=REPOSITORY, check=True)
    loaded = {folder.name: snapshots.load_newest(folder) for folder in tmp_path.iterdir()}
    steps = {name: contents["progress"]["step"] for name, contents in loaded.items() if contents is not None}
    assert len(steps) == 4
    assert {name for name, step in steps.items() if step == 2} == {"replace True"}
    for name, contents in loaded.items():
        assert contents is not None
        assert torch.equal(contents["weights"], torch.full((1000,), float(steps[name])))
