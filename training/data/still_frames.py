"""Still frames in folders and tar files -> the frames of clips. Knows no captions, splits or caches.

    video/<frame>.webp     a frame of the clip `video`; the natural order of the names (9 before 10) is that of time
    photograph.jpg         a clip of one frame

Frames are resized as serving resizes those of a video: height and width to resize_px, whatever the shape was, by
Pillow's antialiased bilinear filter. On frames of 14 real clips its result differs by 1.1 of 255 from that of serving,
Pillow's bicubic by 1.5.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from etenet.errors import UndecodableVideo, UsageError
from etenet.files import as_it_looks, folders_below
from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.sampling import middle_of_slices

SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a file of its own, or one of a tar, whose bytes begin at `start`."""

    place: Path
    name: str  # relative, as in video7/0003.webp
    start: int = 0
    length: int = -1  # in bytes; -1: all of them

    def read(self) -> bytes:
        with self.place.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)

    def pixels(self, size_px: int) -> NDArray[np.uint8]:
        """(size_px, size_px, 3). Raises `OSError` and `CaptionError`."""
        return resized(self.read(), self.name, size_px=size_px)


def resized(body: bytes, name: str, *, size_px: int) -> NDArray[np.uint8]:
    """A picture file as RGB, (size_px, size_px, 3), upright by its EXIF. Raises `CaptionError` with its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and from 89 million pixels on; 179 are an error
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
            return np.asarray(upright.resize((size_px, size_px), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise UndecodableVideo(f"{name} cannot be read as a picture ({error}); save it again or remove it") from error


@dataclass(frozen=True, slots=True)
class StillsJob:
    """The pictures of a clip, which fill as many rows of the cache, from `row` on."""

    row: int
    pictures: tuple[Picture, ...]

    @property
    def rows(self) -> int:
        return len(self.pictures)

    def make(self) -> None:
        """There is nothing to make."""

    def stamp(self) -> dict[str, object]:
        """Of all pictures, by the sizes and times of their files, or of their tar."""
        files = {picture.place: picture.place.stat() for picture in self.pictures}
        listed = [
            (picture.name, picture.start, picture.length, found.st_size, found.st_mtime_ns)
            for picture in self.pictures
            for found in (files[picture.place],)
        ]
        return {"pictures": f"sha256:{hashlib.sha256(json.dumps(listed).encode()).hexdigest()}"}

    def frames(self, resize_px: int) -> NDArray[np.uint8]:
        """(rows, resize_px, resize_px, 3)."""
        return np.stack([picture.pixels(resize_px) for picture in self.pictures])


class Stills:
    """The clips in several folders and tar files, by the path of their folder or photograph, or its last part."""

    def __init__(self, places: Sequence[Path]) -> None:
        self._clips: dict[str, list[Picture]] = {}
        self._names: defaultdict[str, list[str]] = defaultdict(list)
        for place in places:
            for clip, pictures in _clips_in(place).items():
                if clip in self._clips:
                    raise UsageError(f"{clip} is in {place} and in a place before it; keep the pictures of one")
                self._clips[clip] = pictures
                path, is_photograph = PurePosixPath(clip), clip == as_it_looks(pictures[0].name)
                for name in {path.name, path.stem if is_photograph else path.name}:
                    self._names[name].append(clip)
        if not self._clips:
            listed = ", ".join(map(str, places))
            raise UsageError(f"{listed}: no pictures ({', '.join(SUFFIXES)}); give folders or tar files with --frames")

    def find(self, name: str) -> tuple[Picture, ...]:
        """At most 16 pictures of a clip in order of time: of more, the middles of 16 equal slices. () if it has none.

        Raises `UsageError` if the name means two clips.
        """
        name = as_it_looks(name)
        clips = [name] if name in self._clips else self._names.get(name, [])
        if len(clips) > 1:
            raise UsageError(f"{name} may be {clips[0]} and {clips[1]}; name the clip by its path below --frames")
        pictures = sorted(self._clips[clips[0]], key=lambda picture: natural(picture.name)) if clips else []
        if len(pictures) > FRAMES_PER_CLIP:
            return tuple(pictures[place] for place in middle_of_slices(len(pictures)))
        return tuple(pictures)


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts video9 before video10."""
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name))


def _clips_in(place: Path) -> dict[str, list[Picture]]:
    """Pictures by the path of their folder; a photograph, which is in none, by its name."""
    clips: defaultdict[str, list[Picture]] = defaultdict(list)
    for picture in _pictures_in(place):
        folder = str(PurePosixPath(picture.name).parent)
        clips[as_it_looks(picture.name if folder == "." else folder)].append(picture)
    return clips


def _pictures_in(place: Path) -> Iterator[Picture]:
    if place.is_dir():
        for folder, names in folders_below(place):
            for name in sorted(filter(_is_picture, names)):
                file = Path(folder, name)
                yield Picture(file, file.relative_to(place).as_posix())
        return
    try:
        with tarfile.open(place, "r:") as archive:
            for member in archive:
                if member.isreg() and _is_picture(PurePosixPath(member.name).name):
                    yield Picture(place, str(PurePosixPath(member.name)), member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f"{place} is neither a folder nor a whole, uncompressed tar ({error}); unpack it, and give the folder"
        ) from error


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)
