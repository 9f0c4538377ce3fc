"""How far a batch job is, on standard error: a bar on a terminal, a line now and then elsewhere, and a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tqdm import tqdm

from etenet.files import print_bytes
from etenet.jobs.journal import Record

LINE_EVERY_S = 30.0  # without a terminal


def say(text: str) -> None:
    """A line on standard error, above the bar if there is one. No job ends because nobody reads it any more."""
    with suppress(OSError):
        tqdm.write(f"etenet caption: {text}", file=sys.stderr)


def show(text: bytes) -> None:
    """Write to standard output, above the bar if there is one. Raises `OutputLost`."""
    with tqdm.external_write_mode():
        print_bytes(text)


@dataclass
class Summary:
    """What this run did. An earlier run did `before` clips, of which `failed_before` have no caption."""

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


class Progress:
    """Writes to standard error while a job runs."""

    def __init__(self, summary: Summary) -> None:
        self._summary, self._last_line_s = summary, time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=summary.total, unit="clip", disable=not self._on_terminal, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def count(self, records: Iterator[Record]) -> Iterator[Record]:
        """The same records. Each is counted when it is taken, and errors are written out."""
        for record in records:
            if "error" in record:
                self._summary.failed += 1
                say(f"{record['video']}: {record['error']['message']}")
                self._bar.set_postfix(failed=self._summary.failed)
            else:
                self._summary.captioned += 1
            yield record
            self._bar.update()
            if self._is_time():
                done = self._summary.captioned + self._summary.failed
                left_s = (self._summary.total - done) / self._summary.clips_per_s
                self._print(f"{self._summary}, {left_s / 60:.0f} min left")

    def on_segments(self, video: str, segments: Sequence[Record], duration_s: float) -> None:
        """How far a video in segments is."""
        position = f"{video}: {_clock(segments[-1]['end_s'])} of {_clock(duration_s)}"
        self._bar.set_postfix_str(position)
        if self._is_time():
            self._print(position)

    def _is_time(self) -> bool:
        return not self._on_terminal and time.monotonic() - self._last_line_s > LINE_EVERY_S

    def _print(self, text: str) -> None:
        self._last_line_s = time.monotonic()
        say(text)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
