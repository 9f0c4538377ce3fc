"""Which clips are for training, validation and testing, and which are left out.

Clips of one source (a YouTube video, a film) look alike: one that is trained on must not be among those that a score is
computed from. Knows no files of clips.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from etenet.errors import UsageError, counted
from etenet.files.rows import read_text
from training.data.caption_files import Described
from training.data.source_clip import SourceClip

NameT = TypeVar("NameT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How clips are divided if their file has no splits."""

    validation: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise UsageError(
                f"shares must be at least 0 and leave clips to train on, got {self.validation} and {self.test}"
            )


def splits_of(described: Mapping[str, Described], path: Path, shares: Shares) -> dict[str, str]:
    """The split of each clip: that in the file, or else by shares, which depend only on the seed and the names.

    A group of clips is in one split. Raises `UsageError` if the file divides one, or gives splits to some clips only.
    """
    if any(clip.split for clip in described.values()):
        if without := [name for name, clip in described.items() if not clip.split]:
            raise UsageError(f"{path}: {without[0]} has no split, but others have; give all clips one, or none")
        _check_groups(described, path)
        return {name: str(clip.split) for name, clip in described.items()}
    return _divided(described, path, shares)


def _check_groups(described: Mapping[str, Described], path: Path) -> None:
    first: dict[str, str] = {}
    for name, clip in described.items():
        if clip.group is not None:
            other = first.setdefault(clip.group, name)
            if described[other].split != clip.split:
                raise UsageError(
                    f"{path}: group {clip.group!r} is on two sides: {other} is for {described[other].split} and {name} "
                    f"for {clip.split}; give all clips of a group one split"
                )


def _divided(described: Mapping[str, Described], path: Path, shares: Shares) -> dict[str, str]:
    """Group after group in a random order: to the test clips while it fits into their share, then to validation.

    A share that no group fits into gets the smallest one.
    """
    members: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, clip in described.items():
        members["clip" if clip.group is None else "group", clip.group or name].append(name)
    groups = sorted(members, key=lambda key: hashlib.sha256(f"{shares.seed} {key[1]}".encode()).digest())
    clips, splits = len(described), dict.fromkeys(described, "train")
    for split, share in (("test", shares.test), ("validation", shares.validation)):
        wanted = max(round(share * clips), int(share > 0))
        chosen, have = list[tuple[str, str]](), 0
        for group in groups:
            if have + len(members[group]) <= wanted:
                chosen.append(group)
                have += len(members[group])
        if wanted and not chosen and groups:
            chosen = [min(groups, key=lambda group: len(members[group]))]
        splits |= {name: split for group in chosen for name in members[group]}
        groups = [group for group in groups if group not in set(chosen)]
    if not groups:
        of = counted(clips, "clip") if len(members) == clips else f"{clips} clips in {counted(len(members), 'group')}"
        raise UsageError(f"{path}: of {of} none is left to train on; add clips, or give smaller shares")
    return splits


def read_ids(path: Path) -> list[str]:
    """The ids in a file, one per line. Empty lines and what follows a `#` at the start or after a blank are skipped."""
    text = read_text(path, fix="give a file with the id of a clip on each line")
    lines = (re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in text.splitlines())
    if ids := [line for line in lines if line]:
        return ids
    raise UsageError(f"{path} has no id; give the id of a clip on each line")


def without(clips: Mapping[NameT, SourceClip], ids: Iterable[str]) -> dict[NameT, SourceClip]:
    """The clips but those with these ids, and those that share their source with one of these.

    An id may also be a source itself, or be that of a clip of another data set: MSVD names a clip of a YouTube video
    `<id>_<start>_<end>`, and MSR-VTT has clips of some of the same videos.
    """
    named = set(ids)
    sources = named | {re.sub(r"_\d+_\d+$", "", name) for name in named}
    left_out = {key for key, clip in clips.items() if named & {clip.video, clip.alias}}
    sources |= {source for key in left_out if (source := clips[key].source)}
    return {key: clip for key, clip in clips.items() if key not in left_out and clip.source not in sources}


def without_shared_sources(clips: Mapping[NameT, SourceClip]) -> dict[NameT, SourceClip]:
    """The clips but those of validation and test whose source is also that of a training clip."""
    trained_on = {clip.source for clip in clips.values() if clip.split == "train"} - {None}
    return {key: clip for key, clip in clips.items() if clip.split == "train" or clip.source not in trained_on}


def left_out(before: Iterable[SourceClip], after: Iterable[SourceClip], why: str) -> str:
    """A line that says how many clips of each split, of those that are there, were left out."""
    fewer = _clips_by_split(before) - _clips_by_split(after)
    by_split = ", ".join(f"{count} {split}" for split, count in sorted(fewer.items())) or "none"
    return f"  left out {why}: {counted(fewer.total(), 'clip')} ({by_split})"


def _clips_by_split(clips: Iterable[SourceClip]) -> Counter[str]:
    """Without clips that are only in the annotations. Given features have no files at all."""
    every = list(clips)
    there = [clip for clip in every if clip.file or clip.pictures]
    return Counter(clip.split for clip in there or every)
