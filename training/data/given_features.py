"""Features that somebody else computed, (N, L, D): checked, copied as float32, and their clips.

Knows no encoder: what the numbers mean is the giver's to know.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from etenet.errors import UsageError
from training.data.caption_files import read_captions
from training.data.sources import Shares, SourceClip, splits_of


def clips_by_row(features: Path, captions: Path, shares: Shares) -> dict[int, SourceClip]:
    """The clips that a captions file tells of, each at its row: the next one, or the one that the file says."""
    count, described = len(_opened(features)), read_captions(captions)
    splits = splits_of(described, captions, shares)
    if any(clip.row is not None for clip in described.values()):
        if without := [name for name, clip in described.items() if clip.row is None]:
            raise UsageError(f"{captions}: {without[0]} has no row, others have; give all of them one, or none")
        rows = [clip.row for clip in described.values() if clip.row is not None]
        if len(set(rows)) < len(rows):
            raise UsageError(f"{captions}: two clips have the same row of {features}; give each its own")
        if max(rows) >= count:
            raise UsageError(f"{captions} speaks of row {max(rows)}, {features} has {count}, from 0; mend one of them")
    else:
        rows = list(range(len(described)))
        if len(rows) != count:
            raise UsageError(
                f'{captions} tells of {len(rows)} clips, {features} has {count} rows; say which "row" is whose'
            )
    return {
        row: SourceClip(video=name, split=splits[name], captions=tuple(clip.captions))
        for row, (name, clip) in zip(rows, described.items(), strict=True)
    }


def copy(features: Path, target: Path) -> None:
    """As float32; infinities and NaN raise `UsageError`."""
    given, unfinished = _opened(features), target.with_name(f"{target.name}.partial")
    copied = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=given.shape)
    for row, values in enumerate(tqdm(given, "features", unit="clip", disable=None)):
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
