"""Features (N, L, D) that were computed elsewhere: checked, copied as float32, and matched with their clips.

Knows no encoder, and not what the numbers mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etenet.errors import UsageError
from training.data.arrays import new_array
from training.data.caption_files import read_captions
from training.data.source_clip import SourceClip
from training.data.splits import Shares, splits_of
from training.progress import counted


def clips_by_row(features: Path, captions: Path, shares: Shares) -> dict[int, SourceClip]:
    """The clips of a captions file by row: in the order of the file, or by the rows that it gives."""
    count, described = len(_opened(features)), read_captions(captions)
    splits = splits_of(described, captions, shares)
    if any(clip.row is not None for clip in described.values()):
        if without := [name for name, clip in described.items() if clip.row is None]:
            raise UsageError(
                f"{captions}: {without[0]} has no row, but other clips have; give all of them one, or none"
            )
        rows = [clip.row for clip in described.values() if clip.row is not None]
        if len(set(rows)) < len(rows):
            raise UsageError(f"{captions}: two clips have the same row of {features}; give each its own")
        if max(rows) >= count:
            raise UsageError(f"{captions} names row {max(rows)}, but {features} has only {count} rows (from 0)")
    else:
        rows = list(range(len(described)))
        if len(rows) != count:
            raise UsageError(
                f'{captions} names {len(rows)} clips and {features} has {count} rows; give each clip its "row"'
            )
    return {
        row: SourceClip(video=name, split=splits[name], captions=tuple(clip.captions), source=clip.group)
        for row, (name, clip) in zip(rows, described.items(), strict=True)
    }


def copy(features: Path, target: Path) -> None:
    """Copy as float32. Raises `UsageError` for infinities and NaN, and if the disk has no room."""
    given, unfinished = _opened(features), target.with_name(f"{target.name}.partial")
    copied = new_array(unfinished, np.float32, given.shape)
    for row, values in enumerate(counted(given, "features", "clip")):
        copied[row] = values
        if not np.isfinite(copied[row]).all():
            raise UsageError(f"{features}: row {row} holds infinities or NaN; compute it again")
    copied.flush()
    os.replace(unfinished, target)


def _opened(features: Path) -> NDArray[Any]:
    try:
        given = np.load(features, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {features}: {error}; save it with numpy.save") from error
    if not isinstance(given, np.ndarray) or given.ndim != 3 or given.dtype.kind != "f" or not given.size:
        contents = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else "an archive"
        raise UsageError(f"{features} must be floating-point (clips, frames, size), it is {contents}; reshape it")
    return given
