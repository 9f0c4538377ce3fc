"""Which part of a video is captioned, and where it is cut into segments. Numbers only: knows no file and no frame.

Times are seconds from the video's first frame, in whole milliseconds: a request that starts where an earlier response
ended gets the segments that one long response would have had.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from numbers import Integral
from typing import Literal

from etenet.errors import BadOption

SHORTEST_SEGMENT_S = 1.0
MOST_SEGMENTS_OF_A_VIDEO = 20_000
_TOLERANCE_S = 0.001  # a frame that appears this little before a segment belongs to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of a video that is captioned as a clip of its own; `frames` are indices in the video's frame list."""

    start_s: float
    end_s: float
    frames: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A part of a video, and what cuts it: a length, scene changes, or nothing.

    Segments beyond the first `max_segments` are left for another request. Without it, all are returned.
    """

    start_s: float = 0.0
    end_s: float = math.inf
    segment_s: float | None = None
    segment: Literal["scenes"] | None = None
    max_segments: int | None = None

    def __post_init__(self) -> None:
        for name in ("start_s", "end_s", "segment_s"):
            value = getattr(self, name)
            if value is None and name == "segment_s":
                continue
            try:
                object.__setattr__(self, name, round(float(value), 3))
            except (TypeError, ValueError) as error:
                raise BadOption(f"{name} must be a number of seconds, got {value!r}") from error
        if not 0 <= self.start_s < self.end_s:
            raise BadOption(f"start_s must be from 0 to before end_s, got {self.start_s:g} and {self.end_s:g}")
        if self.segment_s is not None and not SHORTEST_SEGMENT_S <= self.segment_s < math.inf:
            raise BadOption(f"segment_s must be from {SHORTEST_SEGMENT_S:g} on, got {self.segment_s:g}")
        if self.segment not in (None, "scenes"):
            raise BadOption(f"segment can only be scenes, got {str(self.segment)[:40]!r}")
        if self.segment_s and self.segment:
            raise BadOption("segments have one length or are scenes, not both; leave out segment_s or segment")
        if self.max_segments is not None:
            if not isinstance(self.max_segments, Integral):
                raise BadOption(f"max_segments must be a whole number, got {self.max_segments!r}")
            if self.max_segments < 1:
                raise BadOption(f"max_segments must be from 1 on, got {self.max_segments}")
            object.__setattr__(self, "max_segments", int(self.max_segments))  # also of NumPy's

    @property
    def fragment(self) -> str:
        """The end of a path that names the part of the video. Source: W3C Media Fragments URI 1.0, 4.2.1."""
        if not self.start_s and self.end_s == math.inf:
            return ""
        return f"#t={_shortly(self.start_s)}" + ("" if self.end_s == math.inf else f",{_shortly(self.end_s)}")

    @property
    def into_segments(self) -> bool:
        return bool(self.segment_s or self.segment)

    def segments(
        self, times_s: Sequence[float], duration_s: float, scenes_s: Iterable[float] = (), *, most: int
    ) -> list[Segment]:
        """The segments, in order, of a video whose frames appear at `times_s`. Scenes begin at `scenes_s`.

        A frame belongs to the segment in which it appears. A segment in which none appears gets the frame that is still
        shown. A remainder shorter than `SHORTEST_SEGMENT_S` belongs to the segment before it. Raises `BadOption` if the
        cut is empty, or has more than `most` segments and all are wanted.
        """
        if not self.into_segments and not self.start_s and self.end_s == math.inf:  # even if the times are wrong
            return [Segment(start_s=0.0, end_s=duration_s, frames=range(len(times_s)))]
        video_ends_s = max(duration_s, times_s[-1])
        if self.start_s and self.start_s >= video_ends_s:
            raise BadOption(f"the video ends at {video_ends_s:.3f} s, before start_s={self.start_s:g}")
        end_s = min(self.end_s, video_ends_s)
        if self.segment_s and (end_s - self.start_s) / self.segment_s > MOST_SEGMENTS_OF_A_VIDEO:
            raise BadOption(
                f"by its timestamps the video has {end_s:.0f} s: more than {MOST_SEGMENTS_OF_A_VIDEO} segments; ask "
                "for longer ones, or repair the timestamps, for example with ffmpeg -fflags +genpts"
            )
        count_limit = min(self.max_segments or most, most)
        starts_s = [self.start_s]
        for start_s in self._grid_s() if self.segment_s else scenes_s:
            if start_s > end_s - SHORTEST_SEGMENT_S + _TOLERANCE_S:
                break
            if start_s >= starts_s[-1] + SHORTEST_SEGMENT_S - _TOLERANCE_S:
                starts_s.append(round(start_s, 3))
                if len(starts_s) > count_limit:
                    break
        if len(starts_s) > most and not self.max_segments:
            raise BadOption(f"the video has more than {most} segments, the limit; ask for longer ones or max_segments")
        segments = (
            Segment(start_s=a, end_s=b, frames=_frames_that_appear(times_s, a, math.inf if b >= video_ends_s else b))
            for a, b in pairwise([*starts_s, end_s])
        )
        return list(islice(segments, count_limit))

    def rest(self, captioned_until_s: float, duration_s: float) -> Cut | None:
        """What is left of a video of this length after a response that ended there; None if nothing is."""
        ends_s = min(self.end_s, duration_s)
        if self.max_segments is None or not self.start_s < captioned_until_s < ends_s - SHORTEST_SEGMENT_S / 2:
            return None
        return replace(self, start_s=captioned_until_s)

    def _grid_s(self) -> Iterator[float]:
        assert self.segment_s
        return (self.start_s + number * self.segment_s for number in count(1))


WHOLE = Cut()


def _shortly(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def _frames_that_appear(times_s: Sequence[float], start_s: float, end_s: float) -> range:
    first = bisect_left(times_s, start_s - _TOLERANCE_S)
    after = bisect_left(times_s, end_s - _TOLERANCE_S)
    return range(first, after) if first < after else range(max(0, first - 1), max(1, first))
