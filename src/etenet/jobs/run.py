"""Batch captioning: clips -> a record of each, once, whatever happens in between.

    etenet caption videos/ --out captions.jsonl

An engine captions (`job_local.py` here, `job_server.py` by a server, `job_ray.py` on a cluster); what it is given,
which clips are done already and what becomes of the answers is the same for all.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import fsspec

from etenet.errors import TooLarge
from etenet.jobs import formats
from etenet.jobs.formats import JOURNAL, Format
from etenet.jobs.inputs import JobClip, is_remote
from etenet.jobs.journal import Journal, Record
from etenet.jobs.progress import Progress, Summary
from etenet.video.segments import WHOLE, Cut

SEGMENTS_AT_ONCE = 8  # of one video
READERS = 4
READ_AHEAD, READ_AHEAD_BYTES = 16, 256 * 2**20
REMEMBERED = 100_000  # answers to bodies that were seen

Reached: TypeAlias = Callable[[str, float, float], None]
"""Hears of a video in segments, meanwhile, until when it is captioned, and how long it is."""
Engine: TypeAlias = Callable[[Iterable[JobClip], Reached], Iterator[Record]]
"""Clips -> a record of each, in any order, taking clips as it has room."""
Answers: TypeAlias = Iterator[tuple[str, Record]]
BodyEngine: TypeAlias = Callable[[Iterable[tuple[str, bytes, Cut]], Reached], Answers]
"""The same for what has read the files: bodies by keys -> records (without "video") by the same keys."""


def run(
    clips: Sequence[JobClip],
    engine: Engine,
    *,
    out: Path | None,
    format: Format = JOURNAL,
    in_order: bool = False,
    retry_failed: bool = False,
) -> Summary:
    """Caption what `out` does not hold yet. Without `out`, records go to standard output.

    Raises `UsageError` where `out` is no journal or cannot be written, `JobStopped` where the engine cannot go on.
    """
    summary, out = Summary(len(clips)), out and out.resolve()
    if format.file_per_video:
        formats.places_for(clips, out or Path(f"standard output{format.suffix}"), format)
    with ExitStack() as stack:
        journal = None
        if out:
            journal = stack.enter_context(Journal(out if format == JOURNAL else out.with_name(f"{out.name}.jsonl")))
            if retry_failed:
                journal.forget_failures()
        done = journal.done if journal else {}
        todo = [clip for clip in clips if clip.video not in done]
        summary.before, summary.total = len(clips) - len(todo), len(todo)
        summary.failed_before = sum(done.get(clip.video, False) for clip in clips)
        progress = stack.enter_context(Progress(summary))
        records = progress.of(engine(todo, progress.reached) if todo else iter(()))
        if in_order:
            records = _ordered(todo, records)
        if journal:
            for record in records:
                journal.add(record)
            if in_order:
                journal.put_in_order(clip.video for clip in clips)
            if out and format != JOURNAL:
                formats.write(journal.records(), clips, out, format)
        else:
            for text in format.write(records):
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
    return summary


def of_bodies(engine: BodyEngine, max_body_bytes: int, cut: Cut = WHOLE) -> Engine:
    """Reads the files for an engine, some ahead, and gives it the same part of the same bytes only once."""
    return lambda clips, reached: _captioned(clips, engine, max_body_bytes, cut, reached)


def part_of(clip: JobClip, cut: Cut) -> Cut:
    """How a clip of a file is cut, of which so many segments are in memory at once."""
    most = SEGMENTS_AT_ONCE if cut.into_segments else None
    return replace(cut, start_s=clip.start_s, end_s=clip.end_s, max_segments=most)


def segments_expected(clips: int, cut: Cut) -> int:
    """At least, roughly: for weighing what is worth doing before the first."""
    return clips * (SEGMENTS_AT_ONCE if cut.into_segments else 1)


def _captioned(
    clips: Iterable[JobClip], engine: BodyEngine, max_body_bytes: int, cut: Cut, reached: Reached
) -> Iterator[Record]:
    known: dict[str, Record] = {}
    waiting: dict[str, list[JobClip]] = {}
    without_engine: deque[Record] = deque()

    def bodies() -> Iterator[tuple[str, bytes, Cut]]:
        for clip, body in _read_ahead(clips, max_body_bytes):
            if isinstance(body, dict):
                without_engine.append({"video": clip.video, **body})
                continue
            part = part_of(clip, cut)
            key = f"{blake2b(body, digest_size=16).hexdigest()} {part}"
            if key in known:
                without_engine.append({"video": clip.video, **known[key]})
            elif key in waiting:
                waiting[key].append(clip)
            else:
                waiting[key] = [clip]
                yield key, body, part

    def of_key(key: str, said_until_s: float, duration_s: float) -> None:
        reached(waiting[key][0].video, said_until_s, duration_s)

    for key, record in engine(bodies(), of_key):
        known[key] = record
        if len(known) > REMEMBERED:
            del known[next(iter(known))]
        for clip in waiting.pop(key):
            yield {"video": clip.video, **record}
        while without_engine:
            yield without_engine.popleft()
    yield from without_engine


def _read_ahead(clips: Iterable[JobClip], max_body_bytes: int) -> Iterator[tuple[JobClip, bytes | Record]]:
    """The bytes of each clip, or what is wrong with its file; the next few are read meanwhile."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        window: deque[tuple[JobClip, Future[bytes | Record]]] = deque()
        try:
            for clip in clips:
                window.append((clip, readers.submit(read, clip.path, max_body_bytes)))
                while len(window) >= READ_AHEAD or sum(size_of(ahead.path) for ahead, _ in window) > READ_AHEAD_BYTES:
                    first, body = window.popleft()
                    yield first, body.result()
            for first, body in window:
                yield first, body.result()
        finally:
            for _, body in window:
                body.cancel()


def size_of(path: str) -> int:
    """Bytes of a file; 0 where that is not known, as it is not here."""
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def read(path: str, max_body_bytes: int) -> bytes | Record:
    """A file's bytes, or what is wrong with it."""
    try:
        with fsspec.open(path, "rb") if is_remote(path) else open(path, "rb") as file:
            body: bytes = file.read(max_body_bytes + 1)
    except (OSError, ImportError, ValueError) as error:
        return {"error": {"code": "unreadable_file", "message": f"{path}: {error}"}}
    if len(body) > max_body_bytes:
        too_large = TooLarge(f"the video has more than {max_body_bytes} bytes, the limit; give a shorter clip")
        return dict(too_large.as_dict())
    return body


def _ordered(clips: Iterable[JobClip], records: Iterator[Record]) -> Iterator[Record]:
    """The same records, each held back until those of the clips before it are there."""
    early: dict[str, Record] = {}
    for clip in clips:
        while clip.video not in early:
            record = next(records)
            early[record["video"]] = record
        yield early.pop(clip.video)
