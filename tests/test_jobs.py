"""Batch captioning: every clip once, whatever interrupts it, and the same from every engine."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.rig.servers import free_ports
from etenet.cli import main
from etenet.errors import JobStopped, TooManyPixels, UsageError
from etenet.jobs import formats, run
from etenet.jobs.inputs import JobClip
from etenet.jobs.journal import Journal, Record
from etenet.jobs.progress import Summary
from etenet.jobs.run import KeyedRecords, OnSegments
from etenet.linux import SPIN_COUNT
from etenet.scoring import caption_json
from etenet.video.sampling import sample_frames
from etenet.video.segments import Cut
from tests import clips
from tests.conftest import CAPTION, EXAMPLES, HERE, REPOSITORY, Server, wait_until
from tests.unreliable import Unreliable

CLIPS = 100
IN_FLIGHT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred clips that all differ, in two folders, and the examples. The names of some are not UTF-8."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS - len(EXAMPLES)):
        name = f"{number:03}.mp4" if number % 10 else os.fsdecode(b"\xe9 \xff%c.mp4" % (0x80 + number))
        path = folder / ("first" if number % 2 else "second/deeper") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clips.video(2 + number % 30, size=(32 + 2 * (number // 30), 32)))
    for name in EXAMPLES:
        (folder / name).write_bytes((REPOSITORY / "examples" / name).read_bytes())
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def records(path: Path) -> list[Record]:
    """The records of an output, of which the first also says what made it."""
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    first.pop("job", None)
    return [first, *rest]


def by_clip(path: Path) -> dict[str, Record]:
    """The records of an output. Fails if a clip is there twice."""
    of_file = records(path)
    assert max(Counter(record["video"] for record in of_file).values()) == 1
    return {record["video"]: record for record in of_file}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The records of an uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("expected") / "captions.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert main([*CAPTION, str(folder), "--out", str(out)]) == 0
    of_clips = by_clip(out)
    assert len(of_clips) == CLIPS
    assert {name: of_clips[str(folder / name)]["caption"] for name in EXAMPLES} == EXAMPLES
    return of_clips


def test_a_server_gives_the_same(folder: Path, expected: dict[str, Record], server: Server, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    assert main(["caption", str(folder), "--out", str(out), "--server", server.inference]) == 0
    assert by_clip(out) == expected


def test_real_clips_are_captioned_and_refused_alike(reference_data: Path, server: Server, tmp_path: Path) -> None:
    outs = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for out, where in zip(outs, (HERE, ["--server", server.inference]), strict=True):
        assert main(["caption", str(reference_data), "--out", str(out), *where]) == 1
    here, by_server = map(by_clip, outs)
    assert here == by_server
    assert Counter("caption" in record for record in here.values())[True] > 80


def title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.parametrize(
    "engine", ["server", *(pytest.param(engine, marks=pytest.mark.long) for engine in ("here", "ray"))]
)
def test_a_job_that_is_killed_again_and_again_ends_as_one_that_is_not(
    engine: str, folder: Path, expected: dict[str, Record], server: Server, tmp_path: Path
) -> None:
    """On Ray, the actor that captions is killed, too, also in the run that is not."""
    out, rng, done = tmp_path / "captions.jsonl", random.Random(engine), 0
    where = {
        "here": HERE,
        "server": ["--server", server.inference, "--workers", "2"],
        "ray": [*HERE, "--engine", "ray"],
    }
    command = [sys.executable, "-m", "etenet", "caption", str(folder), "--out", str(out), *where[engine]]

    @contextmanager
    def started(enough: int) -> Iterator[subprocess.Popen[str]]:
        """A job, once there are as many lines. It is killed at the end."""
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
            try:
                wait_until(lambda: lines(out) >= enough, 120)
                if engine == "ray":
                    kill_captioning_actors(job)
                yield job
            finally:
                job.kill()

    for _ in range(10):
        with started(done + rng.randint(1, 4)):
            pass
        done = lines(out)
        assert done < CLIPS, "it was done before it was killed often enough: give it more clips"
    with out.open("ab") as torn:
        torn.write(b'{"video": "half a li')
    with started(done + 1) as job:
        assert lines(out) < CLIPS
        assert job.wait(180) == 0
        assert job.stderr is not None
        assert f"{done} were done before" in job.stderr.read()
    assert by_clip(out) == expected


def kill_captioning_actors(job: subprocess.Popen[str]) -> None:
    actors = [process for process in psutil.Process(job.pid).children(recursive=True) if "_Captions" in title(process)]
    assert actors
    for actor in actors:
        assert actor.environ()["GOMP_SPINCOUNT"] == SPIN_COUNT
        actor.kill()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
def test_a_server_that_refuses_drops_and_starts_anew_costs_no_clip(
    folder: Path, expected: dict[str, Record], server: Server, tmp_path: Path
) -> None:
    out, (port,) = tmp_path / "captions.jsonl", free_ports(1)
    first = Unreliable(server, port)
    command = [sys.executable, "-m", "etenet", "caption", str(folder), "--out", str(out), "--workers", str(IN_FLIGHT)]
    job = subprocess.Popen([*command, "--server", f"http://127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    wait_until(lambda: lines(out) >= CLIPS // 3, 60)
    first.stop()
    assert lines(out) < CLIPS
    second = Unreliable(server, port)
    assert job.wait(120) == 0
    second.stop()
    assert second.responses > 0
    assert by_clip(out) == expected
    assert first.max_in_flight <= IN_FLIGHT
    assert second.max_in_flight <= IN_FLIGHT


def test_another_server_is_refused(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    clip = f"examples/{next(iter(EXAMPLES))}"
    for url, status in ((server.torchserve, 1), ("localhost:8080", 2)):
        assert main(["caption", clip, "--server", url]) == status
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines()[-1].startswith("etenet caption: ")


@pytest.mark.parametrize("engine", ["here", "server"])
def test_broken_clips_are_listed_and_all_others_are_captioned(
    engine: str, folder: Path, expected: dict[str, Record], server: Server, tmp_path: Path
) -> None:
    broken = {tmp_path / "videos" / f"broken{number}.mp4": clips.video(5)[: 300 * number] for number in range(5)}
    broken[tmp_path / "videos" / "large.mp4"] = b"x" * (64 * 2**20 + 1)
    for path, body in broken.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)
    out = tmp_path / "captions.jsonl"
    where = ["--server", server.inference] if engine == "server" else HERE
    assert main(["caption", str(folder), str(tmp_path / "videos"), "--out", str(out), *where]) == 1
    of_clips = by_clip(out)
    failed = {Path(video): record["error"]["code"] for video, record in of_clips.items() if "error" in record}
    assert set(failed) == set(broken)
    too_large = {"here": "not_a_video", "server": "too_large"}  # only a server guards itself against 64 MiB
    assert failed[tmp_path / "videos" / "large.mp4"] == too_large[engine]
    assert failed[tmp_path / "videos" / "broken0.mp4"] == "empty_body"
    assert {video: of_clips[video] for video in expected} == expected


def test_frames_that_a_server_refuses_are_captioned_here(tmp_path: Path) -> None:
    still = np.zeros((4320, 7680, 3), np.uint8)
    path, out = tmp_path / "8k.avi", tmp_path / "captions.jsonl"
    path.write_bytes(
        clips.video(pictures=[still], size=(7680, 4320), codec="mjpeg", pixels="yuvj420p", container="avi")
    )
    with pytest.raises(TooManyPixels):
        sample_frames(path.read_bytes(), resize_px=32)
    assert main(["caption", str(path), "--out", str(out), *HERE]) == 0


def echo(bodies: Iterable[tuple[str, bytes, Cut]], _on_segments: OnSegments) -> KeyedRecords:
    """An engine that answers in another order: the last of a few first."""
    few: list[tuple[str, Record]] = []
    for key, body, _ in bodies:
        few.append(
            (key, {"error": {"code": "bad", "message": "bad"}} if b"bad" in body else {"caption": body.decode()})
        )
        if len(few) == 5:
            yield from reversed(few)
            few.clear()
    yield from reversed(few)


@pytest.fixture
def texts(tmp_path: Path) -> list[JobClip]:
    """Clips that `echo` captions with what is in them."""
    of_texts = []
    for number in range(23):
        path = tmp_path / "texts" / f"{number:02}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{'bad' if number % 7 == 3 else 'a caption'} {number}")
        of_texts.append(JobClip(path.name, str(path)))
    return of_texts


def do(clips: list[JobClip], out: Path, engine: run.BodyEngine = echo, **how: Any) -> Summary:
    format = formats.format_for(None, out)
    return run.run(clips, run.of_bodies(engine, 1000), out=out, format=format, **how)


def test_the_output_has_the_order_of_the_input_on_request(texts: list[JobClip], tmp_path: Path) -> None:
    names = [clip.video for clip in texts]
    do(texts, tmp_path / "any.jsonl")
    assert [record["video"] for record in records(tmp_path / "any.jsonl")] != names
    do(texts, tmp_path / "ordered.jsonl", in_order=True)
    assert [record["video"] for record in records(tmp_path / "ordered.jsonl")] == names
    do(texts[10:], tmp_path / "both.jsonl")
    do(texts, tmp_path / "both.jsonl", in_order=True)
    assert [record["video"] for record in records(tmp_path / "both.jsonl")] == names


def test_failed_clips_are_tried_again_on_request(texts: list[JobClip], tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    first = do(texts, out)
    assert (first.captioned, first.failed) == (20, 3)
    again = do(texts, out)
    assert (again.total, again.before, again.failed_before) == (0, 23, 3)
    for clip in texts:
        Path(clip.path).write_text(Path(clip.path).read_text().replace("bad", "better"))
    fixed = do(texts, out, retry_failed=True)
    assert (fixed.total, fixed.captioned, fixed.before, fixed.failed_before) == (3, 3, 20, 0)
    assert {record["caption"].split()[0] for record in by_clip(out).values()} == {"a", "better"}


def test_the_same_bytes_are_captioned_once(texts: list[JobClip], tmp_path: Path) -> None:
    seen: list[bytes] = []

    def counting(bodies: Iterable[tuple[str, bytes, Cut]], on_segments: OnSegments) -> KeyedRecords:
        def counted() -> Iterator[tuple[str, bytes, Cut]]:
            for key, body, cut in bodies:
                seen.append(body)
                yield key, body, cut

        return echo(counted(), on_segments)

    again = [JobClip(f"{clip.video} again {number}", clip.path) for clip in texts for number in range(3)]
    many = [*again, *texts]  # some before their first is answered, some long after
    do(many, tmp_path / "captions.jsonl", counting)
    assert len(by_clip(tmp_path / "captions.jsonl")) == len(many)
    assert len(seen) == len(texts)


def test_no_more_is_read_than_the_engine_has_room_for(texts: list[JobClip]) -> None:
    taken = 0

    def endless() -> Iterator[JobClip]:
        nonlocal taken
        for taken, clip in enumerate(texts * 100):  # noqa: B007
            yield clip

    def idle(bodies: Iterable[tuple[str, bytes, Cut]], _on_segments: OnSegments) -> KeyedRecords:
        key, _, _ = next(iter(bodies))
        yield key, {"caption": "one"}

    assert next(run.of_bodies(idle, 1000)(endless(), lambda *_: None))["caption"] == "one"
    assert taken < 2 * run.READ_AHEAD


def test_films_from_urls_are_not_read_ahead_beyond_what_memory_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    film = bytes(run.READ_AHEAD_BYTES // run.READERS)
    read = 0

    def fetched(*_: object) -> bytes:
        nonlocal read
        read += 1
        return film

    monkeypatch.setattr(run, "read", fetched)
    ahead = run._read_ahead(
        (JobClip(f"s3://films/{number}.mp4", f"s3://films/{number}.mp4") for number in range(50)), 1
    )
    for taken, (_, body) in enumerate(ahead, start=1):
        assert body is film
        assert read <= taken + 2 * run.READERS


def test_a_file_that_goes_away_is_an_error_of_its_own(texts: list[JobClip], tmp_path: Path) -> None:
    Path(texts[5].path).unlink()
    Path(texts[6].path).write_text("x" * 2000)
    do(texts, tmp_path / "captions.jsonl")
    of_clips = by_clip(tmp_path / "captions.jsonl")
    assert of_clips["05"]["error"]["code"] == "unreadable_file"
    assert of_clips["06"]["error"]["code"] == "too_large"
    assert len(of_clips) == len(texts)


def test_a_table_has_all_clips_and_coco_those_that_can_be_scored(texts: list[JobClip], tmp_path: Path) -> None:
    do(texts, tmp_path / "captions.csv", in_order=True)
    table = list(csv.DictReader(io.StringIO((tmp_path / "captions.csv").read_text())))
    assert [row["video"] for row in table] == [clip.video for clip in texts]
    assert Counter(row["error_code"] for row in table) == {"": 20, "bad": 3}
    do(texts, tmp_path / "captions.json")
    predictions = {
        entry["image_id"]: entry["caption"] for entry in json.loads((tmp_path / "captions.json").read_text())
    }
    assert predictions == {row["video"]: row["caption"] for row in table if row["caption"]}
    assert caption_json.read(tmp_path / "captions.json") == {video: [caption] for video, caption in predictions.items()}


@pytest.mark.parametrize(
    "text", ["{}\n", "hello\n", '{"video": "a"}\n', '["video"]\n', "\x00\n", "hello", "x" * 70_000, '{"caption": "a']
)
def test_no_other_file_is_written_to(text: str, texts: list[JobClip], tmp_path: Path) -> None:
    out = tmp_path / "precious.jsonl"
    out.write_text(text)
    with pytest.raises(UsageError, match="name another file"):
        do(texts, out)
    assert out.read_text() == text


def test_two_jobs_do_not_write_one_file(texts: list[JobClip], tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    with Journal(out), pytest.raises(UsageError, match="another job"):
        do(texts, out)
    do(texts, out)
    assert len(by_clip(out)) == len(texts)


def test_a_full_disk_ends_the_job_and_it_goes_on_when_there_is_room(texts: list[JobClip], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel then writes a part of a line, and after it none."""
    out, whole = tmp_path / "captions.jsonl", tmp_path / "whole.jsonl"
    do(texts, whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size // 2, hard))
    try:
        with pytest.raises(JobStopped, match="start the job again"):
            do(texts, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not out.read_bytes().endswith(b"\n")
    do(texts, out)
    assert by_clip(out) == by_clip(whole)


@pytest.mark.parametrize("length", range(0, 200, 7))
def test_half_a_line_at_the_end_is_cut_off(length: int, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for name in ("a", "b", "c"):
            journal.add({"video": name, "caption": "something is going on " * 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with Journal(path) as journal:
        assert len(journal.done) == whole[:length].count(b"\n")
        journal.add({"video": "d", "caption": "more"})
    assert [record["video"] for record in records(path)] == [*"abc"[: whole[:length].count(b"\n")], "d"]
