"""The formats that a job writes, made from the records of its journal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from etenet.captioning import subtitles
from etenet.errors import UsageError
from etenet.files import json_line
from etenet.jobs.journal import Record

FORMATS = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".json": "coco",
    ".parquet": "parquet",
    ".vtt": "vtt",
    ".srt": "srt",
}
COLUMNS = ("video", "start_s", "end_s", "caption", "error_code", "error_message")


def format_of(out: Path | None) -> str:
    """The format that a file's name stands for."""
    return FORMATS.get(out.suffix.lower(), "jsonl") if out else "jsonl"


def as_csv(records: Iterable[Record]) -> Iterator[bytes]:
    for row in (COLUMNS, *chain.from_iterable(map(_rows, records))):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        yield text.getvalue().encode(errors="replace")


def as_parquet(records: Iterable[Record]) -> Iterator[bytes]:
    """All of it at once, as its index comes last. What is not there is null."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UsageError(f"Parquet needs the extra: pip install 'etenet[ray]' ({error})") from error
    rows = [dict(zip(COLUMNS, row, strict=True)) for record in records for row in _rows(record)]
    numbers = ("start_s", "end_s")
    schema = pyarrow.schema([(c, pyarrow.float64() if c in numbers else pyarrow.string()) for c in COLUMNS])
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    yield file.getvalue()


def _rows(record: Record) -> Iterator[tuple[Any, ...]]:
    """One of a clip, or one of each segment."""
    error = record.get("error", {"code": None, "message": None})
    for said in record.get("segments", [record]):
        times_s = said.get("start_s"), said.get("end_s")
        yield record["video"], *times_s, said.get("caption"), error["code"], error["message"]


def as_coco(records: Iterable[Record]) -> Iterator[bytes]:
    """COCO's results, of the clips that have a caption: what `etenet score` takes as predictions."""
    before = b"["
    for record in records:
        if "caption" in record:
            yield before + json_line({"image_id": record["video"], "caption": record["caption"]}).rstrip()
            before = b",\n "
    yield b"[]\n" if before == b"[" else b"]\n"


def _as_subtitles(form: str, records: Iterable[Record]) -> Iterator[bytes]:
    for record in records:
        if "segments" in record:
            yield subtitles.WRITERS[form](record["segments"]).encode(errors="replace")


WRITERS: dict[str, Callable[[Iterable[Record]], Iterator[bytes]]] = {
    "jsonl": lambda records: map(json_line, records),
    "csv": as_csv,
    "coco": as_coco,
    "parquet": as_parquet,
    **{form: partial(_as_subtitles, form) for form in subtitles.WRITERS},
}
