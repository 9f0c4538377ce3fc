"""Files are replaced as a whole, and a log keeps every line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etenet.errors import CannotWrite
from etenet.files import AppendOnlyLog, replacing, require_replaceable, sha256


def entries(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_file_that_is_not_written_to_its_end_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half of the new, and an error: %d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_replaced_is_found_before_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, pipe = (tmp_path / name for name in ("file", "folder", "pipe"))
    file.write_bytes(b"before")
    folder.mkdir()
    os.mkfifo(pipe)
    before = sorted(tmp_path.rglob("*"))
    possible, impossible = [file, folder / "deep" / "new"], [folder, pipe, file / "below", Path("/dev/null")]
    require_replaceable(*possible)
    for path in impossible:
        for find in (require_replaceable, lambda path: replacing(path).__enter__()):
            with pytest.raises(CannotWrite, match=rf"^cannot write {path}: .*; fix that, or name another file$"):
                find(path)
    monkeypatch.setattr(
        "tempfile.TemporaryFile", Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    )
    for path in possible:  # root may write everywhere
        with pytest.raises(CannotWrite, match=rf"^cannot write {path}: Permission denied"):
            require_replaceable(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_bytes() == b"before"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_for_whom_the_user_lets(umask: int, mode: int, tmp_path: Path) -> None:
    def modes() -> set[int]:
        return {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    before = os.umask(umask)
    try:
        with AppendOnlyLog(tmp_path / "log") as log, replacing(tmp_path / "file"):
            log.add({})
            log.rewrite([{}])
    finally:
        os.umask(before)
    assert modes() == {mode}
    for path in tmp_path.iterdir():
        with replacing(path):
            pass
    assert modes() == {mode}


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10_000)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    for number in range(3):
        with AppendOnlyLog(path) as log:
            assert [json.loads(line) for line in log.lines()] == list(range(number))
            log.add(number)
            assert entries(path)[-1] == number
    with AppendOnlyLog(path) as log:
        log.rewrite(json.loads(line) * 2 for line in log.lines())
        log.add("more")
    assert entries(path) == [0, 2, 4, "more"]


@given(values=st.lists(st.dictionaries(st.text(), st.text(st.characters()))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_every_text_is_one_line_and_comes_back(values: list[dict[str, str]], tmp_path: Path) -> None:
    """Also lone surrogates, which stand for the bytes of file names that are not UTF-8."""
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    with AppendOnlyLog(path) as log:
        for value in values:
            log.add(value)
    assert entries(path) == values


@pytest.mark.parametrize("half", [b"", b"{", b'{"row": 7', b"x" * 70_000, b"x" * 65_536])
@pytest.mark.parametrize("whole", [b"", b"1\n", b"1\n" * 40_000])
def test_half_a_line_is_recognised_and_cut_off_on_request(half: bytes, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + half)
    with AppendOnlyLog(path) as log:
        assert [line for line in log.lines() if not line.endswith(b"\n")] == ([half] if half else [])
        assert path.read_bytes() == whole + half
        log.cut_off_half_line()
        log.add(2)
    assert path.read_bytes() == whole + b"2\n"


def test_what_was_added_outlives_a_kill_and_the_lock_does_not(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import os, signal, sys, pathlib; from etenet.files import AppendOnlyLog\n"
        "log = AppendOnlyLog(pathlib.Path(sys.argv[1]))\n"
        "for number in range(100): log.add(number)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    with AppendOnlyLog(path) as log:
        log.add(100)
    assert entries(path) == list(range(101))


def test_a_second_writer_is_refused_also_after_the_first_wrote_the_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AppendOnlyLog(path) as log:
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                AppendOnlyLog(path)
            log.rewrite([1])
    with AppendOnlyLog(path):
        pass


def test_a_log_that_is_replaced_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what is added would go to the old file, which has no name any more."""
    path, flock = tmp_path / "log.jsonl", fcntl.flock

    def replaced_first(file: IO[bytes], operation: int) -> None:
        with replacing(path) as new:
            new.write(b"1\n")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_first)
    with pytest.raises(BlockingIOError):
        AppendOnlyLog(path)


def test_a_full_disk_is_reported_although_a_part_of_the_line_is_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "log.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with AppendOnlyLog(path) as log:
            log.add("first")
            resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as raised:
                log.add("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == b'"first"\n"sec'
