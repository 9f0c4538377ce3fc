"""Arrays on the disk: a full one is an error in one line, never a signal that kills the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from etenet.errors import UsageError
from etenet.model.checkpoint import Checkpoint
from tests.conftest import REPOSITORY
from tests.test_stages import stills
from tests.test_step import PREPROCESSING, VOCABULARY, trainee
from training.data import given_features
from training.data.arrays import new_array
from training.evaluation import features
from training.evaluation.features import features_of
from training.loop.features import cached_features
from training.loop.processes import Processes

MEGABYTE_DISK = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
COPIES_FEATURES = """
import sys
from pathlib import Path
from etenet.errors import UsageError
from training.data.given_features import copy
try:
    copy(*map(Path, sys.argv[1:]))
except UsageError as error:
    sys.exit(str(error))
"""


def test_a_new_array_is_zero_and_its_place_on_the_disk_is_taken(tmp_path: Path) -> None:
    array = new_array(tmp_path / "array.npy", np.float32, (1000, 100))
    there = (tmp_path / "array.npy").stat()
    assert there.st_blocks * 512 >= there.st_size > array.nbytes
    assert not array.any()
    array[999] = 1
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), array)


def copied(folder: Path) -> None:
    np.save(folder / "given.npy", np.ones((3, 16, 8), np.float32))
    given_features.copy(folder / "given.npy", folder / "features.npy")


def of_a_stage(folder: Path) -> None:
    network, dataset = trainee().float(), stills(folder)
    cached_features(network, dataset, folder / "features.npy", batch_clips=2, processes=Processes())


def of_an_evaluation(folder: Path) -> None:
    dataset, captioner = (
        stills(folder),
        SimpleNamespace(checkpoint=Checkpoint(trainee().model, VOCABULARY, PREPROCESSING)),
    )
    features_of(captioner, dataset, dataset.clips["train"], folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [copied, of_a_stage, of_an_evaluation])
def test_features_that_do_not_fit_on_the_disk_are_not_begun(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    whole = r"^cannot write .*\.(partial|unfinished), which needs 0\.0 GB: No space left on device; make room, or .*$"
    with pytest.raises(UsageError, match=whole):
        write(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".unfinished")]


def test_a_disk_that_is_really_full_kills_nothing(tmp_path: Path) -> None:
    as_root = ["unshare", "--user", "--map-root-user", "--mount"]
    disk, given = tmp_path / "disk", tmp_path / "given.npy"
    disk.mkdir()
    mounted = [*as_root, "sh", "-c", MEGABYTE_DISK, str(disk)]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    np.save(given, np.ones((100, 100, 100), np.float32))
    command = [*mounted, sys.executable, "-c", COPIES_FEATURES, str(given), str(disk / "features.npy")]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended
    assert ended.stderr.startswith(f"cannot write {disk}/features.npy.partial, which needs 0.0 GB: No space left on")


@pytest.mark.parametrize("write", [of_a_stage, of_an_evaluation])
def test_kept_features_that_were_cut_off_are_named(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_encoded", lambda *_: [np.zeros((3, 512), np.float32)])
    write(tmp_path)
    (kept,) = tmp_path.glob("*.npy")
    os.truncate(kept, kept.stat().st_size - 1)
    with pytest.raises(UsageError, match=rf"^{kept} is damaged or cut off; delete it: it is then computed again$"):
        write(tmp_path)
