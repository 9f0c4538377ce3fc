"""A clip of a data set before it is prepared: what `sources` finds, and what becomes a line of the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from training.data.still_frames import Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceClip:
    """One clip of a data set. `render` makes the bytes of a file that does not exist yet."""

    video: str
    split: str
    captions: tuple[str, ...]
    file: Path | None = None  # None: there is none
    pictures: tuple[Picture, ...] = ()  # of a clip of stills
    render: Callable[[], bytes] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    source: str | None = None  # what it was cut from: the id of a YouTube video, or the user's group
    alias: str | None = None  # another id of the clip: vidN of MSVD
