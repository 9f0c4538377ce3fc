"""What a job prints of its videos while it works on them: a line for each segment, as soon as it has a caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from etenet.jobs.formats import Format
from etenet.jobs.journal import Record
from etenet.jobs.progress import show


class Follower:
    """Prints each segment once: when an engine reports it, or else with the record of its video."""

    def __init__(self, format: Format) -> None:
        """`format` is one of lines."""
        self._format, self._printed = format, Counter[str]()

    def on_segments(self, video: str, segments: Sequence[Record]) -> None:
        """Print further segments of a video."""
        self._printed[video] += len(segments)
        for segment in segments:
            self._print({"video": video, **segment})

    def on_record(self, record: Record) -> None:
        """Print what was not printed of a video that is done."""
        printed = self._printed.pop(record["video"], 0)
        if "segments" not in record:
            self._print(record)
        for segment in record.get("segments", [])[printed:]:
            self._print({"video": record["video"], **segment})

    def _print(self, line: Record) -> None:
        without_pictures = {name: value for name, value in line.items() if name != "frames"}
        for text in self._format.write([without_pictures]):
            show(text)
