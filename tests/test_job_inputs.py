"""The inputs of a batch job name each clip once, in every kind of list."""

from __future__ import annotations

import glob
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etenet.errors import UsageError
from etenet.jobs import inputs
from etenet.jobs.inputs import JobClip, id_of
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import sample_frames
from tests import clips

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
        (f'{{"path": "a", "start_s": 1{"0" * 310}}}', "m.jsonl, line 1: .*; a line of a manifest is a path"),
    ):
        with pytest.raises(UsageError, match=message):
            manifest(tmp_path, "m.jsonl", text)
    for seconds in ("0,5", "00:01:30"):  # as Excel writes them in Germany, and as players show them
        with pytest.raises(UsageError, match=f'm.csv, line 2: seconds look like 12.5, got "{seconds}"; a line of'):
            manifest(tmp_path, "m.csv", f"path;start_s\na.mp4;{seconds}\n")
    for first in ("#TYPE System.IO.FileInfo", '"FullName"', "file,title", "sep=;", '"a.mp4"', "# clips"):
        with pytest.raises(
            UsageError, match=r"m\.txt, line 1: .* is neither a file nor a header with video or path; correct it"
        ):
            manifest(tmp_path, "m.txt", f"{first}\na.mp4\n")
        (tmp_path / first).touch()
        assert [clip.video for clip in manifest(tmp_path, "m.txt", f"{first}\na.mp4\n")] == [first, "a.mp4"]
    for contents, line in ((b"path\n\xff.mp4\n", 2), (b'{"path": "a"}\n\n{"path": "\xff"}\n', 3)):
        (tmp_path / "m.txt").write_bytes(contents)
        with pytest.raises(UsageError, match=rf"m\.txt, line {line}: this is not UTF-8; save it as UTF-8"):
            inputs.clips([f"{tmp_path}/m.txt"])
    for contents in (b"a.mp4\0b.mp4\0", "a.mp4\n".encode("utf-16-le")):
        (tmp_path / "m.txt").write_bytes(contents)
        with pytest.raises(UsageError, match=r"m\.txt, line 1: no path has a NUL in it; write one path per line"):
            inputs.clips([f"{tmp_path}/m.txt"])


def test_a_pipe_is_no_file_that_is_missing(tmp_path: Path) -> None:
    """As bash gives it for <(find ...)."""
    os.mkfifo(tmp_path / "63")
    with pytest.raises(UsageError, match="63 is no regular file; give a file, or - for a list on standard input"):
        inputs.clips([f"{tmp_path}/63"])


def test_parts_of_files_have_their_seconds(tmp_path: Path) -> None:
    path = f"{tmp_path}/a.mp4"
    wanted = [JobClip("a.mp4", path), JobClip("a.mp4#t=1.5,4", path, 1.5, 4.0), JobClip("x", path, 2.0)]
    rows = "a.mp4,,,\na.mp4,,1.5,4\na.mp4,x,2,\n"
    assert manifest(tmp_path, "m.csv", f"path,video,start_s,end_s\n{rows}") == wanted


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", 2 * b"\xef\xbb\xbf"])
def test_a_list_may_come_on_standard_input(mark: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With byte order marks, as PowerShell puts them, and `cat` leaves them between files."""
    text = mark + b"x.mp4\r\n" + mark + b"y.mp4\nx.mp4\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert inputs.clips(["-"]) == [JobClip("x.mp4", "x.mp4"), JobClip("y.mp4", "y.mp4")]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed; give"):
        inputs.clips(["-"])


@pytest.mark.parametrize(
    "header",
    ["path, video", "Path,Video", " PATH , VIDEO ", "path;video", "Path; Video", '"path"\t"video"', "\ufeffpath,video"],
)
def test_a_table_may_be_written_in_any_way(header: str, tmp_path: Path) -> None:
    separator = next(mark for mark in ";\t," if mark in header)
    padding = " " if f" {separator}" in header or f"{separator} " in header else ""
    table = f"{header}\na/1.mp4{separator}{padding}one\n{padding}b 2.mp4{padding}{separator}two\n"
    assert manifest(tmp_path, "m.csv", table) == [
        JobClip("one", f"{tmp_path}/a/1.mp4"),
        JobClip("two", f"{tmp_path}/b 2.mp4"),
    ]


def test_a_folder_gives_each_file_once_whatever_links_there_are(tmp_path: Path) -> None:
    """Two loops in one folder: following them blindly would take 2 ** 40 steps."""
    folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    for path in (folder / "b" / "real.mp4", elsewhere / "outside.mp4", folder / "._b.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "a").symlink_to("b")
    (folder / "b" / "loop").symlink_to("..")
    (folder / "b" / "another loop").symlink_to(tmp_path)
    (folder / "itself").symlink_to("itself")
    (folder / "c").symlink_to(elsewhere)
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "link.mp4").symlink_to("b/real.mp4")
    os.mkfifo(folder / "pipe.mp4")
    wanted = ["b/real.mp4", "c/outside.mp4", "gone.mp4", "link.mp4"]
    skipped = inputs.Skipped()
    below = inputs.clips([str(folder)], skipped=skipped)
    assert [clip.path for clip in below] == [f"{folder}/{name}" for name in wanted]
    assert str(skipped) == "3 files (._* 1, link to nowhere 1, no regular file 1)"
    assert inputs.clips([f"{folder}/**/*.mp4"]) == below
    assert [clip.path for clip in inputs.clips([f"{tmp_path}/v*/**/r*.mp4"])] == [f"{folder}/b/real.mp4"]


@pytest.mark.parametrize(
    "pattern", ["**/*.mp4", "*/*.mp4", "**", "s*/**/0*", "**/**/*.mp4", "[fs]*/*", "second/**/*.mp4"]
)
def test_a_glob_matches_what_pythons_does(pattern: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.mp4").touch()
    monkeypatch.chdir(folder)
    wanted = sorted({name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)})
    assert sorted(clip.path for clip in inputs.clips([pattern])) == wanted
    absolute = inputs.clips([f"{glob.escape(str(folder))}/{pattern}"])
    assert sorted(clip.path for clip in absolute) == [f"{folder}/{name}" for name in wanted]


SUFFIXES = {
    ("mp4", "libx264"): ".mp4 .m4v .mov .qt .3gp .3gpp .3g2 .f4v .lrv",
    ("matroska", "libx264"): ".mkv .mk3d .webm",
    ("avi", "mpeg4"): ".avi .divx",
    ("flv", "libx264"): ".flv",
    ("asf", "wmv2"): ".asf .wmv .wm",
    ("gif", "gif"): ".gif",
    ("mpegts", "libx264"): ".ts .m2ts .mts .m2t .tp .trp",
    ("vob", "mpeg2video"): ".vob .ps .mpg .mpeg .mpe .m2p .mod .vro",
}


def test_every_suffix_is_that_of_a_container_that_is_decoded() -> None:
    assert set(" ".join(SUFFIXES.values()).split()) == inputs.VIDEO_SUFFIXES
    for container, codec in SUFFIXES:
        pixels = "bgr8" if codec == "gif" else "yuv420p"
        clip = clips.video(3, size=(176, 144), codec=codec, container=container, pixels=pixels)
        assert sample_frames(clip, resize_px=32, limits=DecodeLimits()).info.distinct_frames == 3


def test_what_is_skipped_is_said_by_suffix(tmp_path: Path) -> None:
    for name in ("a.ps", "b.VOB", "c.mp4", "d.ogv", "e.OGV", "f.mxf", "Makefile"):
        (tmp_path / name).touch()
    skipped = inputs.Skipped()
    assert [Path(clip.path).name for clip in inputs.clips([str(tmp_path)], skipped=skipped)] == [
        "a.ps",
        "b.VOB",
        "c.mp4",
    ]
    assert str(skipped) == "4 files (.ogv 2, .mxf 1, without suffix 1)"
    for name in ("a.ps", "b.VOB", "c.mp4"):
        (tmp_path / name).unlink()
    with pytest.raises(
        UsageError, match=r"no video in .* among 4 files \(\.ogv 2, .*\); videos have the suffixes \.3g2,"
    ):
        inputs.clips([str(tmp_path)])


@given(
    names=st.sets(st.binary(min_size=1, max_size=8).filter(lambda name: not {b"\0", b"/"} & {*map(bytes, zip(name))}))
)
def test_names_that_are_not_utf8_have_ids_that_every_reader_takes(names: set[bytes]) -> None:
    texts = list(map(os.fsdecode, names))
    for text in texts:
        assert id_of(text).encode().decode() == id_of(id_of(text)) == id_of(text)
        if text.isprintable():
            assert id_of(text) == text
    if not any(b"\\" in name for name in names):
        assert len(set(map(id_of, texts))) == len(names)


def test_files_whose_names_are_not_utf8_are_clips_of_their_own(tmp_path: Path) -> None:
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    of_folder = inputs.clips([str(tmp_path)])
    assert [clip.video for clip in of_folder] == [rf"{tmp_path}/caf\xe8.mp4", rf"{tmp_path}/caf\xe9.mp4"]
    assert [Path(clip.path).read_bytes() for clip in of_folder] == [b"caf\xe8.mp4", b"caf\xe9.mp4"]
    listed = manifest(tmp_path, "m.jsonl", json.dumps({"path": os.fsdecode(b"caf\xe9.mp4")}))
    assert listed == [JobClip(r"caf\xe9.mp4", of_folder[1].path)]
    assert manifest(tmp_path, "m.jsonl", r'{"path": "\ud800.mp4"}')[0].video == r"\ud800.mp4"


def test_a_list_has_the_bytes_of_names_as_other_programs_print_them(tmp_path: Path) -> None:
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4", "caf\xe9.mp4".encode(), b"plain.mp4"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    found = sorted(tmp_path.iterdir())
    (tmp_path / "m.txt").write_bytes(b"".join(os.fsencode(path) + b"\n" for path in found))
    assert inputs.clips([f"{tmp_path}/m.txt"]) == inputs.clips([str(tmp_path)])


@pytest.mark.parametrize("text", ["caf\xe9.mp4\r\nb.mp4\r\n", "path\tend_s\r\ncaf\xe9.mp4\t\r\nb.mp4\t\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_list_may_be_in_the_unicode_of_windows(text: str, encoding: str, tmp_path: Path) -> None:
    """As PowerShell redirects it, and as Excel saves Unicode text."""
    (tmp_path / "m.txt").write_bytes(
        ("" if encoding == "utf-8-sig" else "\ufeff").encode(encoding) + text.encode(encoding)
    )
    assert [clip.video for clip in inputs.clips([f"{tmp_path}/m.txt"])] == ["caf\xe9.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "b/1.mp4\nhttps://host/2.mp4\n"),
        ("list.csv", "path\nb/1.mp4\nhttps://host/2.mp4\n"),
        ("list.jsonl", '{"path": "b/1.mp4"}\n{"path": "https://host/2.mp4"}\n'),
    ],
)
def test_a_list_at_a_url_names_what_is_below_its_folder(name: str, text: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"memory://lists/{name}", text.encode())
    assert [(clip.video, clip.path) for clip in inputs.clips([f"memory://lists/{name}"])] == [
        ("b/1.mp4", "memory://lists/b/1.mp4"),
        ("https://host/2.mp4", "https://host/2.mp4"),
    ]
    with pytest.raises(UsageError, match=r"^memory://lists/none\.csv: cannot be read: .*; fix that, or correct"):
        inputs.clips(["memory://lists/none.csv"])


def test_a_url_names_what_is_below_it() -> None:
    files = fsspec.filesystem("memory")
    for name in ("a.mp4", "deep/b.vob", "deep/._b.vob", "c.ogv"):
        files.pipe_file(f"/inputs/{name}", b"x")
    skipped = inputs.Skipped()
    below = inputs.clips(["memory://inputs"], skipped=skipped)
    assert [clip.video for clip in below] == ["memory:///inputs/a.mp4", "memory:///inputs/deep/b.vob"]
    assert str(skipped) == "2 files (._* 1, .ogv 1)"
    with pytest.raises(UsageError, match=r"cannot list nothing://a: Protocol not known: nothing; fix that, or correct"):
        inputs.clips(["nothing://a"])


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


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(folder: Path, tmp_path: Path) -> None:
    clips = inputs.clips([str(folder)])
    samples = [inputs.clips([str(folder)], sample=(count, 1)) for count in range(1, CLIPS + 5)]
    for count, sample in enumerate(samples, start=1):
        assert len(sample) == min(count, CLIPS)
        assert [clip for clip in clips if clip in sample] == sample
        assert set(sample) <= set(samples[min(count, CLIPS) - 1 + (count < CLIPS)])
    assert inputs.clips([str(folder)], sample=(10, 1)) == samples[9]
    for seed in (2, 10**50):
        assert inputs.clips([str(folder)], sample=(10, seed)) != samples[9]
    (tmp_path / "list.txt").write_text("\n".join(sorted((clip.path for clip in clips), reverse=True)))
    assert {clip.video for clip in inputs.clips([str(tmp_path / "list.txt")], sample=(10, 1))} == {
        clip.video for clip in samples[9]
    }
    shards = [inputs.clips([str(folder)], sample=(10, 1), shard=(number, 3)) for number in (1, 2, 3)]
    assert sorted(clip.video for shard in shards for clip in shard) == sorted(clip.video for clip in samples[9])


def test_each_clip_of_a_large_list_is_as_likely_in_a_sample(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.mp4" for number in range(200)))
    times = Counter(
        clip.video for seed in range(100) for clip in inputs.clips([str(tmp_path / "list.txt")], sample=(50, seed))
    )
    # Binomial, 100 times 1/4: six standard deviations
    assert len(times) == 200
    assert all(25 - 26 < count < 25 + 26 for count in times.values())
