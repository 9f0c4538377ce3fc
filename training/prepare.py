"""`python -m training.prepare msvd|msrvtt|folder|frames|features|demo`: captions + clips -> a dataset folder.

    frames.npy         (N, 16, resize_px, resize_px, 3) uint8; of stills (F, resize_px, resize_px, 3), each frame once;
                       or features.npy (N, L, D) float32
    manifest.jsonl, vocabulary.json, skipped.jsonl: see `dataset_folder`
    progress.jsonl     what the folder is made from, and which rows are done, from which files: see `frame_cache`

Frames of clips are sampled by `etenet.video`, as in serving; still frames are given as they are (docs/data.md). Run
again, the same command continues where it stopped, and tries skipped clips and those whose files have changed again;
--vocabulary-from, --minimum-count, --max-words and --allow-missing may differ then, other arguments may not.
Exit status: 0 all clips prepared, 1 some skipped, 2 wrong use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from etenet.errors import UsageError
from etenet.model.encoder import default_preprocessing
from training.data import given_features, sources
from training.data.dataset_folder import DEFAULT_MAX_WORDS, DatasetOptions, Entry, write
from training.data.frame_cache import CacheJob, CacheLog, Failure, Job, fill, shape_of_clips
from training.data.source_clip import SourceClip
from training.data.splits import Shares, left_out, read_ids, without, without_shared_sources
from training.data.still_frames import StillsJob
from training.data.wording import Wording
from training.demo.world import TRAIN_PER_COMBINATION
from training.progress import counted
from training.recipes import RECIPES, demo


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except UsageError as error:
        print(f"training.prepare {options.dataset}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"training.prepare {options.dataset}: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return status


def prepare_msvd(options: argparse.Namespace) -> int:
    return _prepare(sources.msvd(options.clips, corpus=options.csv, sentences=options.sentences or ()), options)


def prepare_msrvtt(options: argparse.Namespace) -> int:
    return _prepare(sources.msrvtt(options.clips, options.annotations), options)


def prepare_folder(options: argparse.Namespace) -> int:
    return _prepare(sources.folder(options.clips, options.captions, _shares(options)), options)


def prepare_frames(options: argparse.Namespace) -> int:
    """Still frames of videos, and photographs, each stored once."""
    clips = sources.stills(
        options.frames, _shares(options), captions=options.captions, annotations=options.annotations or ()
    )
    return _prepare(clips, options)


def prepare_demo(options: argparse.Namespace) -> int:
    if options.encoder is None and options.resize_px is None:
        options.resize_px = demo().preprocessing().resize_px
    clips = sources.demo(
        options.out / "clips",
        train_per_combination=options.train_per_combination,
        clips_per_split=options.clips_per_split,
    )
    return _prepare(clips, options)


def prepare_features(options: argparse.Namespace) -> int:
    """A dataset folder of features (N, L, D) that were computed elsewhere."""
    clips = given_features.clips_by_row(options.features, options.captions, _shares(options))
    clips, notes = _wanted(clips, options)
    with CacheLog(options.out, _made_from(options, list(clips.values()))):
        given_features.copy(options.features, options.out / "features.npy")
        entries = _entries(clips)
        return write(options.out, entries, _without_captions(entries), _dataset_options(options), notes=notes)


def _prepare(every: Sequence[SourceClip], options: argparse.Namespace) -> int:
    if options.resize_px is None:
        options.resize_px = default_preprocessing(options.encoder).resize_px
    wanted, notes = _wanted(dict(enumerate(every)), options)
    clips = list(wanted.values())
    there, shape = _layout(clips, options.resize_px)
    with CacheLog(options.out, _made_from(options, clips)) as log:
        entries = _entries(there)
        failures = _without_captions(entries)
        jobs = [_job(row, clip) for row, clip in there.items() if row not in failures]
        failures |= fill(options.out, jobs, log, shape)
        missing = [(clip, _missing(clip, options)) for clip in clips if not (clip.file or clip.pictures)]
        return write(options.out, entries, failures, _dataset_options(options), missing=missing, notes=notes)


def _wanted(clips: dict[int, SourceClip], options: argparse.Namespace) -> tuple[dict[int, SourceClip], list[str]]:
    """The clips that are not left out, and what the summary says of the others."""
    notes, every = list[str](), clips
    if options.exclude is not None:
        clips = without(every, read_ids(options.exclude))
        notes.append(
            left_out(every.values(), clips.values(), f"by {options.exclude} and as they share a source with these")
        )
    if options.drop_shared_sources:
        every, clips = clips, without_shared_sources(clips)
        notes.append(left_out(every.values(), clips.values(), "as a training clip has the same source"))
    if not clips:
        raise UsageError(f"{options.exclude} leaves out every clip; name fewer")
    return clips, notes


def _layout(clips: Sequence[SourceClip], resize_px: int) -> tuple[dict[int, SourceClip], tuple[int, ...]]:
    """The clips that have frames, by their first row in the cache, and the shape of the cache."""
    if not any(clip.pictures for clip in clips):
        return {row: clip for row, clip in enumerate(clips) if clip.file}, shape_of_clips(len(clips), resize_px)
    *starts, rows = accumulate((len(clip.pictures) for clip in clips), initial=0)
    there = {row: clip for row, clip in zip(starts, clips, strict=True) if clip.pictures}
    return there, (rows, resize_px, resize_px, 3)


def _job(row: int, clip: SourceClip) -> CacheJob:
    if clip.file is None:
        return StillsJob(row, clip.pictures)
    return Job(row, clip.file, clip.render)


def _missing(clip: SourceClip, options: argparse.Namespace) -> Failure:
    if options.dataset == "frames":
        return Failure("missing_file", f"no pictures are called {clip.video}; put them into a place of --frames")
    return Failure("missing_file", f"no file below --clips is called {clip.video}; put it there, or correct the name")


def _entries(clips: Mapping[int, SourceClip]) -> list[Entry]:
    return [Entry(clip, Wording.of(clip.captions), row) for row, clip in counted(clips.items(), "captions", "clip")]


def _without_captions(entries: Sequence[Entry]) -> dict[int, Failure]:
    failure = Failure("no_captions", "none of its captions has a word; write one that has")
    return {entry.row: failure for entry in entries if not entry.wording.captions}


def _made_from(options: argparse.Namespace, clips: Sequence[SourceClip]) -> dict[str, object]:
    """Everything that decides which clip has which row, and what is in the row."""
    changeable = {"out", "run", "encoder", "vocabulary_from", "minimum_count", "max_words", "allow_missing"}
    given = {name: value for name, value in vars(options).items() if name not in changeable and value is not None}
    listed = json.dumps([(clip.video, clip.split, *filter(None, [len(clip.pictures)])) for clip in clips])
    digest = f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
    return {name: _absolute(value) for name, value in given.items()} | {"list of clips": digest}


def _absolute(value: object) -> object:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return str(value.resolve()) if isinstance(value, Path) else value


def _dataset_options(options: argparse.Namespace) -> DatasetOptions:
    recipe = RECIPES.get(options.dataset)
    max_words = options.max_words or (recipe().max_words if recipe else DEFAULT_MAX_WORDS)
    return DatasetOptions(
        vocabulary_from=options.vocabulary_from,
        minimum_count=options.minimum_count,
        max_words=max_words,
        allow_missing=bool(options.allow_missing),
    )


def _shares(options: argparse.Namespace) -> Shares:
    return Shares(validation=options.validation_share, test=options.test_share, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.splitlines()[0])
    parser.set_defaults(exclude=None, drop_shared_sources=None, allow_missing=None)
    datasets = parser.add_subparsers(dest="dataset", required=True)
    every, size, clips, chosen, official, captions, shares = (argparse.ArgumentParser(add_help=False) for _ in range(7))

    every.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to make")
    every.add_argument("--vocabulary-from", choices=("train", "all"), default="train", help="default: train")
    every.add_argument(
        "--minimum-count", type=_positive, default=1, metavar="N", help="drop words that are rarer; default 1: none"
    )
    every.add_argument(
        "--max-words",
        type=_positive,
        metavar="N",
        help=f"count longer captions; default: as the recipe of the same name, or {DEFAULT_MAX_WORDS} if there is none",
    )

    size.add_argument(
        "--encoder",
        default="inceptionresnetv2",
        metavar="NAME",
        help="take the frame size of this encoder; default: inceptionresnetv2",
    )
    size.add_argument("--resize-px", type=_positive, metavar="N", help="frame size; default: the encoder's own")

    clips.add_argument("--clips", type=Path, required=True, metavar="DIR", help="the clips, anywhere below it")

    chosen.add_argument(
        "--exclude", type=Path, metavar="F", help="ids, one a line, of clips to leave out with all that share a source"
    )
    chosen.add_argument(
        "--allow-missing",
        action="store_const",
        const=True,
        help="clips without a file are listed, but the status may be 0",
    )

    official.add_argument(
        "--drop-shared-sources",
        action="store_const",
        const=True,
        help="leave out validation and test clips of a source that is trained on",
    )

    captions.add_argument("--captions", type=Path, required=True, metavar="F", help="see docs/data.md")

    shares.add_argument(
        "--validation-share", type=float, default=0.1, metavar="X", help="if F has no splits; default 0.1"
    )
    shares.add_argument("--test-share", type=float, default=0.1, metavar="X", help="if F has no splits; default 0.1")
    shares.add_argument("--seed", type=int, default=0, metavar="N", help="which clips the shares take; default 0")

    one = datasets.add_parser("msvd", parents=[every, size, clips, chosen, official], help="MSVD as distributed")
    one.set_defaults(run=prepare_msvd)
    captions_of = one.add_mutually_exclusive_group(required=True)
    captions_of.add_argument("--csv", type=Path, metavar="F", help="MSR Video Description Corpus.csv")
    captions_of.add_argument("--sentences", type=Path, nargs="+", metavar="F", help="files of lines vidN<TAB>caption")

    one = datasets.add_parser("msrvtt", parents=[every, size, clips, chosen, official], help="MSR-VTT as distributed")
    one.set_defaults(run=prepare_msrvtt)
    one.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="F", help="the JSON files or zips")

    one = datasets.add_parser("folder", parents=[every, size, clips, chosen, captions, shares], help="your own clips")
    one.set_defaults(run=prepare_folder)

    one = datasets.add_parser(
        "frames", parents=[every, size, chosen, official, shares], help="still frames, photographs"
    )
    one.set_defaults(run=prepare_frames)
    one.add_argument(
        "--frames", type=Path, nargs="+", required=True, metavar="PLACE", help="folders or tars of VIDEO/FRAME.webp"
    )
    captions_of = one.add_mutually_exclusive_group(required=True)
    captions_of.add_argument("--captions", type=Path, metavar="F", help="see docs/data.md")
    captions_of.add_argument("--annotations", type=Path, nargs="+", metavar="F", help="MSR-VTT's JSON files or zips")

    one = datasets.add_parser("features", parents=[every, chosen, captions, shares], help="features instead of clips")
    one.set_defaults(run=prepare_features)
    one.add_argument("--features", type=Path, required=True, metavar="F.npy", help="(N, L, D), one row per clip")

    one = datasets.add_parser("demo", parents=[every], help="render the demo world")
    one.set_defaults(run=prepare_demo)
    one.add_argument(
        "--encoder", metavar="NAME", help="take the frame size of this encoder; default: the recipe demo's"
    )
    one.add_argument("--resize-px", type=_positive, metavar="N", help="frame size; default: the encoder's own")
    one.add_argument("--clips-per-split", type=_positive, metavar="N", help="the first ones only, for a trial")
    one.add_argument("--train-per-combination", type=_positive, default=TRAIN_PER_COMBINATION, metavar="N")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
