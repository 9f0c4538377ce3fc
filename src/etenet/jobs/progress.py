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

TITLE = "etenet caption"
LINE_EVERY_S = 30.0  # without a terminal
ESTIMATE_AFTER_CLIPS = 8
AT_ONCE_S = 1.0  # records that come within this time of the first are those of one batch
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def say(text: str, title: str = TITLE) -> None:
    """A line on standard error, above the bar if there is one. No job ends because nobody reads it any more.

    What a terminal would obey, as in the name of a video in somebody's tar, is escaped.
    """
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    with suppress(OSError):
        tqdm.write(f"{title}: {shown}", file=sys.stderr)


def show(text: bytes) -> None:
    """Write to standard output, above the bar if there is one. Raises `OutputLost`."""
    with tqdm.external_write_mode():
        print_bytes(text)


@dataclass
class Pace:
    """How long a clip takes, once enough are done to tell.

    The first batch does not count: its clips come at once, after the network was loaded.
    """

    clips: int = 0
    _first_s: float = 0.0
    _at_once: int = 0
    _since_s: float = 0.0

    def count(self, now_s: float) -> None:
        """A clip is done."""
        self._first_s = self._first_s if self.clips else now_s
        self.clips += 1
        if now_s - self._first_s < AT_ONCE_S:
            self._at_once, self._since_s = self.clips, now_s

    def left_s(self, clips: int, now_s: float) -> float | None:
        """How long so many more take; None as long as nobody can know."""
        counted = self.clips - self._at_once
        return clips * (now_s - self._since_s) / counted if counted >= ESTIMATE_AFTER_CLIPS else None


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
    """Writes to standard error while a job runs. Nobody can estimate when one ends that waits for clips."""

    def __init__(self, summary: Summary, *, title: str = TITLE, estimates: bool = True) -> None:
        self._summary, self._title, self._last_line_s = summary, title, time.monotonic()
        self._pace = Pace() if estimates else None
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=summary.total, unit="clip", disable=not self._on_terminal, file=sys.stderr, bar_format=_BAR
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def count(self, records: Iterator[Record]) -> Iterator[Record]:
        """The same records. Each is counted when it is taken, and errors are written out."""
        for record in records:
            if "error" in record:
                self._summary.failed += 1
                say(f"{record['video']}: {record['error']['message']}", self._title)
                self._bar.set_postfix(failed=self._summary.failed)
            else:
                self._summary.captioned += 1
            if self._pace:
                self._pace.count(time.monotonic())
            yield record
            left = self._left()
            self._bar.total = self._summary.total
            self._bar.bar_format = _BAR.replace("{elapsed}", f"{{elapsed}}{left}")
            self._bar.update()
            if self._is_time():
                self._print(f"{self._summary}{left}")

    def _left(self) -> str:
        if self._pace is None:
            return ""
        left_s = self._pace.left_s(self._summary.total - self._pace.clips, time.monotonic())
        return "" if left_s is None else f", {_clock(left_s)} left"

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
        say(text, self._title)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
