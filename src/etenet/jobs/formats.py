"""The formats that a job can write, in one table, and how each is made from the records of a journal.

In the formats for subtitles, one video gives one file, and several videos give a folder with a file for each.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Literal

from etenet.captioning import subtitles
from etenet.errors import UsageError
from etenet.files import json_line, replacing
from etenet.jobs import report, webdataset
from etenet.jobs.inputs import JobClip, id_of, parts_of, without_suffix
from etenet.jobs.journal import Record
from etenet.jobs.tars import SUFFIX

COLUMNS = (
    *("video", "start_s", "end_s", "caption", "error_code", "error_message", "confidence"),
    *("log_prob", "captions"),  # of --captions and --probabilities
)
_AS_SPACES = str.maketrans("\t\n\r", "   ")


def _jsonl(records: Iterable[Record]) -> Iterator[bytes]:
    return map(json_line, records)


def _csv(records: Iterable[Record]) -> Iterator[bytes]:
    for values in chain([COLUMNS], chain.from_iterable(map(_rows, records))):
        row = [json_line(value).decode().rstrip() if isinstance(value, list) else value for value in values]
        # Readers take a carriage return for the end of a line, but the writer does not quote it by itself.
        has_return, text = any("\r" in str(cell) for cell in row), io.StringIO(newline="")
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL)
        quoted.writerow(row)
        yield text.getvalue().encode(errors="replace")


def _parquet(records: Iterable[Record]) -> Iterator[bytes]:
    """The whole file at once, because its index comes last. A missing value is null."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UsageError(f"Parquet needs the extra: pip install 'etenet[ray]' ({error})") from error
    rows = [dict(zip(COLUMNS, row, strict=True)) for record in records for row in _rows(record)]
    text, number = pyarrow.string(), pyarrow.float64()
    word = pyarrow.struct([("word", text), ("prob", number)])
    sentence = pyarrow.struct(
        [("caption", text), ("log_prob", number), ("confidence", number), ("words", pyarrow.list_(word))]
    )
    types = dict.fromkeys(("start_s", "end_s", "confidence", "log_prob"), number) | {
        "captions": pyarrow.list_(sentence)
    }
    schema = pyarrow.schema([(column, types.get(column, text)) for column in COLUMNS])
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    yield file.getvalue()


def _rows(record: Record) -> Iterator[tuple[Any, ...]]:
    """One row for a clip, or one for each of its segments."""
    of_clip = {"video": record["video"], **{f"error_{name}": text for name, text in record.get("error", {}).items()}}
    for part in record.get("segments", [record]):
        best = part["captions"][0] if "captions" in part else {}
        row = {"log_prob": best.get("log_prob"), **part, **of_clip}
        yield tuple(row.get(column) for column in COLUMNS)


def _text(records: Iterable[Record]) -> Iterator[bytes]:
    """A line for each caption: the video, the times of a segment, and the sentence, with tabs between."""
    for record in records:
        video = record["video"].translate(_AS_SPACES)
        for part in record.get("segments", [record]):
            if part.get("caption") is not None:
                times = [subtitles.clock(part[end], ".") for end in ("start_s", "end_s") if end in part]
                yield ("\t".join((video, *times, part["caption"])) + "\n").encode(errors="replace")


def _coco(records: Iterable[Record]) -> Iterator[bytes]:
    """COCO's results format, with the clips that have a caption. `etenet score` takes it as predictions."""
    before = b"["
    for record in records:
        if record.get("caption") is not None:
            yield before + json_line({"image_id": record["video"], "caption": record["caption"]}).rstrip()
            before = b",\n "
    yield b"[]\n" if before == b"[" else b"]\n"


def _subtitles(text_of: Callable[[subtitles.Segments], str], records: Iterable[Record]) -> Iterator[bytes]:
    for record in records:
        if "segments" in record:
            shown = subtitles.on_players_clock(record["segments"], record.get("picture_start_s", 0.0))
            yield text_of(shown).encode(errors="replace")


def _no_stream(_: Iterable[Record]) -> Iterator[bytes]:
    raise UsageError("webdataset writes shards: name them with --out, as in captions-%06d.tar")


@dataclass(frozen=True, slots=True)
class Format:
    """`name` is what --format takes. `write` makes the bytes of a file from records, which shards are not."""

    name: str
    suffix: str
    write: Callable[[Iterable[Record]], Iterator[bytes]]
    segments: Literal["possible", "needed", "impossible"] = "possible"
    file_per_video: bool = False
    pictures: bool = False
    shards: bool = False
    lines: bool = False  # a record gives the same lines alone and among others


FORMATS = {
    format.name: format
    for format in (
        Format("jsonl", ".jsonl", _jsonl, lines=True),
        Format("text", ".txt", _text, lines=True),
        Format("csv", ".csv", _csv),
        Format("coco", ".json", _coco, segments="impossible"),
        Format("parquet", ".parquet", _parquet),
        Format("html", ".html", report.html, pictures=True),
        Format("vtt", ".vtt", partial(_subtitles, subtitles.vtt), segments="needed", file_per_video=True),
        Format("srt", ".srt", partial(_subtitles, subtitles.srt), segments="needed", file_per_video=True),
        Format("webdataset", SUFFIX, _no_stream, shards=True),
    )
}
JOURNAL, REPORT = FORMATS["jsonl"], FORMATS["html"]
_BY_SUFFIX = {format.suffix: format for format in FORMATS.values()}


def format_for(name: str | None, out: Path | None, *, segments: bool = False) -> Format:
    """The format `name`, or without a name the one of the file's suffix, JSON lines if it has none.

    Raises `UsageError` for another suffix, and if the format needs segments and there are none, or the other way round.
    """
    chosen = FORMATS[name] if name else _named_like(out) if out and out.suffix else JOURNAL
    if chosen.segments == "needed" and not segments:
        raise UsageError(f"{chosen.name} needs segments: give --segment-s N or --segment scenes")
    if chosen.segments == "impossible" and segments:
        raise UsageError(f"{chosen.name} has one caption per clip: give another --format, or no segments")
    return chosen


def journal_of(out: Path, chosen: Format) -> Path:
    """Where the records of a job are that writes `out`, which may be the current folder."""
    real = Path(os.path.realpath(out))
    return out if chosen == JOURNAL else real.parent / f"{real.name}.jsonl"


def _named_like(out: Path) -> Format:
    if found := _BY_SUFFIX.get(out.suffix.lower()):
        return found
    raise UsageError(f"no format has names like {out.name}; end it with {', '.join(_BY_SUFFIX)}, or give --format")


def of_lines(chosen: Format, out: Path | None) -> Format:
    """What to print while a job runs: the chosen format if it has lines, or JSON lines beside a file of another.

    Raises `UsageError` if the other format would be printed, too.
    """
    if chosen.lines:
        return chosen
    if out is None:
        names = " or ".join(format.name for format in FORMATS.values() if format.lines)
        raise UsageError(f"--follow prints lines: give --format {names}, or a file for the {chosen.name} with --out")
    return JOURNAL


def check(clips: Sequence[JobClip], out: Path, chosen: Format) -> None:
    """Raises `UsageError` before the job for what `write` would find out after it, or a package that it needs."""
    places = set(places_for(clips, out, chosen).values()) if chosen.file_per_video else {out}
    if chosen.shards:
        places = {webdataset.check(clips, out)}
    else:
        for _ in chosen.write(()):
            pass
    for place in places:
        if place.is_dir():
            raise UsageError(f"{place} is a folder; name a file with --out, or move the folder")
    for folder in {place.parent for place in places}:
        there = next(above for above in (folder, *folder.parents) if above.exists())
        if not there.is_dir():
            raise UsageError(f"{there} is a file; name a folder with --out, or move the file")
        if not os.access(there, os.W_OK):
            raise UsageError(
                f"nothing can be written in {there}; change its permissions, or name another place with --out"
            )


def write(records: Iterable[Record], clips: Sequence[JobClip], out: Path, chosen: Format) -> list[Path]:
    """Write `out`, shards, or a file for each video that has captions, and say where: files, or the folder of them.

    Raises `UsageError` if a file cannot be written.
    """
    place = out
    try:
        if chosen.shards:
            return webdataset.write(records, clips, out)
        if chosen.file_per_video:
            places = places_for(clips, out, chosen)
            for record in records:
                if "segments" in record and record["video"] in places:
                    place = places[record["video"]]
                    with replacing(place) as file:
                        file.writelines(chosen.write([record]))
        else:
            with replacing(out) as file:
                file.writelines(chosen.write(records))
    except OSError as error:
        raise UsageError(f"cannot write {place}: {error.strerror}; fix that, and start the job again") from error
    return [out]


def places_for(clips: Sequence[JobClip], out: Path, chosen: Format) -> dict[str, Path]:
    """The file for each video. In a folder it has the name of the video: videos/a.mp4 -> OUT/videos/a.vtt.

    Raises `UsageError` if `out` is one file and there are several videos, and if two videos would share a file.
    """
    by_suffix = _BY_SUFFIX.get(out.suffix.lower(), chosen)
    if by_suffix.file_per_video and by_suffix != chosen:
        raise UsageError(f"{out} has the name of a {by_suffix.name} file, but --format is {chosen.name}; change one")
    if out.suffix.lower() == chosen.suffix:
        if len(clips) > 1:
            raise UsageError(f"{out} is one file, and there are {len(clips)} videos; name a folder with --out")
        return {clip.video: out for clip in clips}
    names = {clip.video: clip.path if clip.video == id_of(clip.path) else clip.video for clip in clips}
    bare = {video: without_suffix(name) for video, name in names.items()}
    times = Counter(bare.values())
    places = {
        video: out / f"{name if times[name] == 1 else PurePath(*parts_of(names[video]))}{chosen.suffix}"
        for video, name in bare.items()
    }
    owner: dict[Path, str] = {}
    for video, place in places.items():
        if owner.setdefault(place, video) != video:
            raise UsageError(f"{owner[place]} and {video} would both be {place}; give each its own id in a list")
    return places
