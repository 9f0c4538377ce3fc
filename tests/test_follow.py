"""`etenet caption --follow`: each segment is printed when it has a caption, once and in order, whichever the engine."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from etenet.captioning.captioner import Captioner
from etenet.cli import main
from etenet.jobs import follow, formats, run
from etenet.jobs.inputs import JobClip
from etenet.jobs.journal import Record
from etenet.jobs.run import OnSegments
from tests.conftest import CAPTION, EXAMPLES, HERE, REPOSITORY, Server
from tests.test_segments import FILM, PART_S

Capture = pytest.CaptureFixture[str]
LONG = ["--segment-s", "1.25"]  # 14 segments: more than are asked for at once


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    return path


@pytest.mark.parametrize("engine", ["local", "server"])
def test_what_is_printed_is_what_the_records_have(
    engine: str, server: Server, film: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "again.mp4").write_bytes(FILM)
    (tmp_path / "broken.mp4").write_bytes(FILM[:5000])
    out = tmp_path / "captions.jsonl"
    where = ["--server", server.inference] if engine == "server" else HERE
    assert main(["caption", str(tmp_path), "--out", str(out), *LONG, "--follow", *where]) == 1
    lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        lines[line.pop("video")].append(line)
    records = {record["video"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert lines == {
        video: record.get("segments", [{"error": record.get("error")}]) for video, record in records.items()
    }
    assert len(lines[str(film)]) == 14


def test_a_segment_is_printed_before_the_next_is_captioned(
    film: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    printed, before_each_search, search = [], [], Captioner.search

    def watched(captioner: Captioner, features: Mapping[int, Any], options: Mapping[int, Any]) -> Any:
        before_each_search.append(len(printed))
        return search(captioner, features, options)

    def show(text: bytes) -> None:
        printed.append(text)
        follow_show(text)

    follow_show = follow.show
    monkeypatch.setattr(follow, "show", show)
    monkeypatch.setattr(Captioner, "search", watched)
    assert main([*CAPTION, str(film), *LONG, "--follow"]) == 0
    assert before_each_search == list(range(14))
    assert capsys.readouterr().out.encode() == b"".join(printed)


def test_text_has_a_line_for_each_caption(film: Path, capsys: Capture) -> None:
    starts = [f"00:00:{number * PART_S:06.3f}" for number in range(len(EXAMPLES))]
    for how in (["--follow"], []):
        assert main([*CAPTION, str(film), "--segment-s", str(PART_S), "--format", "text", *how]) == 0
        columns = zip(*(line.split("\t") for line in capsys.readouterr().out.splitlines()), strict=True)
        videos, begin, end, captions = map(list, columns)
        assert (set(videos), begin, end[:-1], captions) == ({str(film)}, starts, starts[1:], list(EXAMPLES.values()))


def test_a_video_of_which_a_part_fails_is_printed_so_far(tmp_path: Path, capsys: Capture) -> None:
    """The engine sees what was printed while it still works."""
    segment = {"start_s": 0.0, "end_s": 1.0, "caption": "a dog runs"}
    error = {"error": {"code": "bad", "message": "bad"}}

    def engine(clips: Iterable[JobClip], on_segments: OnSegments) -> Iterator[Record]:
        for clip in clips:
            on_segments(clip.video, [{**segment, "frames": {"thumbnails": ["data:,"]}}], 2.0)
            assert json.loads(capsys.readouterr().out) == {"video": clip.video, **segment}
            yield {"video": clip.video, **error}

    for out in (None, tmp_path / "captions.csv"):
        format = formats.format_for(None, out)
        run.run([JobClip("a\tb", "a")], engine, out=out, format=format, follow=True)
        assert json.loads(capsys.readouterr().out) == {"video": "a\tb", **error}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "csv"], "--follow prints lines: give --format jsonl or text, or a file for the csv with --out"),
        (["--engine", "ray"], "--follow needs the captions in order"),
    ],
)
def test_what_cannot_be_followed_is_refused(film: Path, arguments: list[str], reason: str, capsys: Capture) -> None:
    assert main([*CAPTION, str(film), *LONG, "--follow", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
