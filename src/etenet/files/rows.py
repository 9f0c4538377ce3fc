"""Rows of JSON, CSV and lists, whatever the name of their file.

Knows what a row is in each format, but not what the columns mean. An error names the file, the line and the fix.
"""

from __future__ import annotations

import csv
import io
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from etenet.errors import UsageError

# Not str.splitlines(): it also splits at U+2028, U+0085, VT and FF, which may be in file names and sentences.
_LINE_END = re.compile(r"\r\n?|\n")
_JSON = re.compile(r"\s*[{\[]")
_JSON_NOT_A_PATH = re.compile(r"\s*(\{|\[\s*[{\]])")  # a path may be [1].mp4
_BLANKS = " \t"
_QUOTES = 'put quotes around a cell with a comma or line break, and double those inside it: "a ""b"", c"'
_BYTE_ORDER_MARK = "\ufeff"
_SEPARATORS = ",;\t"
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one row by column, and its place, as in "captions.csv, line 3"."""

    place: str
    values: dict[str, Any]

    def need(self, *columns: str) -> None:
        """Raises `UsageError` if a column is missing."""
        for column in columns:
            if column not in self.values:
                there = ", ".join(self.values) or "nothing"
                raise UsageError(
                    f"{self.place}: no {column} among {there}; each row needs {', '.join(columns)}, and quotes around "
                    "cells that hold commas or line breaks"
                )


def rows(
    source: Path | str,
    contents: bytes | None = None,
    *,
    header: Collection[str] = (),
    list_of: str = "",
    by_clip: bool = False,
    prose: str = "",
    fix: str,
) -> Iterator[Row]:
    """The rows of a file, or of `contents` that `source` only names. The format is recognised by the contents:

        {"video": ..., "caption": ...}                 JSON lines
        [{...}, ...] or {"annotations": [{...}, ...]}  COCO's results or annotations, in JSON
        {"clip": ["sentence", ...], ...}               JSON, if `by_clip`: rows {"video": "clip", "captions": [...]}
        video,caption                                  CSV, if the first line has a column of `header`
        clips/a.mp4                                    a list, if `list_of="path"`: rows {"path": "clips/a.mp4"}

    The text is UTF-8, with or without a byte order mark, or UTF-16 with one. In a list, other bytes become lone
    surrogates (PEP 383), because names of files may have any. Lines end with LF, CR LF or CR; empty ones are skipped,
    and so are rows of empty cells, which spreadsheets write.
    In CSV, columns are told apart by the separator of the first line (a comma, a semicolon or a tab), and their names
    are read without regard to case and blanks. If blanks surround that separator, they belong to no cell. Quoted cells
    may have line breaks, and `values` lacks missing cells.
    Raises `UsageError` if the file cannot be read or has another format, if an object has a key or a table a column
    twice, if a quote stays open, and if a separator without quotes cuts a cell. Such a separator makes more cells than
    there are columns. In a row that leaves out its last cells it does not; in the cells after the column `prose`,
    which holds sentences, a blank at the start gives it away (unless blanks surround all separators).
    """
    text = _decoded(source, contents, fix=fix)
    lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), start=1) if line.strip(_BLANKS)]
    if not lines:
        return
    try:
        is_json = bool((_JSON_NOT_A_PATH if list_of else _JSON).match(text))
        table = None if is_json else _Table.begun_by(lines[0][1], header)
        if is_json or table or not list_of:
            _require_unicode(source, text)
        if is_json:
            yield from _rows_of_json(source, text, lines, by_clip=by_clip, fix=fix)
        elif table:
            yield from _rows_of_table(source, text, table, prose)
        elif list_of:
            yield from _rows_of_list(source, lines, list_of)
        elif header:
            names = " or ".join(header)
            raise UsageError(f"{source}, line {lines[0][0]}: neither JSON nor CSV with a column {names}; {fix}")
        else:
            yield from _rows_of_json(source, text, lines, by_clip=by_clip, fix=fix)
    except csv.Error as error:
        raise UsageError(f"{source}: {error}; save it again as comma-separated UTF-8") from error


def read_text(source: Path | str, contents: bytes | None = None, *, fix: str) -> str:
    """Raises `UsageError` if the file cannot be read, or is neither UTF-8 nor UTF-16 with a byte order mark."""
    text = _decoded(source, contents, fix=fix)
    _require_unicode(source, text)
    return text


def _decoded(source: Path | str, contents: bytes | None, *, fix: str) -> str:
    """Bytes that are not UTF-8 become lone surrogates."""
    try:
        body = Path(source).read_bytes() if contents is None else contents
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}; {fix}") from error
    encoding = "utf-16" if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8"
    try:
        return body.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape").lstrip(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: this begins as UTF-16 and is not; save it as UTF-8") from error


def _require_unicode(source: Path | str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = 1 + text.count("\n", 0, error.start)
        raise UsageError(f"{source}, line {line}: this is not UTF-8; save it as UTF-8") from error


def parse_json(source: Path | str, text: str, *, line: int | None = None, fix: str = "correct it there") -> Any:
    """Raises `UsageError` if it is not JSON or an object has a key twice. `line` is the number of a single line."""
    place = f"{source}, line {line}" if line else str(source)
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        number = error.lineno + (line - 1 if line else 0)
        where = f"{source}, line {number}, column {error.colno}"
        raise UsageError(f"{where}: this is not JSON ({error.msg}); {fix}") from error
    except _KeyTwice as error:
        raise UsageError(f"{place}: {error}") from error
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise UsageError(f"{place}: {error}; {fix}") from error


class _KeyTwice(Exception):
    """An object has a key twice. Python's own parser would take the last one."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _KeyTwice(f"{key!r} is twice in one object; keep one of them, with the values of both")
        values[key] = value
    return values


def _rows_of_json(
    source: Path | str, text: str, lines: Sequence[tuple[int, str]], *, by_clip: bool, fix: str
) -> Iterator[Row]:
    (number, first), *rest = lines
    if rest and _is_json(first):
        for number, line in lines:
            yield _row(f"{source}, line {number}", parse_json(source, line, line=number, fix=fix), fix)
        return
    place = str(source) if rest else f"{source}, line {number}"
    contents = parse_json(source, text, fix=fix) if rest else parse_json(source, first, line=number, fix=fix)
    match contents:
        case list(entries) | {"annotations": ([] | [{}, *_]) as entries}:
            for count, entry in enumerate(entries, start=1):
                yield _row(f"{source}, entry {count}", entry, fix)
        case dict(clips) if by_clip and not _is_row(clips):
            for clip, captions in clips.items():
                yield Row(place, {"video": clip, "captions": captions})
        case _:
            yield _row(place, contents, fix)


def _rows_of_list(source: Path | str, lines: Sequence[tuple[int, str]], column: str) -> Iterator[Row]:
    for number, line in lines:
        place = f"{source}, line {number}"
        if "\0" in line:
            raise UsageError(f"{place}: no path has a NUL in it; write one path per line, in UTF-8")
        # A byte order mark begins every file of those that one list was put together from.
        if path := line.lstrip(_BYTE_ORDER_MARK).strip(_BLANKS):
            yield Row(place, {column: path})


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_row(values: Mapping[str, object]) -> bool:
    """Whether an object is a row. With a list under one of these names, it has the sentences of a clip of that name."""
    return any(not isinstance(values.get(key, []), list) for key in ("video", "image_id", "caption"))


def _row(place: str, values: Any, fix: str) -> Row:
    if not isinstance(values, dict):
        raise UsageError(f"{place}: expected an object, got {shown(values)}; {fix}")
    return Row(place, values)


@dataclass(frozen=True, slots=True)
class _Table:
    """How a table of CSV is written. With `padding`, blanks around the separator belong to no cell."""

    columns: tuple[str, ...]
    separator: str
    padding: bool

    @classmethod
    def begun_by(cls, line: str, known: Collection[str]) -> Self | None:
        """The table that has this first line; None if the line names no known column."""
        names = {column.lower(): column for column in known}
        for separator in _SEPARATORS:
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            plain = [cell.strip(_BLANKS).lower() for cell in cells]
            if not names.keys().isdisjoint(plain):
                padding = f" {separator}" in line or f"{separator} " in line
                return cls(tuple(names.get(name, name) for name in plain), separator, padding)
        return None

    def cells(self, source: Path | str, text: str) -> Iterator[tuple[str, list[str]]]:
        """The place of the first line of a row, and its cells. Lines without any are left out."""
        # Strict, so that an open quote is an error; but then no blank may follow a quote.
        lines, strict = io.StringIO(text, newline=""), not self.padding
        reader = csv.reader(lines, delimiter=self.separator, skipinitialspace=self.padding, strict=strict)
        place = f"{source}, line 1"
        try:
            for cells in reader:
                if cells:
                    yield place, [cell.strip(_BLANKS) for cell in cells] if self.padding else cells
                place = f"{source}, line {reader.line_num + 1}"
        except csv.Error as error:
            raise UsageError(f"{place}: {error}; {_QUOTES}") from error

    def cuts(self, cells: Sequence[str], prose: str) -> bool:
        """Whether a separator without quotes has cut a cell, as far as that can be seen."""
        count = len(self.columns)
        after_prose = cells[self.columns.index(prose) + 1 : count] if prose in self.columns else []
        return any(cell.strip() for cell in cells[count:]) or any(
            cell.startswith(" ") and cell.strip() for cell in after_prose
        )


def _rows_of_table(source: Path | str, text: str, table: _Table, prose: str) -> Iterator[Row]:
    written = (row for row in table.cells(source, text) if any(cell.strip(_BLANKS) for cell in row[1]))
    place, _ = next(written)
    if twice := [name for name in table.columns if name and table.columns.count(name) > 1]:
        raise UsageError(f"{place}: the column {twice[0]} is there twice; give each its own name")
    for place, cells in written:
        if table.cuts(cells, prose):
            raise UsageError(f"{place}: a {table.separator!r} cuts a cell of {shown(cells)} in two; {_QUOTES}")
        yield Row(place, dict(zip(table.columns, cells, strict=False)))


def shown(value: object) -> str:
    """A value as JSON, cut so that a message stays one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
