"""Data sets as they are distributed -> a list of clips, each with its file or pictures, its captions and its split.

Reads annotations and finds files, but opens no clip. Captions are as written (`wording` cleans them). The clips of a
data set always have the same order, no matter which of their files exist.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from etenet.errors import UsageError
from etenet.files import as_it_looks, folders_below
from etenet.files.rows import parse_json, read_text, rows
from etenet.jobs.inputs import VIDEO_SUFFIXES
from training.data.caption_files import SPLITS, Described, read_captions
from training.data.source_clip import SourceClip
from training.data.splits import Shares, splits_of
from training.data.still_frames import Picture, Stills, natural
from training.data.wording import clean_caption
from training.demo import world

MSVD_CLIPS = 1970
MSVD_COLUMNS = ("VideoID", "Start", "End", "Language", "Description")
_AS_DISTRIBUTED = "give the file as it is distributed"


class ClipFolder:
    """The files below a folder at any depth, by relative path, by name, or by name without extension, as they look.

    Subtitles, descriptions and thumbnails may lie beside a video of the same name.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; name the one that holds the clips with --clips")
        self.folder = folder
        self._by_name: defaultdict[str, set[Path]] = defaultdict(set)
        self._by_stem: defaultdict[str, set[Path]] = defaultdict(set)
        for place, names in folders_below(folder):
            for name in names:
                if not name.startswith("."):
                    file = Path(place, name)
                    for known in (name, str(file.relative_to(folder))):
                        self._by_name[as_it_looks(known)].add(file)
                    self._by_stem[as_it_looks(file.stem)].add(file)

    def find(self, *names: str) -> Path | None:
        """The file of the first of these names that has one."""
        for name in names:
            if (exact := self.folder / name).is_file() and not Path(name).is_absolute():
                return exact
            known = as_it_looks(name)
            if files := sorted(self._by_name.get(known) or _videos(self._by_stem.get(known, ()))):
                if len(files) > 1:
                    listed = " and ".join(str(file) for file in files[:2])
                    raise UsageError(f"{name} may be {listed}; keep one, or name the clip by its path below --clips")
                return files[0]
        return None

    def stems(self, pattern: str) -> list[str]:
        """Names without extension that match a pattern, sorted as in the C locale."""
        return sorted(name for name in self._by_stem if re.fullmatch(pattern, name))

    def checked(self, clips: list[SourceClip]) -> list[SourceClip]:
        """The same clips. Raises `UsageError` if none has a file, and if two have the same file."""
        if not any(clip.file for clip in clips):
            raise UsageError(
                f"none of the {len(clips)} clips is below {self.folder} ({clips[0].video}, ...); correct --clips, or "
                "name clips by their paths below it"
            )
        owner: dict[Path, str] = {}
        for clip in clips:
            if clip.file and owner.setdefault(clip.file, clip.video) != clip.video:
                raise UsageError(f"{owner[clip.file]} and {clip.video} are the same clip, {clip.file}; use one name")
        return clips


def _videos(files: Collection[Path]) -> Collection[Path]:
    """Those with the suffix of a video, or all of them if none has."""
    return [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES] or files


def msvd(clips: Path, *, corpus: Path | None = None, sentences: Sequence[Path] = ()) -> list[SourceClip]:
    """MSVD, from its CSV or from `vidN<TAB>caption` files.

    Its 1,970 names, sorted, are numbered from 1, and the number decides the split. A file may have the name or vidN as
    its name. With sentences alone, files are found by name only if all of them exist.
    """
    folder = ClipFolder(clips)
    if corpus is not None:
        captions = msvd_corpus(corpus)
        names = _msvd_names(captions, corpus, folder)
        by_number = {number: captions[name] for number, name in enumerate(names, 1)}
    else:
        by_number = msvd_sentences(sentences)
        names = folder.stems(r".+_\d+_\d+")
        names = names if len(names) == MSVD_CLIPS else []
    return folder.checked(
        [
            _msvd_clip(number, names, of_clip, folder, by_name=bool(corpus))
            for number, of_clip in sorted(by_number.items())
        ]
    )


def _msvd_clip(
    number: int, names: Sequence[str], captions: Sequence[str], folder: ClipFolder, *, by_name: bool
) -> SourceClip:
    name, other = names[number - 1] if names else None, f"vid{number}"
    return SourceClip(
        video=name if name and by_name else other,
        alias=other if by_name else name,
        split=msvd_split(number),
        captions=tuple(captions),
        file=folder.find(name, other) if name else folder.find(other),
        source=name.rsplit("_", 2)[0] if name else None,
    )


def msvd_split(number: int) -> str:
    return "train" if number <= 1200 else "validation" if number <= 1300 else "test"


def msvd_corpus(path: Path) -> dict[str, list[str]]:
    """English captions by `<VideoID>_<Start>_<End>`, without clips that have no word in English."""
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows(path, header=MSVD_COLUMNS, fix=_AS_DISTRIBUTED):
        row.need(*MSVD_COLUMNS)
        if row.values["Language"].strip() == "English":
            name = "_".join(row.values[column].strip() for column in ("VideoID", "Start", "End"))
            captions[name].append(row.values["Description"])
    return {name: of_clip for name, of_clip in captions.items() if any(map(clean_caption, of_clip))}


def _msvd_names(captions: Iterable[str], path: Path, folder: ClipFolder) -> list[str]:
    """The 1,970 names in the order that numbers them. The corpus may have more clips than are distributed."""
    names = sorted(captions)
    if len(names) > MSVD_CLIPS:
        names = [name for name in names if folder.find(name)]
    if len(names) != MSVD_CLIPS:
        raise UsageError(
            f"{path} and {folder.folder} have {len(names)} clips with English captions, but the order of all "
            f"{MSVD_CLIPS} decides the splits; give both complete, or use --sentences"
        )
    return names


def msvd_sentences(paths: Sequence[Path]) -> dict[int, list[str]]:
    """Captions by number, from files with lines `vidN<TAB>caption`."""
    captions: defaultdict[int, list[str]] = defaultdict(list)
    for path in _each_once(paths):
        for place, line in enumerate(read_text(path, fix=_AS_DISTRIBUTED).split("\n"), 1):
            if line.strip():
                name, tab, caption = line.partition("\t")
                number = int(name[3:]) if re.fullmatch(r"vid[0-9]{1,4}", name) else 0
                if not tab or not 1 <= number <= MSVD_CLIPS:
                    raise UsageError(
                        f"{path}, line {place}: it must be vidN, a tab and a caption, N up to {MSVD_CLIPS}"
                    )
                captions[number].append(caption)
    if not captions:
        raise UsageError(f"{paths[0]} has no clip; lines must be vidN, a tab and a caption")
    return captions


def msrvtt(clips: Path, annotations: Sequence[Path]) -> list[SourceClip]:
    """MSR-VTT, from its JSON files or the zips they come in."""
    folder = ClipFolder(clips)
    videos = msrvtt_videos(annotations)
    return folder.checked(
        [
            SourceClip(
                video=name,
                split=video.split or "",
                captions=tuple(video.captions),
                file=folder.find(name),
                source=video.group,
            )
            for name, video in videos.items()
        ]
    )


def msrvtt_videos(paths: Sequence[Path]) -> dict[str, Described]:
    """Split, captions and YouTube id by video, in the order of the numbers in their names."""
    videos: dict[str, Described] = {}
    for path in _each_once(paths):
        for annotation in msrvtt_annotations(path):
            try:
                for video in annotation["videos"]:
                    name, split = video["video_id"], SPLITS[video["split"]]
                    if name in videos:
                        raise UsageError(f"{path}: {name} is there twice; give every annotation once")
                    videos[name] = Described(split=split, group=_youtube_id(video.get("url")))
                for sentence in annotation["sentences"]:
                    videos[sentence["video_id"]].captions.append(str(sentence["caption"]))
            except (KeyError, TypeError) as error:
                raise UsageError(
                    f"{path}: this is no MSR-VTT annotation ({error} is missing or unknown); {_AS_DISTRIBUTED}"
                ) from error
    return dict(sorted(videos.items(), key=lambda item: natural(item[0])))


def msrvtt_annotations(path: Path) -> list[Any]:
    """The annotations of a JSON file, or of a zip as it is distributed."""
    if path.suffix.lower() != ".zip":
        return [_json(path)]
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"(?!__MACOSX).*videodatainfo.*\.json", name)]
            annotations = [_json(path / name, archive.read(name)) for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read {path}: {error}; give the zip as it is distributed, or its JSON") from error
    if not annotations:
        raise UsageError(f"{path} has no *videodatainfo*.json; give the zip as it is distributed, or its JSON")
    return annotations


def _json(path: Path, contents: bytes | None = None) -> Any:
    return parse_json(path, read_text(path, contents, fix=_AS_DISTRIBUTED))


def folder(clips: Path, captions: Path, shares: Shares) -> list[SourceClip]:
    """The user's own clips."""
    files, described = ClipFolder(clips), read_captions(captions)
    splits = splits_of(described, captions, shares)
    return files.checked(
        [
            SourceClip(
                video=name, split=splits[name], captions=tuple(clip.captions), file=files.find(name), source=clip.group
            )
            for name, clip in described.items()
        ]
    )


def stills(
    places: Sequence[Path], shares: Shares, *, captions: Path | None = None, annotations: Sequence[Path] = ()
) -> list[SourceClip]:
    """Clips of still frames in folders and tar files, from a captions file or the annotations of MSR-VTT."""
    if captions is not None:
        described = read_captions(captions)
        splits = splits_of(described, captions, shares)
    else:
        described = msrvtt_videos(annotations)
        splits = {name: video.split or "" for name, video in described.items()}
    found = Stills(places)
    clips = [
        SourceClip(
            video=name,
            split=splits[name],
            captions=tuple(clip.captions),
            pictures=found.find(name),
            source=clip.group,
        )
        for name, clip in described.items()
    ]
    if not any(clip.pictures for clip in clips):
        raise UsageError(
            f"none of the {len(clips)} clips ({clips[0].video}, ...) has pictures in {', '.join(map(str, places))}; "
            "put those of a clip into a folder of its name, and a photograph at the top"
        )
    owner: dict[Picture, str] = {}
    for clip in clips:
        if clip.pictures and (other := owner.setdefault(clip.pictures[0], clip.video)) != clip.video:
            raise UsageError(f"{other} and {clip.video} are the same pictures, {clip.pictures[0].name}; use one name")
    return clips


def demo(out: Path, *, train_per_combination: int, clips_per_split: int | None = None) -> list[SourceClip]:
    """The rendered world, or the first clips of each split. The files are made below `out` when they are decoded."""
    by_split = groupby(world.clips(train_per_combination=train_per_combination), lambda clip: clip.split)
    return [
        SourceClip(
            video=clip.name,
            split=clip.split,
            captions=tuple(world.references(clip)),
            file=out / f"{clip.name}.mp4",
            render=partial(world.render, clip),
            labels=asdict(clip.combination),
        )
        for _, clips in by_split
        for clip in islice(clips, clips_per_split)
    ]


def _each_once(paths: Sequence[Path]) -> Sequence[Path]:
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(f"{', '.join(map(str, paths))}: a file is given twice; give each file once")
    return paths


def _youtube_id(url: object) -> str | None:
    found = re.search(r"[?&]v=([\w-]+)", url) if isinstance(url, str) else None
    return found[1] if found else None
