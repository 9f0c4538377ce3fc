"""Batch captioning: clips -> one record for each, exactly once, even if the job is killed and started again.

    etenet caption videos/ --out captions.jsonl

An engine makes the captions: `engines/local.py` in this process, `engines/server.py` by a server, `engines/ray.py` on a
cluster. What it is given, which clips are done already and where its records go is the same for all engines, and here.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import starmap
from pathlib import Path
from typing import TypeAlias

from etenet.errors import JobStopped, TooLarge, UsageError, counted
from etenet.files import print_bytes
from etenet.jobs import formats
from etenet.jobs.follow import Follower
from etenet.jobs.formats import JOURNAL, REPORT, Format
from etenet.jobs.inputs import JobClip, Source, id_of
from etenet.jobs.journal import Job, Journal, Record
from etenet.jobs.progress import Progress, Summary, say
from etenet.jobs.remote import Publication, is_remote, opened
from etenet.jobs.watch import Watch, until_stopped
from etenet.video.segments import WHOLE, Cut

MAX_BODY_BYTES = 2**30  # of one video
SEGMENTS_AT_ONCE = 8  # of one video
READERS = 4
READ_AHEAD, READ_AHEAD_BYTES = 16, 256 * 2**20
MAX_REMEMBERED = 10_000  # records of bodies, for files that have the same bytes; with pictures, each has 20 kB

OnSegments: TypeAlias = Callable[[str, Sequence[Record], float], None]
"""Called with a key, further segments of the record of its video, in order, and the video's duration in seconds."""
Engine: TypeAlias = Callable[[Iterable[JobClip], OnSegments], Iterator[Record]]
"""Clips -> a record for each, in any order. Takes clips as it has room. Segments are reported by the clip's `video`."""
KeyedRecords: TypeAlias = Iterator[tuple[str, Record]]
BodyEngine: TypeAlias = Callable[[Iterable[tuple[str, bytes, Cut]], OnSegments], KeyedRecords]
"""An engine that is given the contents of the files, with keys, and returns records without "video" by these keys."""


def run(
    clips: Sequence[JobClip],
    engine: Engine,
    *,
    out: Path | None,
    format: Format = JOURNAL,
    publication: Publication | None = None,
    report: Path | None = None,
    job: Job | None = None,
    about: str = "",
    in_order: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
    follow: bool = False,
) -> Summary:
    """Caption the clips that `out` does not have yet. Without `out`, the output goes to standard output.

    With a `watch` also those that arrive until Ctrl-C or SIGTERM. Formats other than JSON lines are written after that.

    A `report`, which needs an `out` beside it, shows the same clips. With `follow`, standard output gets a line for
    each segment as soon as it has a caption.
    A line before the first clip says how many there are, and `about` what else there is to say.
    Raises `UsageError` if `out` is another kind of file, is that of another `job` or cannot be written, and
    `JobStopped` if the engine fails.
    """
    clips, summary, out = list(clips), Summary(len(clips)), out and Path(os.path.realpath(out))
    follower = Follower(formats.of_lines(format, out)) if follow else None
    if out:
        formats.check(clips, out, format)
    elif format.file_per_video:
        formats.places_for(clips, Path(f"standard output{format.suffix}"), format)
    if not out and sys.stdout is None:
        raise UsageError("standard output is closed; name a file with --out")
    with ExitStack() as stack:
        journal = None
        if out:
            path = formats.journal_of(out, format)
            name = publication.url_of(path.name) if publication else ""
            journal = stack.enter_context(Journal(path, job, overwrite=overwrite, name=name))
            if publication:
                _continue_published(journal, publication, job, overwrite=overwrite)
            if retry_failed:
                journal.forget_failures()
        done = journal.done if journal else {}
        todo = [clip for clip in clips if clip.video not in done]
        summary.before, summary.total = len(clips) - len(todo), len(todo)
        summary.failed_before = sum(done.get(clip.video, False) for clip in clips)
        if about:
            found = f"watching {watch}" if watch else _found(clips, summary, journal)
            say(f"{found}; {about if todo or watch else 'nothing to do'}")
        progress = stack.enter_context(Progress(summary, estimates=watch is None))

        def on_segments(video: str, segments: Sequence[Record], duration_s: float) -> None:
            if follower:
                follower.on_segments(video, segments)
            progress.on_segments(video, segments, duration_s)

        def publish_meanwhile() -> None:
            if journal and publication and publication.is_due(journal.path):
                _publish_meanwhile(journal, publication)

        records = engine(todo, on_segments) if todo else iter(())
        if watch:
            records = _arriving(watch, engine, clips, done, summary, on_segments, publish_meanwhile)
        records = progress.count(records)
        if in_order:
            records = _ordered(todo, records)
        with until_stopped() if watch else nullcontext():
            if journal or follower:
                for record in records:
                    if journal:
                        journal.add(record)
                    if follower:
                        follower.on_record(record)
                    publish_meanwhile()
            else:
                for text in format.write(records):
                    print_bytes(text)
        if journal:
            if in_order:
                journal.put_in_order(clip.video for clip in clips)
            written = formats.write(journal.records(), clips, out, format) if out and format != JOURNAL else []
            if report:
                formats.write(journal.records(), clips, report, REPORT)
            if out and publication:
                _publish(publication, *written, journal.path)
                publication.close()
    return summary


def _arriving(
    watch: Watch,
    engine: Engine,
    clips: list[JobClip],
    done: Mapping[str, bool],
    summary: Summary,
    on_segments: OnSegments,
    meanwhile: Callable[[], object],
) -> Iterator[Record]:
    """The records of all clips that arrive and are not done or under way. Adds the clips to `clips`."""
    under_way: set[str] = set()

    def new(arrived: Iterable[JobClip]) -> Iterator[JobClip]:
        for clip in arrived:
            if clip.video in under_way:
                continue
            clips.append(clip)
            if clip.video not in done:
                under_way.add(clip.video)
                summary.total += 1
                yield clip

    for arrived in watch.rounds(meanwhile):
        for record in engine(new(arrived), on_segments):
            yield record
            under_way.discard(record["video"])


def _found(clips: Sequence[JobClip], summary: Summary, journal: Journal | None) -> str:
    text = counted(len(clips), "clip")
    if summary.before:
        text += f", {summary.before} of them done before"
    if journal and journal.is_of_unknown_job:
        text += f"; {journal.name} does not say with what checkpoint and settings: they must be the same"
    return text


def _continue_published(journal: Journal, publication: Publication, job: Job | None, *, overwrite: bool) -> None:
    """Add the records that are published and not on this machine, and see whether something can be published at all."""
    if not overwrite:
        with publication.fetched(journal.path.name) as path:
            if path:
                with Journal(path, job, name=journal.name) as published:
                    for record in published.records():
                        if record["video"] not in journal.done:
                            journal.add(record)
    _publish(publication, journal.path)


def _publish_meanwhile(journal: Journal, publication: Publication) -> None:
    try:
        publication.publish(journal.path)
    except OSError as error:
        say(f"{error}; trying again later, and the records are in {journal.path}")


def _publish(publication: Publication, *paths: Path) -> None:
    try:
        publication.publish(*paths)
    except OSError as error:
        raise JobStopped(f"{error}; fix that, and start the job again (it goes on from {paths[-1]})") from error


def of_bodies(engine: BodyEngine, max_body_bytes: int, cut: Cut = WHOLE) -> Engine:
    """An engine that reads the files for `engine`, a few ahead, and gives it each part of the same bytes only once."""
    return lambda clips, on_segments: _captioned(clips, engine, max_body_bytes, cut, on_segments)


def part_of(clip: JobClip, cut: Cut) -> Cut:
    """The cut of a clip's file, of which only so many segments are in memory at once."""
    max_segments = SEGMENTS_AT_ONCE if cut.into_segments else None
    return replace(cut, start_s=clip.start_s, end_s=clip.end_s, max_segments=max_segments)


def segments_expected(clips: int, cut: Cut) -> int:
    """A rough lower bound, to decide what is worth doing before the first."""
    return clips * (SEGMENTS_AT_ONCE if cut.into_segments else 1)


def _captioned(
    clips: Iterable[JobClip], engine: BodyEngine, max_body_bytes: int, cut: Cut, on_segments: OnSegments
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

    def on_segments_of_key(key: str, segments: Sequence[Record], duration_s: float) -> None:
        on_segments(waiting[key][0].video, segments, duration_s)

    for key, record in engine(bodies(), on_segments_of_key):
        known[key] = record
        if len(known) > MAX_REMEMBERED:
            del known[next(iter(known))]
        for clip in waiting.pop(key):
            yield {"video": clip.video, **record}
        while without_engine:
            yield without_engine.popleft()
    yield from without_engine


def _read_ahead(clips: Iterable[JobClip], max_body_bytes: int) -> Iterator[tuple[JobClip, bytes | Record]]:
    """The bytes of each clip, or a record of why they cannot be read. The next few clips are read ahead."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        window: deque[tuple[JobClip, Future[bytes | Record]]] = deque()
        try:
            for clip in clips:
                window.append((clip, readers.submit(read, clip.source, max_body_bytes)))
                while len(window) >= READ_AHEAD or sum(starmap(_held_bytes, window)) > READ_AHEAD_BYTES:
                    first, body = window.popleft()
                    yield first, body.result()
            for first, body in window:
                yield first, body.result()
        finally:
            for _, body in window:
                body.cancel()


def _held_bytes(clip: JobClip, body: Future[bytes | Record]) -> int:
    """Of a clip that is read ahead. From a URL, that is known once it is there: until then it counts as a large one."""
    if body.done():
        return len(contents) if isinstance(contents := body.result(), bytes) else 0
    return size_of(clip.source) or READ_AHEAD_BYTES // READERS


def size_of(source: Source) -> int:
    """How many bytes there are to read; 0 if that is unknown, as for a URL."""
    if source.sample:
        return source.sample.size
    with suppress(OSError, ValueError):
        return os.path.getsize(source.path)
    return 0


def read(source: Source, max_body_bytes: int) -> bytes | Record:
    """The bytes of a clip, or a record of why they cannot be used."""
    try:
        body = _contents(source, max_body_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: no path at all, as with a NUL in it
        reason = (isinstance(error, OSError) and error.strerror) or error
        return {"error": {"code": "unreadable_file", "message": f"{id_of(source.path)}: {reason}"}}
    if len(body) > max_body_bytes:
        too_large = TooLarge(f"the video has more than {max_body_bytes} bytes, the limit; give a shorter clip")
        return dict(too_large.as_dict())
    return body


def _contents(source: Source, most_bytes: int) -> bytes:
    """The first bytes of a clip. Raises `OSError` and `ValueError`."""
    path, sample = source.path, source.sample
    if source.fault:
        raise OSError(source.fault)
    with opened(path) if is_remote(path) else open(path, "rb") as file:
        if sample is None:
            return file.read(most_bytes)
        file.seek(sample.offset)
        body = file.read(min(sample.size, most_bytes))
    if len(body) < min(sample.size, most_bytes):
        raise OSError(f"it has become too short for {id_of(sample.name)}; copy it again")
    return body


def _ordered(clips: Iterable[JobClip], records: Iterator[Record]) -> Iterator[Record]:
    """The same records in the order of the clips. A record waits until those of all clips before it are there."""
    early: dict[str, Record] = {}
    for clip in clips:
        while clip.video not in early:
            record = next(records)
            early[record["video"]] = record
        yield early.pop(clip.video)
