"""Batch captioning: clips -> a record of each, once, whatever happens in between.

    etenet caption videos/ --out captions.jsonl

An engine captions (`job_local.py` here, `job_server.py` by a server, `job_ray.py` on a cluster); what it is given,
which clips are done already and what becomes of the answers is the same for all.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import fsspec
from tqdm import tqdm

from etenet import job_records
from etenet.atomic import replacing
from etenet.errors import TooLarge
from etenet.job_inputs import Clip, is_remote
from etenet.job_records import Journal, Record

READERS = 4
READ_AHEAD = 16
SAID_AGAIN_S = 30.0  # between two lines about how far it is, where there is no terminal
REMEMBERED = 100_000  # answers to bodies that were seen

Engine: TypeAlias = Callable[[Iterable[Clip]], Iterator[Record]]
"""Clips -> a record of each, in any order, taking clips as it has room."""
Answers: TypeAlias = Iterator[tuple[str, Record]]
BodyEngine: TypeAlias = Callable[[Iterable[tuple[str, bytes]]], Answers]
"""The same for what has read the files: bodies by keys -> records (without "video") by the same keys."""


@dataclass
class Summary:
    """What became of the clips of one run; `before` were done by an earlier one, `failed_before` of them in vain."""

    total: int
    before: int = 0
    failed_before: int = 0
    captioned: int = 0
    failed: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def clips_per_s(self) -> float:
        return (self.captioned + self.failed) / (time.monotonic() - self.began_s)

    def __str__(self) -> str:
        done = self.captioned + self.failed
        text = f"{done} of {self.total} clips, {self.failed} failed, {self.clips_per_s:.2f} clips/s"
        if self.before:
            text += f"; {self.before} were done before"
        if self.failed_before:
            text += f", {self.failed_before} of them failed (--retry-failed tries them again)"
        return text


def run(
    clips: Sequence[Clip],
    engine: Engine,
    *,
    out: Path | None,
    form: str,
    in_order: bool = False,
    retry_failed: bool = False,
) -> Summary:
    """Caption what `out` does not hold yet. Without `out`, records go to standard output.

    Raises `UsageError` where `out` is no journal or cannot be written, `Stopped` where the engine cannot go on.
    """
    summary = Summary(len(clips))
    with ExitStack() as stack:
        journal = None
        if out:
            journal = stack.enter_context(Journal(out if form == "jsonl" else out.with_name(f"{out.name}.jsonl")))
            if retry_failed:
                journal.forget_failures()
        done = journal.done if journal else {}
        todo = [clip for clip in clips if clip.video not in done]
        summary.before, summary.total = len(clips) - len(todo), len(todo)
        summary.failed_before = sum(done.get(clip.video, False) for clip in clips)
        records = engine(todo) if todo else iter(())
        records = _told(_ordered(todo, records) if in_order else records, summary)
        if journal:
            for record in records:
                journal.add(record)
            if in_order:
                journal.put_in_order(clip.video for clip in clips)
            if out and form != "jsonl":
                with replacing(out) as file:
                    file.writelines(job_records.WRITERS[form](job_records.read(journal.path)))
        else:
            for text in job_records.WRITERS[form](records):
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
    return summary


def of_bodies(engine: BodyEngine, max_body_bytes: int) -> Engine:
    """Reads the files for an engine, some ahead, and gives it the same bytes only once."""
    return lambda clips: _captioned(clips, engine, max_body_bytes)


def _captioned(clips: Iterable[Clip], engine: BodyEngine, max_body_bytes: int) -> Iterator[Record]:
    known: dict[str, Record] = {}
    waiting: dict[str, list[Clip]] = {}
    without_engine: deque[Record] = deque()

    def bodies() -> Iterator[tuple[str, bytes]]:
        for clip, body in _read_ahead(clips, max_body_bytes):
            if isinstance(body, dict):
                without_engine.append({"video": clip.video, **body})
                continue
            key = blake2b(body, digest_size=16).hexdigest()
            if key in known:
                without_engine.append({"video": clip.video, **known[key]})
            elif key in waiting:
                waiting[key].append(clip)
            else:
                waiting[key] = [clip]
                yield key, body

    for key, record in engine(bodies()):
        known[key] = record
        if len(known) > REMEMBERED:
            del known[next(iter(known))]
        for clip in waiting.pop(key):
            yield {"video": clip.video, **record}
        while without_engine:
            yield without_engine.popleft()
    yield from without_engine


def _read_ahead(clips: Iterable[Clip], max_body_bytes: int) -> Iterator[tuple[Clip, bytes | Record]]:
    """The bytes of each clip, or what is wrong with its file; the next few are read meanwhile."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        window: deque[tuple[Clip, Future[bytes | Record]]] = deque()
        try:
            for clip in clips:
                window.append((clip, readers.submit(read, clip.path, max_body_bytes)))
                if len(window) >= READ_AHEAD:
                    first, body = window.popleft()
                    yield first, body.result()
            for first, body in window:
                yield first, body.result()
        finally:
            for _, body in window:
                body.cancel()


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


def _ordered(clips: Iterable[Clip], records: Iterator[Record]) -> Iterator[Record]:
    """The same records, each held back until those of the clips before it are there."""
    early: dict[str, Record] = {}
    for clip in clips:
        while clip.video not in early:
            record = next(records)
            early[record["video"]] = record
        yield early.pop(clip.video)


def _told(records: Iterator[Record], summary: Summary) -> Iterator[Record]:
    """The same records; standard error hears of failures, and how far it is."""
    on_terminal, said_s = sys.stderr.isatty(), time.monotonic()
    with tqdm(total=summary.total, unit="clip", disable=not on_terminal, file=sys.stderr) as bar:
        for record in records:
            if "error" in record:
                summary.failed += 1
                bar.write(f"etenet caption: {record['video']}: {record['error']['message']}", file=sys.stderr)
                bar.set_postfix(failed=summary.failed)
            else:
                summary.captioned += 1
            yield record
            bar.update()
            if not on_terminal and time.monotonic() - said_s > SAID_AGAIN_S:
                said_s = time.monotonic()
                left_s = (summary.total - summary.captioned - summary.failed) / summary.clips_per_s
                print(f"etenet caption: {summary}, {left_s / 60:.0f} min left", file=sys.stderr)
