"""Every format gives the same rows, and a row that cannot be read is named with its place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etenet.errors import UsageError
from etenet.files.rows import Row, rows

# All characters but lone surrogates, and often those that end lines for some or that CSV and JSON quote.
_AWKWARD = st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\r\n\t \"',#{[")
TEXTS = st.text(_AWKWARD | st.characters(exclude_categories=["Cs"]))
LISTED = TEXTS.map(lambda text: re.sub(r"[\0\r\n\ufeff]", "", text).strip(" \t")).filter(bool)
CLIPS = st.dictionaries(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=5)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
FIX = "do it otherwise"


def read(text: str, *, bom: bool, **how: Any) -> list[dict[str, Any]]:
    return [row.values for row in rows("captions", text.encode("utf-8-sig" if bom else "utf-8"), fix=FIX, **how)]


@given(clips=CLIPS, bom=st.booleans(), ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_names_and_sentences_come_back_out_of_one_json_document(
    clips: dict[str, list[str]], bom: bool, ascii_only: bool, indent: int | None
) -> None:
    def written(contents: object) -> str:
        return json.dumps(contents, ensure_ascii=ascii_only, indent=indent)

    entries = [{"image_id": clip, "caption": caption} for clip, captions in clips.items() for caption in captions]
    assert read(written({"info": {}, "annotations": entries}), bom=bom, by_clip=True) == entries
    assert read(written(entries), bom=bom) == entries
    pairs = [{"video": clip, "captions": captions} for clip, captions in clips.items()]
    assert read(written(clips), bom=bom, by_clip=True) == pairs


@given(clips=CLIPS, bom=st.booleans(), ascii_only=st.booleans(), end=ENDS)
def test_names_and_sentences_come_back_out_of_json_lines(
    clips: dict[str, list[str]], bom: bool, ascii_only: bool, end: str
) -> None:
    entries = [{"video": clip, "captions": captions} for clip, captions in clips.items()]
    lines = (json.dumps(entry, ensure_ascii=ascii_only) + end for entry in entries)
    assert read("".join(lines), bom=bom, by_clip=True) == entries


def filled(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of a table that are more than empty cells."""
    return [entry for entry in entries if any(cell.strip(" \t") for cell in entry.values())]


@given(clips=CLIPS, bom=st.booleans(), end=ENDS)
def test_names_and_sentences_come_back_out_of_csv(clips: dict[str, list[str]], bom: bool, end: str) -> None:
    entries = [{"video": clip, "caption": caption} for clip, captions in clips.items() for caption in captions]
    text = io.StringIO(newline="")
    table = csv.DictWriter(
        text,
        ("video", "caption"),
        lineterminator=end,
        quoting=csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL,  # Python quotes only what is in `end`
    )
    table.writeheader()
    table.writerows(entries)
    assert read(text.getvalue(), bom=bom, header=["video"]) == filled(entries)


@given(
    clips=CLIPS,
    separator=st.sampled_from(",;\t"),
    padding=st.sampled_from(["", " "]),
    case=st.sampled_from([str.lower, str.upper, str.title]),
    end=ENDS,
)
def test_every_way_to_write_a_table_gives_the_same_rows(
    clips: dict[str, list[str]], separator: str, padding: str, case: Callable[[str], str], end: str
) -> None:
    """As spreadsheets and people write them: the separator of the country, blanks around it, capitals."""
    rows_of = [(clip, caption) for clip, captions in clips.items() for caption in captions]
    rows_of = [(clip.strip(" \t"), caption.strip(" \t")) for clip, caption in rows_of] if padding else rows_of
    quoted = [['"{}"'.format(cell.replace('"', '""')) for cell in row] for row in rows_of]
    lines = [f"{padding}{separator}{padding}".join(row) for row in [(case("video"), case("caption")), *quoted]]
    wanted = [{"video": clip, "caption": caption} for clip, caption in rows_of]
    assert read(end.join(lines), bom=True, header=["video"]) == filled(wanted)


def test_a_cell_may_have_the_separators_of_other_tables() -> None:
    for separator, cell in ((",", "a;b\tc"), (";", "a,b\tc"), ("\t", "a,b;c")):
        assert read(f"path{separator}video\n{cell}{separator}x\n", bom=False, header=["video", "path"]) == [
            {"path": cell, "video": "x"}
        ]


def test_rows_of_empty_cells_are_skipped_wherever_they_are() -> None:
    text = "Video;Caption;Group\n;;\na;b;c\n ;;\t\nd;;\n;;\n"
    assert read(text, bom=False, header=["video"]) == [
        {"video": "a", "caption": "b", "group": "c"},
        {"video": "d", "caption": "", "group": ""},
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_that_were_put_together_have_a_byte_order_mark_each(end: str) -> None:
    text = end.join(["\ufeff\ufeffa.mp4", "b.mp4", "\ufeffc.mp4", "\ufeff", ""])
    assert read(text, bom=True, header=["path"], list_of="path") == [{"path": f"{name}.mp4"} for name in "abc"]


@given(names=st.lists(LISTED), bom=st.booleans(), end=ENDS)
def test_names_come_back_out_of_a_list(names: list[str], bom: bool, end: str) -> None:
    names = ["first.mp4", *names]
    assert read(end.join(names), bom=bom, header=["video"], list_of="path") == [{"path": name} for name in names]


def test_a_row_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "captions"
    for text, places in (
        ("\nvideo,caption\n\na,b\n'c,'d\n", ["line 4", "line 5"]),
        ('video,caption\r\n"a\r\nb",c\r\nd,e', ["line 2", "line 4"]),
        ('\n{"video": 1}\n \n{"video": 2}', ["line 2", "line 4"]),
        ('[{"video": 1},\n{"video": 2}]', ["entry 1", "entry 2"]),
        ('{"a": [],\n"b": []}', ["", ""]),
        ('\n{"a": [], "b": []}', ["line 2", "line 2"]),
    ):
        path.write_text(text)
        wanted = [f"{path}, {place}".removesuffix(", ") for place in places]
        assert [row.place for row in rows(path, header=["video"], by_clip=True, fix=FIX)] == wanted
    assert [row.place for row in rows("-", b"a\n\nb", list_of="path", fix=FIX)] == ["-, line 1", "-, line 3"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b'{"a": [{"b": 1,\n "b": 2}]}', "F: 'b' is twice in one object; keep one of them"),
        (b'{"a": 1}\n{"a": 1, "a": 2}', "F, line 2: 'a' is twice in one object; keep one of them"),
        (b'{"a": 1}\n{"a": 1', "F, line 2, column 8: this is not JSON (Expecting ',' delimiter); do it otherwise"),
        (b'{"a": 1}\n[1]', "F, line 2: expected an object, got [1]; do it otherwise"),
        (
            b'{\n"a": "' + b"x" * 99,
            "F, line 2, column 6: this is not JSON (Unterminated string starting at); do",
        ),
        (b"[" * 100_000, "F, line 1: maximum recursion depth exceeded"),
        (b'["' + b"x" * 99 + b'"]', 'F, entry 1: expected an object, got "' + "x" * 76 + "...; do it otherwise"),
        (b"\xef\xbb\xbfvideo\na\n\xff", "F, line 3: this is not UTF-8; save it as UTF-8"),
        (b"a,b\n", "F, line 1: neither JSON nor CSV with a column video or caption; do it otherwise"),
        (b"video\n" + b"x" * 200_000, "F, line 2: field larger than field limit (131072); put quotes around"),
        (b'video,caption\na,b\n\nc,"a dog\nd,"a cat"\n', "F, line 4: ',' expected after '\"'; put quotes around"),
        (b'video,caption\na,"a dog\nb,a cat\n', "F, line 2: unexpected end of data; put quotes around"),
        (b"caption,video,caption\n", "F, line 1: the column caption is there twice; give each its own name"),
    ],
)
def test_an_error_names_the_place_and_the_fix(contents: bytes, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        list(rows("F", contents, header=("video", "caption"), fix=FIX))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


SENTENCES = ("a man, a dog and a cat", " a man , a dog", 'a "man", a dog', "a man a dog")


@pytest.mark.parametrize("columns", [("video", "caption"), ("caption", "video"), ("note", "video", "caption", "group")])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_in_a_table_comes_whole_or_its_line_is_refused(columns: Sequence[str], sentence: str) -> None:
    values = {"note": "", "video": "v", "caption": sentence, "group": "film"}
    unquoted = f"{','.join(columns)}\n\n{','.join(values[column] for column in columns)}\n"
    if "," in sentence:
        with pytest.raises(UsageError, match=r"^F, line 3: .*; put quotes around a cell with a comma"):
            list(rows("F", unquoted.encode(), header=("video", "caption"), prose="caption", fix=FIX))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, [values[column] for column in columns]])
    (row,) = rows("F", text.getvalue().encode(), header=("video", "caption"), prose="caption", fix=FIX)
    assert row.values["caption"] == sentence


def test_the_rest_of_a_cut_sentence_is_seen_where_a_row_leaves_out_its_last_cells() -> None:
    def read_row(line: str, header: str = "video,caption,group,note") -> Mapping[str, Any]:
        (row,) = rows("F", f"{header}\n{line}\n".encode(), header=("video",), prose="caption", fix=FIX)
        return row.values

    for line in ("v,a man, a dog", "v,a man,, a dog", "v,a man, a dog,x,y,z"):
        with pytest.raises(UsageError, match=r"^F, line 2: a ',' cuts a cell of \["):
            read_row(line)
    assert read_row("v,a man,film,,,") == {"video": "v", "caption": "a man", "group": "film", "note": ""}
    assert read_row("v, a man,film, ")["caption"] == " a man"
    assert read_row("v, a man, film", "video, caption, group") == {
        "video": "v",
        "caption": "a man",
        "group": "film",
    }


def test_a_file_that_cannot_be_read_is_named_with_the_fix(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=f"^cannot read {path}: {reason}; {FIX}$"):
            list(rows(path, fix=FIX))


def test_a_row_names_the_column_that_it_lacks() -> None:
    row = Row("F, line 3", {"video": "a", "caption": ""})
    row.need("video", "caption")
    with pytest.raises(UsageError, match="F, line 3: no split among video, caption; each row needs video, split"):
        row.need("video", "split")


def test_an_object_alone_is_a_row_or_the_sentences_by_clip() -> None:
    for text in ('{"video": "a"}', '{"image_id": 3, "caption": "b"}', '{"caption": "b"}'):
        assert read(text, bom=False, by_clip=True) == [json.loads(text)]
    assert read('{"video": ["a"]}', bom=False, by_clip=True) == [{"video": "video", "captions": ["a"]}]
    assert read('{"a": ["b"]}', bom=False) == [{"a": ["b"]}]
