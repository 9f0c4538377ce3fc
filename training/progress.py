"""How far long work is, on standard error: a bar on a terminal, a line every 30 s elsewhere.

Knows nothing of what is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_EVERY_S = 30.0  # without a terminal
FIRST_LINE_S = 5.0  # when the speed is known well enough to say how long the rest takes


class Progress:
    """Counts things such as clips up to a total. `done` of them were done before."""

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._before, self._clock = done, clock
        self._lines = not (silent or sys.stderr.isatty())
        self._bar = tqdm(
            total=total, initial=done, desc=title, unit=unit, disable=silent or self._lines, file=sys.stderr
        )
        self._began_s = clock()
        self._next_line_s = self._began_s + FIRST_LINE_S

    def update(self, count: int, note: str = "") -> None:
        """`count` more are done. The note is shown beside the numbers."""
        self._done += count
        self._bar.update(count)
        self._bar.set_postfix_str(note)
        if self._lines and (now := self._clock()) >= self._next_line_s and self._done < self._total:
            self._next_line_s = now + LINE_EVERY_S
            per_s = (self._done - self._before) / max(now - self._began_s, 1e-9)
            left = f"about {duration((self._total - self._done) / per_s)} left" if per_s > 0 else "just begun"
            numbers = f"{self._done:,} of {self._total:,} {self._unit}s, {per_s:.1f} a second, {left}"
            say(f"{self._title}: {numbers}{f' ({note})' if note else ''}")

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def counted(things: Collection[T], title: str, unit: str) -> Iterator[T]:
    """The same things. Each is counted when the next one is taken."""
    with Progress(title, len(things), unit) as progress:
        for thing in things:
            yield thing
            progress.update(1)


def say(line: str) -> None:
    """A line on standard error, above the bars."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(f"training: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """90 -> 90 s, 1000 -> 17 min, 10000 -> 2 h 47 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
