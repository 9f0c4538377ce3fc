"""Long videos as jobs and over HTTP: every engine gives each segment the same caption, and nothing is lost."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webvtt

from etenet.cli import main
from tests import clips
from tests.conftest import CAPTION, EXAMPLES, HERE, REPOSITORY, Server, ask
from tests.test_segments import FILM, PART_S

TIMES_S = [(number * PART_S, (number + 1) * PART_S) for number in range(len(EXAMPLES))]
LONG = ["--segment-s", "1.25"]  # 14 segments: more than are asked for at once


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film, the same again, a clip shorter than a segment, and a broken one."""
    folder = tmp_path_factory.mktemp("films")
    for name in ("film.mp4", "deeper/again.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(FILM)
    (folder / "short.mp4").write_bytes(clips.video(20))
    (folder / "broken.mp4").write_bytes(FILM[:5000])
    return folder


def records(path: Path) -> dict[str, Any]:
    """What an output has about each video, without what its first line says about the job."""
    of_videos = {record.pop("video"): record for record in map(json.loads, path.read_text().splitlines())}
    for record in of_videos.values():
        record.pop("job", None)
    return of_videos


@pytest.fixture(scope="module")
def expected(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("expected") / "captions.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert main([*CAPTION, str(films), "--out", str(out), *LONG]) == 1
    of_films = records(out)
    assert of_films[str(films / "film.mp4")] == of_films[str(films / "deeper/again.mp4")]
    assert [segment["start_s"] for segment in of_films[str(films / "film.mp4")]["segments"]] == [
        1.25 * number for number in range(14)
    ]
    assert len(of_films[str(films / "short.mp4")]["segments"]) == 1
    assert of_films[str(films / "broken.mp4")]["error"]["code"] == "undecodable_video"
    return of_films


@pytest.mark.parametrize("engine", ["server", pytest.param("ray", marks=pytest.mark.long)])
def test_every_engine_gives_each_segment_the_same_caption(
    engine: str, films: Path, expected: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    where = ["--server", server.inference] if engine == "server" else [*HERE, "--engine", "ray"]
    command = [sys.executable, "-m", "etenet", "caption", str(films), "--out", str(out), *LONG, *where]
    assert subprocess.run(command, timeout=300, check=False).returncode == 1
    assert records(out) == expected


@pytest.mark.parametrize("engine", ["local", "server"])
def test_subtitles_of_a_job_count_from_the_start_of_the_file(engine: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "late.mkv").write_bytes(clips.with_sound(picture_starts_s=2, container="matroska"))
    out, where = tmp_path / "late.vtt", ["--server", server.inference] if engine == "server" else HERE
    assert main(["caption", str(tmp_path / "late.mkv"), "--out", str(out), "--segment-s", "1", *where]) == 0
    first, last = (webvtt.read(str(out)).captions[place] for place in (0, -1))
    assert (first.start[:10], last.end[:10]) == ("00:00:02.0", "00:00:04.0")


def test_the_cues_of_what_a_user_sent_begin_with_its_picture(reference_data: Path, tmp_path: Path) -> None:
    """Its sound begins at 0 s. Its description says 3 s for the picture; FFmpeg's own command shows it from 2.128 s."""
    path, out = reference_data.parent / "cases" / "I1-picture-starts-late.mkv", tmp_path / "late.srt"
    if not path.exists():
        pytest.skip("the cases are not part of the repository")
    assert main([*CAPTION, str(path), "--out", str(out), "--segment-s", "1"]) == 0
    (cue,) = webvtt.from_buffer(io.StringIO(out.read_text()), format="srt").captions
    assert (cue.start, cue.end) == ("00:00:02.128", "00:00:02.928")
    (record,) = records(tmp_path / "late.srt.jsonl").values()
    assert (record["picture_start_s"], record["segments"][0]["start_s"]) == (2.128, 0)


def test_parts_in_a_list_are_captioned_as_clips(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(FILM)
    rows = [{"path": "film.mp4", "start_s": start_s, "end_s": end_s} for start_s, end_s in TIMES_S]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "captions.jsonl"
    assert main([*CAPTION, str(tmp_path / "parts.jsonl"), "--out", str(out), "--in-order"]) == 0
    of_parts = records(out)
    assert [record["caption"] for record in of_parts.values()] == list(EXAMPLES.values())
    assert list(of_parts)[1] == "film.mp4#t=3,6"


@pytest.mark.parametrize("form", ["vtt", "srt"])
def test_a_film_is_subtitled_scene_by_scene(form: str, films: Path, tmp_path: Path) -> None:
    out = tmp_path / f"film.{form}"
    assert main([*CAPTION, str(films / "film.mp4"), "--out", str(out), "--segment", "scenes"]) == 0
    cues = list(webvtt.from_buffer(io.StringIO(out.read_text()), format=form))
    assert [cue.text for cue in cues] == list(EXAMPLES.values())
    assert [cue.start_in_seconds for cue in cues] == [start_s for start_s, _ in TIMES_S]
    assert list(records(tmp_path / f"film.{form}.jsonl")) == [str(films / "film.mp4")]


def test_several_films_have_a_file_each(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "subtitles"
    assert main([*CAPTION, str(films), "--out", str(out), "--format", "vtt", *LONG]) == 1
    written = sorted(path.relative_to(out / films.relative_to("/")) for path in out.rglob("*.vtt"))
    assert list(map(str, written)) == ["deeper/again.vtt", "film.vtt", "short.vtt"]
    capsys.readouterr()
    for wrong in (["--out", str(tmp_path / "one.vtt"), *LONG], ["--format", "srt", *LONG], ["--format", "srt"]):
        assert main([*CAPTION, str(films), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_subtitles_may_stand_beside_their_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (films := tmp_path / "films" / "deeper").mkdir(parents=True)
    (films / "a.mp4").write_bytes(clips.video(50))
    monkeypatch.chdir(tmp_path / "films")
    assert main([*CAPTION, ".", "--out", ".", "--format", "srt", "--segment-s", "1"]) == 0
    assert sorted(path.name for path in films.iterdir()) == ["a.mp4", "a.srt"]
    assert list(records(tmp_path / "films.jsonl")) == ["deeper/a.mp4"]


def test_a_table_has_a_row_for_each_segment(films: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    assert main([*CAPTION, str(films / "film.mp4"), str(films / "broken.mp4"), "--out", str(out), *LONG]) == 1
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    captioned = [row for row in rows if row["caption"]]
    assert [(float(row["start_s"]), float(row["end_s"]), row["caption"]) for row in captioned] == [
        tuple(segment.values()) for segment in expected[str(films / "film.mp4")]["segments"]
    ]
    assert [row["error_code"] for row in rows if not row["caption"]] == ["undecodable_video"]


def test_a_server_responds_in_the_format_that_the_client_accepts(server: Server) -> None:
    options = {"X-Etenet-Segment-S": str(PART_S)}
    response = ask(server.predictions, FILM, options)
    assert response.status == 200
    contents = response.json()
    assert [segment["caption"] for segment in contents["segments"]] == list(EXAMPLES.values())
    assert [segment["start_s"] for segment in contents["segments"]] == [start_s for start_s, _ in TIMES_S]
    assert contents["video"]["duration_s"] == contents["segments"][-1]["end_s"]
    for accept, form in (("text/vtt", "vtt"), ("application/x-subrip;q=0.9, */*", "srt")):
        written = ask(server.predictions, FILM, {**options, "Accept": accept})
        assert written.content_type.startswith(accept.partition(";")[0])
        cues = webvtt.from_buffer(io.StringIO(written.body.decode()), format=form)
        assert [cue.text for cue in cues] == list(EXAMPLES.values())
    plain = ask(server.predictions, FILM, {"X-Etenet-Segment": "scenes", "Accept": "text/plain"})
    assert plain.body.decode().splitlines() == list(EXAMPLES.values())
    one = ask(server.predictions, FILM, {"X-Etenet-Start-S": "3", "X-Etenet-End-S": "6", "Accept": "text/plain"})
    assert one.body.decode().splitlines() == [list(EXAMPLES.values())[1]]


def test_a_server_has_a_limit_and_names_it(server: Server) -> None:
    refused = ask(server.predictions, FILM, {"X-Etenet-Segment-S": "1"})
    assert refused.status == 400
    assert "more than 16 segments" in refused.json()["error"]["message"]
    some = ask(server.predictions, FILM, {"X-Etenet-Segment-S": "1", "X-Etenet-Max-Segments": "5"})
    assert some.json()["segments"][-1]["end_s"] == 5.0
