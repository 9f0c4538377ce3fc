"""Every format gives the same captions, and an error is one line."""

from __future__ import annotations

import json
from pathlib import Path
from unicodedata import normalize

import pytest

from etenet.errors import UsageError
from etenet.scoring import caption_json

CAPTIONS = {"7": ["a dog runs", "a dog"], "clips/größe.mp4": ["un café \u2028 et \x85 \r\n deux"]}
ENTRIES = [(clip, sentence) for clip, sentences in CAPTIONS.items() for sentence in sentences]


def lines(*entries: object) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


COCO = [{"image_id": 7 if clip == "7" else clip, "caption": sentence, "id": 1} for clip, sentence in ENTRIES]
BY_CLIP = [{"video": clip, "captions": sentences} for clip, sentences in CAPTIONS.items()]
FORMATS = {
    "plain": json.dumps(CAPTIONS),
    "indented": json.dumps(CAPTIONS, indent=2, ensure_ascii=False),
    "more about each clip": json.dumps({clip: {"split": "test", "captions": of} for clip, of in CAPTIONS.items()}),
    "COCO annotations": json.dumps({"info": {}, "images": [{"id": 7}], "annotations": COCO}),
    "COCO results": json.dumps(COCO),
    "a line for each sentence": lines(*({"video": clip, "caption": sentence} for clip, sentence in ENTRIES)),
    "a line for each clip": lines(*BY_CLIP),
    "lines with gaps": "\n" + lines(*BY_CLIP) + "\n\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("contents", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_captions(tmp_path: Path, contents: str, encoding: str) -> None:
    path = tmp_path / "captions"
    path.write_text(contents, encoding=encoding)
    assert caption_json.read(path) == CAPTIONS


@pytest.mark.parametrize("contents", ['{"a": "one dog"}', '{"video": "a", "caption": "one dog"}'])
def test_one_clip_is_enough(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "captions"
    path.write_text(contents)
    assert caption_json.read(path) == {"a": ["one dog"]}


def test_the_rest_of_the_beam_does_not_count_as_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    path.write_text(lines({"video": "a", "caption": "one dog", "captions": [{"caption": "one dog", "log_prob": -1.0}]}))
    assert caption_json.read(path) == {"a": ["one dog"]}


def test_failed_clips_are_named_with_the_fix(tmp_path: Path) -> None:
    path, error = tmp_path / "captions.jsonl", {"code": "not_a_video", "message": "..."}
    path.write_text(
        lines({"video": "a", "caption": "one dog"}, *({"video": f"bad{number}", "error": error} for number in range(5)))
    )
    with pytest.raises(UsageError, match="for 'bad0', 'bad1', 'bad2' and 2 more; caption these clips again, or"):
        caption_json.read(path)


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        ("", "has no caption"),
        ("{}", "has no caption"),
        ("[]", "has no caption"),
        ("a dog runs\n", r"captions, line 1, column 1: this is not JSON \(Expecting value\)"),
        ("video,caption\na,one dog\n", "line 1, column 1: this is not JSON"),
        ('"a dog runs"', 'line 1: expected an object, got "a dog runs"'),
        ('{"video": "a", "caption": "one dog"}\n{"video": "b", "capt', "line 2, column 16: this is not JSON"),
        ('{"a": ["one dog", null]}', r'no sentence in {"video": "a"'),
        ('{"a": 5}', "no sentence in"),
        ('{"a": {"captions": [5]}}', "no sentence in"),
        ('{"a": {"split": "test"}}', "no sentence in"),
        ('{"videos": [{"split": "test"}], "sentences": []}', "no sentence in"),
        ('[{"caption": "one dog"}]', "no clip is named in"),
        ('["one dog"]', 'entry 1: expected an object, got "one dog"'),
        (json.dumps({"a": [{"tokens": ["dog"] * 99}]}), r"\.\.\.; give"),
    ],
)
def test_another_file_is_refused_with_the_formats_named(tmp_path: Path, contents: str, complaint: str) -> None:
    path = tmp_path / "captions"
    path.write_text(contents)
    with pytest.raises(UsageError, match=complaint) as raised:
        caption_json.read(path)
    assert str(raised.value).startswith(f"{path}")
    assert "COCO caption JSON" in str(raised.value)


@pytest.mark.parametrize(
    ("contents", "place", "key"),
    [
        ('{"a": ["one dog"],\n"a": ["two dogs"]}', "", "a"),
        ('{"a": {"captions": ["one"], "captions": ["two"]}}', ", line 1", "captions"),
        ('{"annotations": [\n{"image_id": 1, "caption": "one", "caption": "two"}]}', "", "caption"),
        ('{"video": "a", "caption": "one"}\n{"video": "b", "caption": "x", "video": "c"}', ", line 2", "video"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_file(tmp_path: Path, contents: str, place: str, key: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(contents)
    with pytest.raises(UsageError) as raised:
        caption_json.read(path)
    assert (
        str(raised.value) == f"{path}{place}: {key!r} is twice in one object; keep one of them, with the values of both"
    )
    assert "\n" not in str(raised.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    path.write_text('{"a": "un café"}', encoding="latin-1")
    with pytest.raises(UsageError, match="line 1: this is not UTF-8"):
        caption_json.read(path)


def test_names_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    """etenet caption on macOS has the form NFD in its output, as its files have, and a person types NFC."""
    composed, apart = (normalize(form, "Käse.mp4") for form in ("NFC", "NFD"))
    assert composed != apart
    for name in (composed, apart, f"{composed} "):
        (tmp_path / "captions").write_text(json.dumps({"video": name, "caption": "one cheese"}))
        assert caption_json.read(tmp_path / "captions") == {composed: ["one cheese"]}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*gone: No such file or directory; give {"):
        caption_json.read(tmp_path / "gone")


def test_the_references_of_the_real_clips_are_read_as_they_are(reference_data: Path) -> None:
    captions = caption_json.read(reference_data / "clips_captions.json")
    folders = (reference_data / "msvd" / "clips", reference_data / "msrvtt" / "clips")
    files = {path.relative_to(reference_data).as_posix() for folder in folders for path in folder.iterdir()}
    assert captions.keys() == files
    assert min(map(len, captions.values())) >= 5
