"""What arrives in a folder is captioned once, when it is whole, until the job is told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etenet.cli import main
from etenet.errors import UsageError
from etenet.jobs import formats, run, watch
from etenet.jobs.inputs import JobClip
from etenet.jobs.journal import Record
from etenet.jobs.progress import Summary
from etenet.jobs.run import KeyedRecords, OnSegments
from etenet.jobs.watch import Watch
from etenet.video.segments import Cut
from tests.conftest import CAPTION, EXAMPLES, HERE, REPOSITORY, Server, wait_until
from tests.test_tars import write_tar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is for a watch."""
    now = [0.0]
    monkeypatch.setattr(watch, "time", type("clock", (), {"monotonic": lambda: now[0]}))
    return now


def test_a_file_is_whole_when_it_has_stood_still(tmp_path: Path, clock: list[float]) -> None:
    watched, clip = Watch([str(tmp_path)], still_s=2), tmp_path / "deep" / "clip.mp4"
    clip.parent.mkdir()
    clip.touch()
    for second in range(13):
        clock[0] = second
        assert watched.look() == []
        if 5 < second < 12:
            clip.write_bytes(b"x" * second)
    os.utime(clip, (1, 1))  # as programs do that keep times
    assert watched.look() == []
    clock[0] += 1.9
    assert watched.look() == []
    clock[0] += 0.1
    assert watched.look() == [clip]
    clock[0] += 100
    assert watched.look() == []


def test_a_file_that_is_open_for_writing_is_not_whole_however_long_it_stands_still(
    tmp_path: Path, clock: list[float]
) -> None:
    watched, clip = Watch([str(tmp_path)], still_s=2), tmp_path / "clip.mp4"
    with clip.open("wb") as file:
        file.write(b"half")
        file.flush()
        for _ in range(5):
            clock[0] += 10
            assert watched.look() == []
    assert watched.look() == [clip]


def test_a_writer_that_comes_while_a_file_is_looked_at_ends_nothing(tmp_path: Path) -> None:
    """Leases end with a signal, which ends a process that does not expect it."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"whole")
    code = "import sys\nfor _ in range(3000): open(sys.argv[1], 'ab').close()"
    with subprocess.Popen([sys.executable, "-c", code, str(clip)]) as writer:
        looks = 0
        while writer.poll() is None:
            Watch([str(tmp_path)], still_s=0).look()
            looks += 1
    assert writer.returncode == 0
    assert looks > 0


def test_a_folder_that_cannot_be_read_for_a_while_makes_nothing_new(tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    (folder / "a.mp4").write_text("a")
    watched = Watch([str(folder)], still_s=0)
    assert watched.look() == [folder / "a.mp4"]
    folder.rename(tmp_path / "away")
    assert watched.look() == []
    (tmp_path / "away").rename(folder)
    (folder / "b.mp4").write_text("b")
    assert watched.look() == [folder / "b.mp4"]


def test_names_that_are_not_final_are_waited_for(tmp_path: Path) -> None:
    """As rsync, browsers and careful programs have them."""
    watched = Watch([str(tmp_path)], still_s=0)
    for name in (".a.mp4.Xy12Zw", ".hidden.mp4", "a.mp4.part", "a.mp4.crdownload", "notes.txt"):
        (tmp_path / name).write_text("half")
    assert watched.look() == []
    (tmp_path / ".a.mp4.Xy12Zw").rename(tmp_path / "a.mp4")
    assert watched.look() == [tmp_path / "a.mp4"]
    (tmp_path / "a.mp4").rename(tmp_path / "taken away")
    assert watched.look() == []
    (tmp_path / "a.mp4").write_text("another")
    assert watched.look() == [tmp_path / "a.mp4"]


def echo(bodies: Iterable[tuple[str, bytes, Cut]], _on_segments: OnSegments) -> KeyedRecords:
    for key, body, _ in bodies:
        yield key, {"error": {"code": "bad", "message": "bad"}} if body == b"bad" else {"caption": body.decode()}


def records(path: Path) -> list[Record]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def _outlived(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks that do not take long; and a SIGTERM that nobody expects ends no tests."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.02)
    monkeypatch.setitem(Watch.__init__.__kwdefaults__, "still_s", 0.1)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def while_running(job: Callable[[], Any], steps: Iterable[Callable[[], object]], end: signal.Signals) -> Any:
    """The result of a job that gets a signal after these steps, each of which waits for what it needs."""
    errors: list[BaseException] = []
    ended = threading.Event()

    def outside() -> None:
        try:
            for step in steps:
                step()
        except BaseException as error:
            errors.append(error)
        if not ended.is_set():  # otherwise it would end the tests
            os.kill(os.getpid(), end)

    thread = threading.Thread(target=outside)
    thread.start()
    try:
        result = job()
    finally:
        ended.set()
        thread.join()
    assert errors == []
    return result


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_each_clip_that_arrives_is_captioned_once_also_after_a_new_start(end: signal.Signals, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out" / "captions.csv"
    folder.mkdir()
    (folder / "0.mp4").write_text("there before")
    journal = out.with_name("captions.csv.jsonl")

    def job() -> Summary:
        engine = run.of_bodies(echo, 1000)
        return run.run([], engine, out=out, format=formats.format_for(None, out), watch=Watch([str(folder)]))

    def there(count: int) -> Callable[[], None]:
        return lambda: wait_until(lambda: len(records(journal)) == count, 20)

    first = [
        there(1),
        lambda: (folder / "1.mp4").write_text("one"),
        there(2),
        lambda: (folder / "2.mp4").write_bytes(b"bad"),
        lambda: write_tar(folder / "3.tar", [("000.mp4", b"in a tar"), ("001.mp4", b"too")]),
        lambda: (folder / "4.tar").write_bytes(b"no tar at all"),
        there(6),
    ]
    summary = while_running(job, first, end)
    assert (summary.total, summary.captioned, summary.failed) == (6, 4, 2)
    captions = {Path(record["video"]).name: record.get("caption") for record in records(journal)}
    assert captions == {
        **{"0.mp4": "there before", "1.mp4": "one", "2.mp4": None},
        **{"000.mp4": "in a tar", "001.mp4": "too", "4.tar": None},
    }
    assert len(out.read_text().splitlines()) == 7
    (folder / "5.mp4").write_text("while it did not run")
    summary = while_running(job, [there(7)], end)
    assert (summary.total, summary.captioned) == (1, 1)
    assert len(out.read_text().splitlines()) == 8


def test_another_file_of_a_name_that_is_just_captioned_is_not_captioned_too(tmp_path: Path) -> None:
    class Replaced(Watch):
        def rounds(self, _meanwhile: object = None) -> Iterator[Iterator[JobClip]]:
            clip = JobClip("a", "a.mp4")
            yield iter([clip, clip])
            yield iter([clip])
            raise KeyboardInterrupt

    def engine(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
        for clip in list(clips):  # engines read ahead
            yield {"video": clip.video, "caption": "one"}

    out = tmp_path / "captions.jsonl"
    summary = run.run([], engine, out=out, watch=Replaced([str(tmp_path)]))
    assert len(records(out)) == summary.total == summary.captioned == 1


@pytest.mark.parametrize("engine", ["here", "server"])
def test_clips_that_are_dropped_into_a_folder_get_their_captions(
    engine: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "captions.jsonl"
    folder.mkdir()

    def drop(name: str) -> Callable[[], None]:
        def dropped() -> None:
            count = len(records(out))
            (folder / f".{name}").write_bytes((REPOSITORY / "examples" / name).read_bytes())
            (folder / f".{name}").rename(folder / name)
            wait_until(lambda: len(records(out)) == count + 1, 60)

        return dropped

    where = ["--server", server.inference] if engine == "server" else HERE
    command = ["caption", "--watch", str(folder), "--out", str(out), *where]
    assert while_running(lambda: main(command), map(drop, EXAMPLES), signal.SIGTERM) == 0
    assert {Path(record["video"]).name: record["caption"] for record in records(out)} == EXAMPLES
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"etenet caption: watching {folder}; ")
    assert last.startswith(f"etenet caption: {len(EXAMPLES)} of {len(EXAMPLES)} clips, 0 failed, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-order"], "--in-order needs all clips before the first, and --watch waits for more; leave one out"),
        (["--sample", "3"], "--sample needs all clips before the first, and --watch waits for more; leave one out"),
        (["--shard", "1/2"], "--shard needs all clips before the first, and --watch waits for more; leave one out"),
        (["--engine", "ray"], "--watch captions in this process or by a --server; leave out --engine ray"),
        (["--format", "csv"], "--watch prints lines; for csv, name a file with --out"),
        (
            ["--segment-s", "2", "--out", "a.vtt"],
            "a.vtt is one file, and further videos arrive; name a folder with --out",
        ),
    ],
)
def test_what_needs_all_clips_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CAPTION, "--watch", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"etenet caption: {message}\n"


def test_shards_are_not_written_to_where_they_would_be_captioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deeper").mkdir()
    for out in (tmp_path / "out-%06d.tar", tmp_path / "deeper" / "out.tar"):
        assert main([*CAPTION, "--watch", str(tmp_path), "--out", str(out)]) == 2
        assert f"{out} would arrive in a folder that is watched; name another place" in capsys.readouterr().err


def test_only_folders_are_watched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--watch needs folders, and '.*/gone' is none; make it, or name another$"):
        Watch([str(tmp_path), str(tmp_path / "gone")])
