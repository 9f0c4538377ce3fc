"""The output of a job at a URL: published at the start, every so often and at the end, and continued from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from etenet.cli import main
from etenet.errors import JobStopped, UsageError
from etenet.jobs import remote, run, watch
from etenet.jobs.formats import format_for
from etenet.jobs.inputs import JobClip, Source
from etenet.jobs.journal import Job, Record
from etenet.jobs.progress import Summary
from etenet.jobs.run import OnSegments
from tests.conftest import CAPTION, EXAMPLES, REPOSITORY

CLIPS = [JobClip(f"{number:02}.mp4", str(number)) for number in range(20)]
JOB = Job(checkpoint=f"sha256:{'1' * 64}", settings={})
MEMORY = fsspec.filesystem("memory")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are that are not published yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4()}/captions"


def do(url: str, suffix: str, *, killed_after: int = len(CLIPS), job: Job = JOB, **how: Any) -> Summary:
    segments = suffix == ""

    def engine(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
        for number, clip in enumerate(clips):
            if number == killed_after:
                raise Killed
            of_clip = {"caption": f"clip {clip.path}"}
            yield {
                "video": clip.video,
                **({"segments": [{"start_s": 0.0, "end_s": 1.0, **of_clip}]} if segments else of_clip),
            }

    out, publication = remote.destination(url + suffix)
    format = format_for("vtt" if segments else None, out, segments=segments)
    return run.run(CLIPS, engine, out=out, format=format, publication=publication, job=job, **how)


def published(url: str) -> bytes:
    return bytes(MEMORY.cat_file(url.removeprefix("memory:/")))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".parquet"])
def test_what_is_published_is_what_is_written_here(suffix: str, url: str, tmp_path: Path, machine: Path) -> None:
    do(f"file://{tmp_path}/captions", suffix)
    do(url, suffix)
    assert published(url + suffix) == (tmp_path / f"captions{suffix}").read_bytes()
    assert not list(machine.rglob("captions*"))
    assert not list(REPOSITORY.glob("memory:*"))
    assert do(url, suffix).before == len(CLIPS)


def test_the_folder_on_this_machine_may_be_a_link(url: str, machine: Path, tmp_path: Path) -> None:
    """As where homes are small, and ~/.cache is on another disk."""
    (tmp_path / "large disk").mkdir()
    machine.symlink_to("large disk")
    for suffix in (".csv", ""):
        do(url, suffix)
    assert published(f"{url}.csv").count(b"\n") == 1 + len(CLIPS)
    assert published(f"{url}/07.vtt").startswith(b"WEBVTT")


def test_subtitles_are_a_folder_there(url: str) -> None:
    do(url, "")
    assert published(f"{url}/07.vtt").startswith(b"WEBVTT")
    assert len(MEMORY.find(url.removeprefix("memory:/"))) == len(CLIPS)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_job_that_is_killed_goes_on_here_and_elsewhere(
    suffix: str, elsewhere: bool, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing is lost; elsewhere, what came after the last time of publishing."""
    monkeypatch.setattr(remote, "PUBLISH_EVERY_S", 0.0)
    monkeypatch.setattr(remote, "UPLOAD_SHARE", 1e9)
    with pytest.raises(Killed):
        do(url, suffix, killed_after=7)
    journal = url + (".jsonl" if suffix == ".jsonl" else f"{suffix}.jsonl")
    assert published(journal).count(b"\n") == 7
    monkeypatch.setattr(remote, "PUBLISH_EVERY_S", 1e9)
    with pytest.raises(Killed):
        do(url, suffix, killed_after=5)
    assert published(journal).count(b"\n") == 7
    if elsewhere:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert do(url, suffix).before == (7 if elsewhere else 12)
    videos = [json.loads(line)["video"] for line in published(journal).splitlines()]
    assert videos == [clip.video for clip in CLIPS]


def test_what_was_done_elsewhere_meanwhile_is_not_lost(
    url: str, monkeypatch: pytest.MonkeyPatch, machine: Path
) -> None:
    with pytest.raises(Killed):
        do(url, ".jsonl", killed_after=3)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{machine} elsewhere")
    do(url, ".jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine))
    assert do(url, ".jsonl").before == len(CLIPS)
    assert published(f"{url}.jsonl").count(b"\n") == len(CLIPS)


def test_another_job_is_refused_there_too(url: str) -> None:
    do(url, ".jsonl")
    before, other = published(f"{url}.jsonl"), Job(checkpoint=f"sha256:{'2' * 64}", settings={})
    with pytest.raises(UsageError, match=rf"^{url}\.jsonl was made with checkpoint .*--overwrite"):
        do(url, ".jsonl", job=other)
    assert published(f"{url}.jsonl") == before
    assert do(url, ".jsonl", job=other, overwrite=True).before == 0
    assert other.checkpoint.encode() in published(f"{url}.jsonl")


class Stubborn(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem whose errors are of no kind that Python knows, as those of botocore."""

    protocol = "stubborn"
    refusals = 0

    class NoCredentials(Exception):
        pass

    def put_file(self, *arguments: Any, **more: Any) -> None:
        Stubborn.refusals -= 1
        if Stubborn.refusals >= 0:
            raise self.NoCredentials("no key for\nthis bucket")
        super().put_file(*arguments, **more)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "rb":
            raise self.NoCredentials("no key")
        return super()._open(path, mode, **more)


fsspec.register_implementation("stubborn", Stubborn, clobber=True)


def test_a_place_that_cannot_be_written_ends_the_job_before_the_first_clip() -> None:
    Stubborn.refusals = 1
    with pytest.raises(JobStopped, match=r"^cannot write stubborn://a/b\.jsonl: no key for this bucket; fix that"):
        do("stubborn://a/b", ".jsonl", killed_after=0)


def test_a_job_goes_on_while_it_cannot_publish(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "PUBLISH_EVERY_S", 0.0)
    monkeypatch.setattr(remote, "UPLOAD_SHARE", 1e9)
    Stubborn.refusals = 0
    out, publication = remote.destination("stubborn://a/c.jsonl")

    def engine(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
        for number, clip in enumerate(clips):
            Stubborn.refusals = 2 if number == 5 else Stubborn.refusals
            yield {"video": clip.video, "caption": "it goes on"}

    assert run.run(CLIPS, engine, out=out, publication=publication).captioned == len(CLIPS)
    assert capsys.readouterr().err.count("no key for this bucket; trying again later") == 2


def test_a_place_that_takes_nothing_is_tried_no_more_often_than_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = count()  # each look at the clock is a second later
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    Stubborn.refusals = 0
    out, publication = remote.destination("stubborn://a/d.jsonl")

    def engine(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
        for clip in clips:
            Stubborn.refusals = 10**6 if clip != clips[-1] else 0
            yield {"video": clip.video, "caption": "it goes on"}

    clips = [JobClip(f"{number}.mp4", "") for number in range(200)]
    assert run.run(clips, engine, out=out, publication=publication).captioned == len(clips)
    assert 1 <= capsys.readouterr().err.count("trying again later") <= 1 + len(clips) / remote.PUBLISH_EVERY_S


def test_what_a_watched_folder_gave_is_published_though_nothing_else_arrives(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(watch.Watch):
        looks = 0

        def look(self) -> list[Path]:
            self.looks += 1
            if self.looks == 50 or published(f"{url}.jsonl"):
                raise KeyboardInterrupt
            return [tmp_path / "a.mp4"] if self.looks == 1 else []

    def engine(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
        return ({"video": clip.video, "caption": "it waits for others"} for clip in clips)

    (tmp_path / "a.mp4").write_text("not a tar")
    seconds = count(step=10)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.0)
    out, publication = remote.destination(f"{url}.jsonl")
    quiet = Quiet([str(tmp_path)])
    run.run([], engine, out=out, publication=publication, watch=quiet)
    assert 2 < quiet.looks < 50


def test_a_clip_that_its_filesystem_does_not_give_is_an_error_of_its_own() -> None:
    assert run.read(Source("stubborn://a/b.mp4"), 100) == {
        "error": {"code": "unreadable_file", "message": "stubborn://a/b.mp4: cannot be read: no key"}
    }


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nothing://a/b.jsonl", "cannot write nothing://a/b.jsonl: Protocol not known: nothing; fix that, or name"),
        ("s3:/a/b.jsonl", "s3:/a/b.jsonl is no URL, and would be a folder here; write s3://a/b.jsonl"),
        ("memory://a/b.doc", "no format has names like b.doc; end it with .jsonl, "),
    ],
)
def test_a_url_that_cannot_be_is_refused_in_one_line(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["caption", str(REPOSITORY / "examples"), "--out", out]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_error_says_what_to_set(url: str) -> None:
    message = rf"^cannot write {url}: this user has no home \(HOME and XDG_CACHE_HOME are not set\); fix that"
    with pytest.raises(UsageError, match=message):
        remote.destination(url)


def test_the_command_publishes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main([*CAPTION, *(f"examples/{name}" for name in EXAMPLES), "--out", f"{url}.json"]) == 0
    captions = {Path(entry["image_id"]).name: entry["caption"] for entry in json.loads(published(f"{url}.json"))}
    assert captions == EXAMPLES
