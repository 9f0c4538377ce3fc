"""A full disk ends every command in one line that names the file, and costs nothing that was written before.

A limit on the size of files (setrlimit(2)) stands for the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import pytest

from benchmarks.rig.servers import config_on_free_ports
from etenet.cli import main
from etenet.errors import CannotWrite, EtenetError
from etenet.files import replacing, require_replaceable
from etenet.jobs import run
from etenet.jobs.formats import FORMATS, Format
from etenet.jobs.inputs import JobClip
from etenet.jobs.journal import Job, Record
from etenet.jobs.run import OnSegments
from etenet.serving import archive
from tests.test_snapshots import files_no_larger_than

CLIPS = [JobClip(f"{number}.mp4", f"{number}.mp4") for number in range(20)]
JOB = Job(checkpoint=f"sha256:{'1' * 64}", settings={})
SEGMENTS = [{"start_s": 0.0, "end_s": 1.0, "caption": "a dog"}]
SIZES_BYTES = (0, 300, 600, 1000, 1500, 2500, 80_000)
HOWS = [{}, {"in_order": True}, {"retry_failed": True}, {"overwrite": True}]


def backwards(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
    for clip in reversed(list(clips)):
        failed = {"error": {"code": "bad", "message": "bad"}}
        yield {"video": clip.video, **(failed if clip.video == "3.mp4" else {"segments": SEGMENTS})}


def do(clips: list[JobClip], out: Path, format: Format, how: dict[str, bool]) -> None:
    run.run(clips, backwards, out=out, format=format, job=JOB, about="...", **how)  # type: ignore[arg-type]


def captioned(journal: Path) -> set[str]:
    """The clips with captions. The end of the last line may be missing."""
    lines = journal.read_text().splitlines(keepends=True)
    return {
        record["video"]
        for record in (json.loads(line) for line in lines if line.endswith("\n"))
        if "segments" in record
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.usefixtures("capsys")  # else what is printed counts as a file
def test_a_job_on_a_full_disk_stops_with_one_line_and_goes_on_later(
    name: str, how: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = FORMATS[name]
    monkeypatch.chdir(tmp_path)
    for clip in CLIPS:
        Path(clip.path).write_bytes(b"video")
    stopped = 0
    for size_bytes in SIZES_BYTES:
        folder = tmp_path / str(size_bytes)
        out = folder / ("out" if format.file_per_video else f"out{format.suffix}")
        journal = out if name == "jsonl" else folder / f"{out.name}.jsonl"
        do(CLIPS[:3], out, format, {})
        before = captioned(journal)
        try:
            with files_no_larger_than(size_bytes):
                do(CLIPS, out, format, how)
        except EtenetError as error:
            stopped += 1
            assert str(error).startswith("cannot write ") and str(folder) in str(error), str(error)  # noqa: PT017, PT018
            assert "\n" not in str(error)  # noqa: PT017
            assert how.get("overwrite") or captioned(journal) >= before
        do(CLIPS, out, format, {})
        records = [json.loads(line)["video"] for line in journal.read_text().splitlines()]
        assert sorted(records) == sorted(clip.video for clip in CLIPS)
    assert 0 < stopped < len(SIZES_BYTES)


@pytest.mark.parametrize(
    ("kind", "suffix"), [*product(("device", "pipe"), (".jsonl", ".csv")), ("loop of links", ".jsonl")]
)
@pytest.mark.usefixtures("capsys")
def test_what_is_no_file_is_neither_read_nor_replaced(kind: str, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    if kind == "device":
        out.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "loop of links":
        out.symlink_to(out)
    before = os.lstat(out).st_mode
    for how in HOWS:
        with pytest.raises(EtenetError, match=r"^cannot write .*: .*; .*$"):
            do(CLIPS, out, FORMATS[suffix[1:]], how)
    assert os.lstat(out).st_mode == before


@pytest.mark.usefixtures("capsys")
def test_a_file_that_cannot_be_replaced_is_named_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with (
        pytest.raises(CannotWrite, match=rf"^cannot write {path}: File too large; .*$"),
        files_no_larger_than(10),
        replacing(path) as file,
    ):
        file.write(bytes(100))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CannotWrite, match=rf"^cannot write {path}/below: .*$"), replacing(path / "below"):
        pass


@pytest.mark.parametrize(
    "command", ["init --encoder squeezenet1_1 --words WORDS --out OUT", "package CHECKPOINT --out OUT"]
)
def test_a_command_on_a_full_disk_names_the_file(
    command: str, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = tmp_path / "words.txt", tmp_path / "folder" / "out.mar"
    words.write_text("a dog runs")
    names = {"WORDS": str(words), "OUT": str(out), "CHECKPOINT": str(small_checkpoint)}
    with files_no_larger_than(100_000):
        assert main([names.get(word, word) for word in command.split()]) == 2
    printed = capsys.readouterr().err
    assert f": cannot write {out}: File too large; fix that, or name another file\n" in printed
    assert "Traceback" not in printed
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("how", ["", "--gpu", "--int8 --calibrate missing"])
@pytest.mark.parametrize(
    ("out", "fault"),
    [
        ("folder", "it is no regular file"),
        ("file/etenet.mar", "Not a directory"),
        ("file/below/etenet.mar", "Not a directory"),
        ("/proc/self/etenet.mar", "No such file or directory"),  # where not even root can write
        ("/proc/self/below/etenet.mar", "No such file or directory"),
    ],
)
def test_an_archive_that_could_not_be_written_is_refused_before_anything_is_compiled(
    out: str,
    fault: str,
    how: str,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late(*_: object, **__: object) -> None:
        pytest.fail("it was packaged")

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(archive, "package", too_late)
    assert main(["package", str(small_checkpoint), "--out", str(tmp_path / out), *how.split()]) == 2
    expected = f"etenet package: cannot write {tmp_path / out}: {fault}; fix that, or name another file\n"
    assert capsys.readouterr().err == expected


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    (there := tmp_path / "there").write_bytes(b"before")
    for path in (there, tmp_path / "new", tmp_path / "some" / "folder" / "new"):
        require_replaceable(path)
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_bytes() == b"before"


@pytest.mark.parametrize("command", ["package CHECKPOINT --out OUT", "serve --config CONFIG --checkpoint CHECKPOINT"])
def test_a_full_folder_for_temporary_files_is_one_line(
    command: str,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    names = {
        "CHECKPOINT": str(small_checkpoint),
        "OUT": str(tmp_path / "out.mar"),
        "CONFIG": str(config_on_free_ports(tmp_path)),
    }
    assert main([names.get(word, word) for word in command.split()]) in (1, 2)
    assert str(tmp_path / "missing") in capsys.readouterr().err.splitlines()[-1]
