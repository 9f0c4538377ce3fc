"""Every format is read back as it was written, and no two videos share a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from etenet.errors import UsageError
from etenet.files import rows
from etenet.jobs import formats
from etenet.jobs.formats import FORMATS, format_for, places_for
from etenet.jobs.inputs import JobClip

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


def test_any_other_name_stands_for_json_lines() -> None:
    assert {format_for(None, out).name for out in (None, Path("captions"), Path("captions.txt"))} == {"jsonl"}


@pytest.mark.parametrize(("name", "segments"), [("vtt", False), ("srt", False), ("coco", True)])
def test_a_format_that_cannot_show_the_captions_is_refused(name: str, segments: bool) -> None:
    with pytest.raises(UsageError, match=rf"^{name} .*: give .*"):
        format_for(name, None, segments=segments)


@pytest.mark.parametrize("name", ["jsonl", "coco", "csv"])
def test_names_and_captions_come_back(name: str) -> None:
    written = b"".join(FORMATS[name].write(RECORDS))
    read = [row.values for row in rows("F", written, header=formats.COLUMNS, fix="")]
    cells = ["", "", "a dog runs\x0b", "", "", ""]
    expected = {
        "jsonl": RECORDS,
        "coco": [{"image_id": RECORDS[0]["video"], "caption": RECORDS[0]["caption"]}],
        "csv": [
            dict(zip(formats.COLUMNS, row, strict=True))
            for row in (
                [RECORDS[0]["video"], *cells],
                [RECORDS[1]["video"], "", "", "", "not_a_video", "it is none", ""],
                *[["e.mp4", "0.0", "1.5", "a cat", "", "", ""]] * 2,
                ["f.mp4", "", "", "", "", "", "0.125"],
            )
        ],
    }
    assert read == expected[name]


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


def test_no_name_leads_out_of_the_folder_and_no_two_share_a_file(tmp_path: Path) -> None:
    names = ["../../a.mp4", "/a.mkv", "b/c.mp4", "b/c.mp4#t=1,2", "s3://bucket/d.webm", "e.mp4", "e.mkv"]
    places = places_for([JobClip(name, name) for name in names], tmp_path, FORMATS["srt"])
    assert [str(place.relative_to(tmp_path)) for place in places.values()] == [
        *("a.mp4.srt", "a.mkv.srt", "b/c.srt", "b/c.mp4#t=1,2.srt", "s3:/bucket/d.srt", "e.mp4.srt", "e.mkv.srt")
    ]


@pytest.mark.parametrize(("names", "out"), [(["../a.mp4", "a.mp4"], "subtitles"), (["a.mp4"], "film.vtt")])
def test_what_would_be_written_over_is_refused(names: list[str], out: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        places_for([JobClip(name, name) for name in names], tmp_path / out, FORMATS["srt"])
