"""`python -m training.prepare msvd|msrvtt|folder|features|demo`: captions + clips -> a dataset folder.

    frames.npy         (N, 16, resize_px, resize_px, 3) uint8, or features.npy (N, L, D) float32
    manifest.jsonl, vocabulary.json, skipped.jsonl: see `dataset_folder`
    progress.jsonl     what the folder is made from, and which rows are done: see `frame_cache`

Frames are sampled by `etenet.video`, as in serving. Run again, the same command continues where it stopped and tries
skipped clips again; --vocabulary-from, --minimum-count and --max-words may differ then, other arguments may not.
Exit status: 0 all clips prepared, 1 some skipped, 2 wrong use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from etenet.errors import UsageError
from etenet.model.encoder import default_preprocessing
from training.data import given_features, sources
from training.data.dataset_folder import DEFAULT_MAX_WORDS, DatasetOptions, Entry, write
from training.data.frame_cache import CacheLog, Failure, Job, fill
from training.data.sources import SourceClip
from training.data.wording import Wording
from training.demo.world import TRAIN_PER_COMBINATION
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
    with CacheLog(options.out, _made_from(options, list(clips.values()))):
        given_features.copy(options.features, options.out / "features.npy")
        entries = _entries(clips)
        return write(options.out, entries, _without_captions(entries), _dataset_options(options))


def _prepare(clips: Sequence[SourceClip], options: argparse.Namespace) -> int:
    if options.resize_px is None:
        options.resize_px = default_preprocessing(options.encoder).resize_px
    with CacheLog(options.out, _made_from(options, clips)) as log:
        with_file = {row: clip for row, clip in enumerate(clips) if clip.file is not None}
        entries = _entries(with_file)
        failures = _without_captions(entries)
        jobs = [
            Job(row, clip.file, clip.render) for row, clip in with_file.items() if clip.file and row not in failures
        ]
        failures |= fill(options.out, jobs, log, rows=len(clips), resize_px=options.resize_px)
        missing = [clip for clip in clips if clip.file is None]
        return write(options.out, entries, failures, _dataset_options(options), missing=missing)


def _entries(clips: Mapping[int, SourceClip]) -> list[Entry]:
    listed = tqdm(clips.items(), "captions", unit="clip", disable=None)
    return [Entry(clip, Wording.of(clip.captions), row) for row, clip in listed]


def _without_captions(entries: Sequence[Entry]) -> dict[int, Failure]:
    failure = Failure("no_captions", "none of its captions has a word; write one that has")
    return {entry.row: failure for entry in entries if not entry.wording.captions}


def _made_from(options: argparse.Namespace, clips: Sequence[SourceClip]) -> dict[str, object]:
    """Everything that decides which clip has which row, and what is in the row."""
    changeable = {"out", "run", "encoder", "vocabulary_from", "minimum_count", "max_words"}
    given = {name: value for name, value in vars(options).items() if name not in changeable and value is not None}
    listed = json.dumps([(clip.video, clip.split) for clip in clips])
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
        vocabulary_from=options.vocabulary_from, minimum_count=options.minimum_count, max_words=max_words
    )


def _shares(options: argparse.Namespace) -> sources.Shares:
    return sources.Shares(validation=options.validation_share, test=options.test_share, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.splitlines()[0])
    datasets = parser.add_subparsers(dest="dataset", required=True)
    every, pixels, shares = (argparse.ArgumentParser(add_help=False) for _ in range(3))

    every.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to make")
    every.add_argument("--vocabulary-from", choices=("train", "all"), default="train", help="default: train")
    every.add_argument("--minimum-count", type=_positive, default=1, metavar="N", help="of a word; default 1: all")
    every.add_argument("--max-words", type=_positive, metavar="N", help="count longer captions; default: the recipe's")

    pixels.add_argument("--clips", type=Path, required=True, metavar="DIR", help="the clips, anywhere below it")
    pixels.add_argument("--encoder", default="inceptionresnetv2", metavar="NAME", help="whose frame size to take")
    pixels.add_argument("--resize-px", type=_positive, metavar="N", help="frame size; default: the encoder's own")

    shares.add_argument("--captions", type=Path, required=True, metavar="F", help="see training/data/caption_files.py")
    shares.add_argument("--validation-share", type=float, default=0.1, metavar="X", help="where F has no splits")
    shares.add_argument("--test-share", type=float, default=0.1, metavar="X", help="where F has no splits")
    shares.add_argument("--seed", type=int, default=0, metavar="N", help="of the shares; default 0")

    one = datasets.add_parser("msvd", parents=[every, pixels], help="MSVD as distributed")
    one.set_defaults(run=prepare_msvd)
    captions = one.add_mutually_exclusive_group(required=True)
    captions.add_argument("--csv", type=Path, metavar="F", help="MSR Video Description Corpus.csv")
    captions.add_argument("--sentences", type=Path, nargs="+", metavar="F", help="files of lines vidN<TAB>caption")

    one = datasets.add_parser("msrvtt", parents=[every, pixels], help="MSR-VTT as distributed")
    one.set_defaults(run=prepare_msrvtt)
    one.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="F", help="the JSON files or zips")

    one = datasets.add_parser("folder", parents=[every, pixels, shares], help="your own clips")
    one.set_defaults(run=prepare_folder)

    one = datasets.add_parser("features", parents=[every, shares], help="your own features instead of clips")
    one.set_defaults(run=prepare_features)
    one.add_argument("--features", type=Path, required=True, metavar="F.npy", help="(N, L, D), one row per clip")

    one = datasets.add_parser("demo", parents=[every], help="render the demo world")
    one.set_defaults(run=prepare_demo)
    one.add_argument("--encoder", metavar="NAME", help="whose frame size to take; default: the recipe demo's")
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
