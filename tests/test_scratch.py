"""A server deletes what killed servers have left in a shared folder, and nothing else, whatever lies there."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path

import pytest

from etenet.errors import UsageError
from etenet.serving.scratch import scratch_folder


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def folder(shared: Path, name: str, mode: int = 0o700) -> Path:
    made = shared / f"etenet-{name}"
    made.mkdir()
    made.chmod(mode)
    (made / "precious").touch()
    return made


def test_only_folders_of_killed_servers_are_deleted_and_the_rest_is_named(shared: Path) -> None:
    abandoned = folder(shared, "abandoned")
    (abandoned / "lock").touch()
    running = folder(shared, "running")
    (running / "lock").touch()
    strange = [folder(shared, name) for name in ("fifo", "link", "socket", "folder")] + [folder(shared, "open", 0o777)]
    os.mkfifo(strange[0] / "lock")
    (strange[1] / "lock").symlink_to(shared / "elsewhere")
    (shared / "elsewhere").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(strange[2] / "lock"))
    (strange[3] / "lock").mkdir()
    (strange[4] / "lock").touch()
    target = folder(shared, "x").rename(shared / "target")
    (target / "lock").touch()
    link = shared / "etenet-linked"
    link.symlink_to(target)
    (shared / "etenet-notes").touch()
    said: list[str] = []
    with (running / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with scratch_folder(said.append) as made:
            assert not abandoned.exists()
            assert (made / "lock").is_file()
            with pytest.raises(BlockingIOError):  # systemd-tmpfiles tries that before it deletes what is old
                fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not made.exists()
    for left in (running, target, *strange):
        assert (left / "precious").exists(), left
    assert len(said) == len(strange) + 1
    for named in (*strange, link):
        assert any(line.startswith(f"{named} is left alone") for line in said), named


def test_the_folder_of_another_user_is_left_alone(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = folder(shared, "theirs")
    (theirs / "lock").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    said: list[str] = []
    with scratch_folder(said.append):
        assert (theirs / "precious").exists()
    assert len(said) == 1


def test_without_a_place_for_the_folder_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with (
        pytest.raises(UsageError, match=r"cannot make a folder in /nowhere: No such file.*set TMPDIR"),
        scratch_folder(print),
    ):
        pass


@pytest.mark.parametrize("name", ["a b", "a:b", "a\\b", "a%20b", "é", "l" * 77])
def test_a_folder_that_torchserve_cannot_use_is_refused_before_it_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (odd := tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    with (
        pytest.raises(UsageError, match=f"cannot use temporary files in {re.escape(str(odd))}: .*set TMPDIR"),
        scratch_folder(print),
    ):
        pass
    assert not list(odd.iterdir())
