"""Every format is read back as it was written, and no two videos share a file."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from etenet.errors import UsageError
from etenet.files.rows import rows
from etenet.jobs import formats
from etenet.jobs.formats import FORMATS, format_for, places_for
from etenet.jobs.inputs import JobClip, id_of
from etenet.jobs.run import run

RECORDS: list[dict[str, Any]] = [
    {"video": 'a,\u2028"b"\r.mp4', "caption": "a dog runs\x0b"},
    {"video": "c\nd.mp4", "error": {"code": "not_a_video", "message": "it is none"}},
    {"video": "e.mp4", "segments": [{"start_s": 0.0, "end_s": 1.5, "caption": "a cat"}] * 2},
    {"video": "f.mp4", "caption": None, "confidence": 0.125},
]


@pytest.mark.parametrize("name", FORMATS)
def test_the_name_of_a_file_stands_for_its_format(name: str) -> None:
    segments = FORMATS[name].segments == "needed"
    assert format_for(None, Path(f"captions{FORMATS[name].suffix.upper()}"), segments=segments) is FORMATS[name]
    assert format_for(name, Path("captions.txt"), segments=segments) is FORMATS[name]


def test_no_suffix_stands_for_json_lines_and_an_unknown_one_is_refused_by_name() -> None:
    assert {format_for(None, out).name for out in (None, Path("captions"))} == {"jsonl"}
    for name in ("captions.doc", "captions.tsv", "captions.jsonl.gz"):
        with pytest.raises(UsageError, match=rf"names like {name}; end it with \.jsonl, .*, or give --format$"):
            format_for(None, Path(name))


@pytest.mark.parametrize(("name", "segments"), [("vtt", False), ("srt", False), ("coco", True)])
def test_a_format_that_cannot_show_the_captions_is_refused(name: str, segments: bool) -> None:
    with pytest.raises(UsageError, match=rf"^{name} .*: give .*"):
        format_for(name, None, segments=segments)


@pytest.mark.parametrize("name", ["jsonl", "coco", "csv"])
def test_names_and_captions_come_back(name: str) -> None:
    written = b"".join(FORMATS[name].write(RECORDS))
    read = [row.values for row in rows("F", written, header=formats.COLUMNS, fix="")]
    cells = ["", "", "a dog runs\x0b", "", "", "", "", ""]
    expected = {
        "jsonl": RECORDS,
        "coco": [{"image_id": RECORDS[0]["video"], "caption": RECORDS[0]["caption"]}],
        "csv": [
            dict(zip(formats.COLUMNS, row, strict=True))
            for row in (
                [RECORDS[0]["video"], *cells],
                [RECORDS[1]["video"], "", "", "", "not_a_video", "it is none", "", "", ""],
                *[["e.mp4", "0.0", "1.5", "a cat", "", "", "", "", ""]] * 2,
                ["f.mp4", "", "", "", "", "", "0.125", "", ""],
            )
        ],
    }
    assert read == expected[name]


def test_tables_have_all_sentences_and_their_probabilities() -> None:
    sentences = [
        {"caption": "a dog", "log_prob": -1.5, "confidence": 0.25, "words": [{"word": "a", "prob": 0.5}]},
        {"caption": 'a "cat",\n', "log_prob": -2.5, "words": []},
    ]
    of_clip = {"caption": None, "confidence": 0.25, "captions": sentences}
    of_part = {"start_s": 0.0, "end_s": 1.5, **of_clip, "caption": "a dog"}
    records = [{"video": "a.mp4", **of_clip}, {"video": "b.mp4", "segments": [of_part, of_part]}]
    written = b"".join(FORMATS["csv"].write(records))
    for row in rows("F", written, header=formats.COLUMNS, fix=""):
        assert (float(row.values["log_prob"]), float(row.values["confidence"])) == (-1.5, 0.25)
        assert json.loads(row.values["captions"]) == sentences
    table = parquet.read_table(io.BytesIO(b"".join(FORMATS["parquet"].write(records)))).to_pylist()
    assert [row["caption"] for row in table] == [None, "a dog", "a dog"]
    for row in table:
        assert (row["log_prob"], row["confidence"]) == (-1.5, 0.25)
        assert row["captions"] == [sentences[0], {**sentences[1], "confidence": None}]


def test_coco_without_a_caption_is_an_empty_list() -> None:
    assert json.loads(b"".join(FORMATS["coco"].write(RECORDS[1:2]))) == []


def test_a_file_that_cannot_be_written_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    clips = [JobClip(record["video"], record["video"]) for record in RECORDS]
    for name in ("csv", "vtt"):
        with pytest.raises(
            UsageError, match=r"cannot write .*: (Not a directory|File exists); fix that, and start the job again"
        ):
            formats.write(RECORDS, clips, tmp_path / "file" / "below", FORMATS[name])


def test_what_could_not_be_written_at_the_end_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "subtitles" / "a.vtt").mkdir(parents=True)
    (tmp_path / "file").touch()

    def refused(out: str, form: str) -> str:
        with pytest.raises(UsageError) as raised:
            run(
                [JobClip("a.mp4", "a.mp4")],
                lambda *_: pytest.fail("a clip was captioned"),
                out=tmp_path / out,
                format=FORMATS[form],
            )
        assert not list(tmp_path.rglob("*.jsonl"))
        return str(raised.value)

    for form in ("csv", "parquet", "coco"):
        assert f"{tmp_path}/folder.csv is a folder; " in refused("folder.csv", form)
    assert f"{tmp_path}/subtitles/a.vtt is a folder; " in refused("subtitles", "vtt")
    for out in ("file", "file/deeper"):
        assert f"{tmp_path}/file is a file; " in refused(out, "srt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the extra" in refused("captions.parquet", "parquet")


def test_no_name_leads_out_of_the_folder_and_no_two_share_a_file(tmp_path: Path) -> None:
    names = ["../../a.mp4", "/a.mkv", "b/c.mp4", "b/c.mp4#t=1,2", "s3://bucket/d.webm", "e.mp4", "e.mkv"]
    places = places_for([JobClip(name, name) for name in names], tmp_path, FORMATS["srt"])
    assert [str(place.relative_to(tmp_path)) for place in places.values()] == [
        *("a.mp4.srt", "a.mkv.srt", "b/c.srt", "b/c.mp4#t=1,2.srt", "s3:/bucket/d.srt", "e.mp4.srt", "e.mkv.srt")
    ]


def test_subtitles_have_the_name_of_their_video_also_if_it_is_not_utf8(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"caf\xe9.mp4", b"caf\xe8.mp4")]
    clips = [JobClip(id_of(name), name) for name in names]
    segments = [{"start_s": 0.0, "end_s": 1.5, "caption": "a cat"}]
    formats.write([{"video": clip.video, "segments": segments} for clip in clips], clips, tmp_path, FORMATS["srt"])
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"caf\xe8.srt", b"caf\xe9.srt"]


@pytest.mark.parametrize(("names", "out"), [(["../a.mp4", "a.mp4"], "subtitles"), (["a.mp4"], "film.vtt")])
def test_what_would_be_written_over_is_refused(names: list[str], out: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        places_for([JobClip(name, name) for name in names], tmp_path / out, FORMATS["srt"])
