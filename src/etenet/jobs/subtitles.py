"""What a batch job writes as subtitles: of one video a file, of several a folder with a file for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from etenet.captioning.subtitles import WRITERS
from etenet.errors import UsageError
from etenet.files import replacing
from etenet.jobs.inputs import VIDEO_SUFFIXES, JobClip
from etenet.jobs.journal import Record

FORMATS = tuple(WRITERS)


def places(clips: Sequence[JobClip], out: Path, form: str) -> dict[str, Path]:
    """The file for each video. In a folder it is called as the video is: videos/a.mp4 -> OUT/videos/a.vtt.

    Raises `UsageError` where `out` is one file and the videos are several.
    """
    suffix = out.suffix.lower().removeprefix(".")
    if suffix in WRITERS and suffix != form:
        raise UsageError(f"{out} is called as if it were {suffix}, and --format says {form}")
    if suffix == form:
        if len(clips) > 1:
            raise UsageError(f"{out} is one file, and there are {len(clips)} videos; name a folder with --out")
        return {clip.video: out for clip in clips}
    bare = {clip.video: _without_suffix(clip.video) for clip in clips}
    times = Counter(bare.values())
    places = {
        video: out / f"{name if times[name] == 1 else PurePath(*_below(video))}.{form}" for video, name in bare.items()
    }
    owner: dict[Path, str] = {}
    for video, place in places.items():
        if owner.setdefault(place, video) != video:
            raise UsageError(f"{owner[place]} and {video} would both be {place}; give them ids of their own in a list")
    return places


def write(records: Iterable[Record], places: dict[str, Path], form: str) -> None:
    """The file of each video that has captions."""
    for record in records:
        if "segments" in record and (place := places.get(record["video"])):
            try:
                with replacing(place) as file:
                    file.write(WRITERS[form](record["segments"]).encode(errors="replace"))
            except OSError as error:
                raise UsageError(f"cannot write {place}: {error.strerror}") from error


def _without_suffix(video: str) -> PurePath:
    name = PurePath(*_below(video))
    return name.with_suffix("") if name.suffix.lower() in VIDEO_SUFFIXES else name


def _below(video: str) -> list[str]:
    """The parts of a video's name that lead to nowhere but below a folder."""
    path = PurePath(video)
    return [part for part in path.parts if part not in (path.anchor, "..")]
