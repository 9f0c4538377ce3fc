"""The inputs of a batch job name each clip once, in every kind of list."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from etenet.errors import UsageError
from etenet.jobs import inputs
from etenet.jobs.inputs import JobClip

CLIPS = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in folders, and two that are no videos."""
    folder = tmp_path / "videos"
    for number in range(CLIPS):
        path = folder / ("first" if number % 2 else "second/deeper") / f"{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "notes.txt").touch()
    (folder / "captions.json").touch()
    return folder


def manifest(tmp_path: Path, name: str, text: str) -> list[JobClip]:
    (tmp_path / name).write_text(text, newline="")
    return inputs.clips([str(tmp_path / name)])


def test_manifests_of_every_kind_name_the_same_clips(tmp_path: Path) -> None:
    wanted = [JobClip("one", f"{tmp_path}/a/1.mp4"), JobClip("two", f"{tmp_path}/b 2.mp4")]
    assert manifest(tmp_path, "m.csv", "path,video,note\na/1.mp4,one,x\nb 2.mp4,two,\n") == wanted
    rows = '{"video": "one", "path": "a/1.mp4"}\n\n{"path": "b 2.mp4", "video": "two", "captions": []}\n'
    assert manifest(tmp_path, "m.jsonl", rows) == wanted
    plain = [JobClip("a/1.mp4", f"{tmp_path}/a/1.mp4"), JobClip("b 2.mp4", f"{tmp_path}/b 2.mp4")]
    assert manifest(tmp_path, "m.txt", "a/1.mp4\n\n  b 2.mp4  \n") == plain
    assert manifest(tmp_path, "n.jsonl", '{"video": "a/1.mp4"}\n{"path": "b 2.mp4"}\n') == plain


def test_a_name_may_contain_what_some_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    names = ["a\u2028b\x85.mp4", 'VT\x0b, FF\x0c and "quotes".mp4', "[1] c.mp4\u2029"]
    wanted = [JobClip(name, f"{tmp_path}/{name}") for name in names]
    for end in ("\n", "\r\n", "\r"):
        assert manifest(tmp_path, "m.txt", end.join(names)) == wanted
        assert manifest(tmp_path, "m.jsonl", end.join(json.dumps({"path": name}) for name in names)) == wanted
        cells = ('"{}"'.format(name.replace('"', '""')) for name in names)
        assert manifest(tmp_path, "m.csv", end.join(("path", *cells))) == wanted
    assert manifest(tmp_path, "m.txt", "[1] c.mp4\n[2].mp4\n")[0].video == "[1] c.mp4"


def test_a_mistake_in_a_manifest_is_named_with_its_line(tmp_path: Path) -> None:
    for text, message in (
        ('{"path": "a"}\n\n{"path": "b", "path": "c"}', "m.jsonl, line 3: 'path' is twice in one object; keep one"),
        ('path,end_s\na,1\n"b\n",0\n', "m.jsonl, line 3: .*; a line of a manifest is a path, or has"),
        ('{"path": "a"}\n{"video": ""}', 'm.jsonl, line 2: no clip is named in {"video": ""}; a line of a'),
    ):
        with pytest.raises(UsageError, match=message):
            manifest(tmp_path, "m.jsonl", text)
    (tmp_path / "m.txt").write_bytes(b"a.mp4\n\xff.mp4\n")
    with pytest.raises(UsageError, match=r"m\.txt, line 2: this is not UTF-8"):
        inputs.clips([f"{tmp_path}/m.txt"])


def test_parts_of_files_have_their_seconds(tmp_path: Path) -> None:
    path = f"{tmp_path}/a.mp4"
    wanted = [JobClip("a.mp4", path), JobClip("a.mp4#t=1.5,4", path, 1.5, 4.0), JobClip("x", path, 2.0)]
    rows = "a.mp4,,,\na.mp4,,1.5,4\na.mp4,x,2,\n"
    assert manifest(tmp_path, "m.csv", f"path,video,start_s,end_s\n{rows}") == wanted


def test_a_list_may_come_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x.mp4\r\ny.mp4\nx.mp4\n")))
    assert inputs.clips(["-"]) == [JobClip("x.mp4", "x.mp4"), JobClip("y.mp4", "y.mp4")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.jsonl", '{"video": 1.5}\n'),
        ("m.jsonl", '{"path": "a.mp4", "end_s": 0}\n'),
        ("m.jsonl", '{"path": "a.mp4", "start_s": 1.0001, "end_s": 1.0004}\n'),
        ("m.jsonl", '{"path": "a.mp4", "start_s": "soon"}\n'),
        ("m.csv", "path,start_s,end_s\na.mp4,5,4\n"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"pa\n'),
        ("m.jsonl", '{"video": "a", "path": "x.mp4"}\n{"video": "a", "path": "y.mp4"}\n'),
        ("m.csv", "video,path\n,\n"),
        ("m.txt", "\n \n"),
    ],
)
def test_a_wrong_manifest_is_refused(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        manifest(tmp_path, name, text)


def test_folders_globs_and_files_name_each_clip_once(folder: Path) -> None:
    all_below = inputs.clips([str(folder)])
    assert len(all_below) == CLIPS
    one = all_below[7].video
    assert inputs.clips([one, str(folder), f"{folder}/**/*.mp4"])[0].video == one
    assert {clip.video for clip in inputs.clips([f"{folder}/**/*.mp4"])} == {clip.video for clip in all_below}
    for nothing in (f"{folder}/*.mkv", f"{folder}/missing.mp4"):
        with pytest.raises(UsageError, match=r"no file"):
            inputs.clips([nothing])


@pytest.mark.parametrize("of", [1, 3, 7])
def test_shards_are_all_of_it_and_no_two_share_a_clip(of: int, folder: Path) -> None:
    shards = [inputs.clips([str(folder)], shard=(number, of)) for number in range(1, of + 1)]
    clips = Counter(clip.video for shard in shards for clip in shard)
    assert set(clips.values()) == {1}
    assert len(clips) == CLIPS
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
