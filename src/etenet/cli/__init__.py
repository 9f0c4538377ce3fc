"""The `etenet` command. Results go to stdout or to the file given, everything else to stderr.

Exit status: 0 all done, 1 some items failed (they are listed), 2 wrong use. As in shells, 130 after Ctrl-C, and 141 if
nobody reads standard output any more.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import etenet
from etenet.assets import bundled
from etenet.captioning.options import OPTIONS, CaptionOptions
from etenet.cli import packaging
from etenet.errors import EtenetError, JavaError, JobStopped, OutputLost, UsageError
from etenet.files import occupy_closed_streams, print_bytes, read_text
from etenet.jobs.formats import FORMATS, REPORT, format_for
from etenet.jobs.report import THUMBNAIL_PX
from etenet.linux import thread_settings

if TYPE_CHECKING:
    from etenet.captioning.stream import OnProgress
    from etenet.jobs.inputs import JobClip
    from etenet.jobs.journal import Job, Record
    from etenet.jobs.run import Engine

CHECKPOINT = "model_store/real.pt"
CONFIG = "config.properties"
DEFAULT_ARCHIVE = Path("model_store/etenet.mar")
TRAINING = ("calibrate", "curves", "evaluate", "prepare", "ship", "stills", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    occupy_closed_streams()
    options = _parser().parse_args(arguments)
    os.environ.update(thread_settings(os.environ))
    try:
        status: int = options.run(options)
    except EtenetError as error:
        if isinstance(error, OutputLost) and isinstance(error.__cause__, BrokenPipeError):  # `| head`: no mistake
            return 128 + signal.SIGPIPE
        print(f"etenet {options.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, JavaError | JobStopped | OutputLost) else 2
    except OSError as error:  # that nothing below expects, such as a full TMPDIR
        print(f"etenet {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"etenet {options.command}: stopped", file=sys.stderr)
        if "ray" in sys.modules:
            os._exit(130)  # a Ray that was stopped while it started actors crashes a process that ends in the usual way
        return 130
    return status


def serve(options: argparse.Namespace) -> int:
    from etenet.serving import launcher
    from etenet.serving.config import ServerConfig

    config = ServerConfig.read(options.config, os.environ, host=options.host, port=options.port)
    checkpoint = options.checkpoint or (None if DEFAULT_ARCHIVE.exists() else _own_or_bundled(CHECKPOINT))
    return launcher.serve(config, mar=DEFAULT_ARCHIVE, checkpoint=checkpoint)


def caption(options: argparse.Namespace) -> int:
    from etenet.jobs import inputs, remote, run
    from etenet.jobs.progress import say

    texts = {option.name: getattr(options, option.name) for option in OPTIONS if option.is_flag}
    caption_options = CaptionOptions.parse({name: text for name, text in texts.items() if text is not None})
    report = _report(options)
    out, publication = remote.destination(options.out) if options.out else (None, None)
    format = format_for(options.format, out, segments=caption_options.cut.into_segments)
    skipped = inputs.Skipped()
    clips = inputs.clips(options.paths, shard=options.shard, skipped=skipped)
    job = _job(options, caption_options)
    if report or format.pictures:
        caption_options = replace(caption_options, thumbnails=THUMBNAIL_PX)
    summary = run.run(
        clips,
        _engine(options, caption_options, job),
        out=out,
        format=format,
        publication=publication,
        report=report,
        job=job,
        about="; ".join(filter(None, (f"skipping {skipped}" if str(skipped) else "", _by(options)))),
        in_order=options.in_order,
        retry_failed=options.retry_failed,
        overwrite=options.overwrite,
    )
    say(str(summary))
    return 1 if summary.failed or summary.failed_before else 0


def _report(options: argparse.Namespace) -> Path | None:
    """The report beside another output. Without one, the report is the output."""
    report: Path | None = options.report
    if report is None or options.out:
        if report and not report.parent.is_dir():
            raise UsageError(f"no folder for {report}; make the folder, or give another path with --report")
        return report
    if options.format not in (None, REPORT.name):
        raise UsageError(f"--report stands beside the {options.format} file of --out; name that too")
    options.out, options.format = str(report), REPORT.name
    return None


def _by(options: argparse.Namespace) -> str:
    if options.server:
        return f"asking {options.server}"
    return f"loading {options.checkpoint}{' on Ray' if options.engine == 'ray' else ''}"


def _job(options: argparse.Namespace, caption_options: CaptionOptions) -> Job:
    """What the captions depend on, found out before anything large is loaded. Raises `EtenetError` if it cannot be."""
    from etenet.jobs.journal import Job

    if options.server:
        from etenet.jobs.engines import server

        checkpoint = server.checkpoint_of(options.server)
    else:
        from etenet.model import checkpoint as checkpoints

        inspected = checkpoints.inspect(options.checkpoint)
        if refusal := caption_options.refusal(inspected.confidence):
            raise refusal
        checkpoint = inspected.id
    details = {"probabilities": "true"} if _wants_details(options, caption_options) else {}
    return Job(checkpoint=checkpoint, settings=caption_options.as_texts() | details)


def _wants_details(options: argparse.Namespace, caption_options: CaptionOptions) -> bool:
    return options.probabilities or caption_options.captions > 1


def _engine(options: argparse.Namespace, caption_options: CaptionOptions, job: Job) -> Engine:
    """The engine that is asked for. What it needs is loaded when it gets its clips."""
    details = _wants_details(options, caption_options)
    if options.server:
        from etenet.jobs.engines import server

        return server.engine(
            options.server,
            caption_options,
            details=details,
            in_flight=options.workers or server.IN_FLIGHT,
            checkpoint=job.checkpoint,
        )
    if options.engine == "ray":
        try:
            from etenet.jobs.engines import ray
        except ModuleNotFoundError as error:
            raise UsageError(f"--engine ray needs the extra: pip install 'etenet[ray]' ({error})") from error

        return ray.engine(
            options.checkpoint,
            caption_options,
            details=details,
            address=options.ray_address,
            actors=options.workers or ray.ACTORS,
        )
    from etenet.jobs.engines import local

    def load_and_caption(clips: Iterable[JobClip], on_progress: OnProgress[str]) -> Iterator[Record]:
        todo = list(clips)
        engine = local.engine(options.checkpoint, caption_options, details=details, clips=len(todo))
        return engine(todo, on_progress)

    return load_and_caption


def package(options: argparse.Namespace) -> int:
    _print(packaging.package(options))
    return 0


def init(options: argparse.Namespace) -> int:
    from etenet.model import checkpoint as checkpoints
    from etenet.model.vocabulary import Vocabulary

    if not options.words.is_file():
        raise UsageError(f"no word list at {options.words}; give a text file with one word per line")
    words = read_text(options.words, fix="give a text file with one word per line").split()
    try:
        vocabulary = Vocabulary(dict.fromkeys(word.lower() for word in words))
    except ValueError as error:
        raise UsageError(f"{options.words}: {error}") from error
    if not words:
        raise UsageError(f"{options.words} is empty; give a text file with one word per line")
    checkpoints.save(checkpoints.initialise(options.encoder, vocabulary), options.out)
    _print(options.out)
    return 0


def score(options: argparse.Namespace) -> int:
    from etenet.scoring import caption_json, scores

    if options.per_clip and not options.per_clip.parent.is_dir():
        raise UsageError(f"no folder for {options.per_clip}; make the folder, or give another path with --per-clip")
    predictions, references = caption_json.read(options.predictions), caption_json.read(options.references)
    result = scores.score(predictions, references, tokenizer=options.tokenizer)
    _print(json.dumps({**result.overall, "clips": len(result.per_clip), "tokenizer": result.tokenizer}))
    if len(result.per_clip) == 1:
        print(
            "etenet score: CIDEr is meaningless for one clip: it compares the clip's words with those of others",
            file=sys.stderr,
        )
    if options.per_clip:
        lines = (
            {"video": clip, "caption": predictions[clip][0], **figures} for clip, figures in result.per_clip.items()
        )
        try:
            with open(options.per_clip, "w", encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except OSError as error:
            raise UsageError(f"cannot write {options.per_clip}: {error.strerror}") from error
    return 0


def doctor(options: argparse.Namespace) -> int:
    from etenet import doctor

    if options.server:
        findings = doctor.examine_server(options.server)
    else:
        findings = doctor.examine(options.checkpoint, options.config)
    all_good = True
    for finding in findings:
        all_good &= finding.good
        _print(finding)
    return 0 if all_good else 1


def train(options: argparse.Namespace) -> int:
    """Run a command of `training/`, as `python -m training.NAME` does. It ends this process."""
    name, arguments = options.name, options.arguments
    if name not in TRAINING:
        name, arguments = "train", [name, *arguments]
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"training.{name}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        raise UsageError(f"training needs the extra: pip install 'etenet[train]' ({error})") from error
    return 0


def completion(_: argparse.Namespace) -> int:
    from etenet.cli.shells import script

    _print(script(_parser()))
    return 0


def _own_or_bundled(name: str) -> Path:
    """The file of this name in the working folder, or else the one that comes with etenet."""
    return Path(name) if Path(name).exists() else bundled(name)


def _print(result: object) -> None:
    """A line on standard output. Raises `OutputLost`."""
    print_bytes(f"{result}\n".encode(errors="surrogateescape"))


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"must look like 1/4, the first of four shards; got {text!r}")
    return int(number), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="etenet", description="Video captioning: a clip goes in, a sentence comes out."
    )
    parser.add_argument("--version", action="version", version=f"etenet {etenet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint, config = _own_or_bundled(CHECKPOINT), _own_or_bundled(CONFIG)

    command = commands.add_parser("serve", help="start the server; ends on Ctrl-C or SIGTERM")
    command.set_defaults(run=serve)
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="F.pt",
        help=f"default: the archive {DEFAULT_ARCHIVE}, or the model that etenet brings",
    )
    command.add_argument("--config", type=Path, default=config, metavar="F")
    command.add_argument("--host", metavar="H", help="where clients come in; 0.0.0.0: from everywhere")
    command.add_argument("--port", type=_count, metavar="N", help="of captions; the other ports move along")

    command = commands.add_parser(
        "caption", help="caption files, folders and lists of clips; started again, it continues where it stopped"
    )
    command.set_defaults(run=caption)
    command.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders, globs; lists of clips as .jsonl, .csv or .txt, or - for one on standard input",
    )
    command.add_argument(
        "--out",
        metavar="F",
        help="a file, a folder for subtitles, or a URL of one; default: standard output. Clips that it already has are "
        "skipped",
    )
    command.add_argument("--format", choices=FORMATS, help="default: from the name of --out")
    command.add_argument(
        "--report", type=Path, metavar="F.html", help="also write a page that shows all clips with their captions"
    )
    command.add_argument("--overwrite", action="store_true", help="forget the captions that --out already has")
    command.add_argument("--in-order", action="store_true", help="write in the order of the input")
    command.add_argument("--retry-failed", action="store_true", help="try clips again that failed in an earlier run")
    command.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="only every N-th clip, from the I-th"
    )
    command.add_argument("--checkpoint", type=Path, default=checkpoint, metavar="F.pt")
    command.add_argument("--server", metavar="URL", help="caption by this server, not in this process")
    command.add_argument("--engine", choices=("ray",), help="caption on a Ray cluster")
    command.add_argument("--ray-address", metavar="ADDRESS", help="of the cluster; default: one on this machine")
    command.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="requests in flight (--server, default 8) or actors (--engine ray, default 1)",
    )
    command.add_argument(
        "--probabilities", action="store_true", help="also write the probabilities of sentences and words"
    )
    for option in OPTIONS:
        if option.is_flag:
            metavar = None if option.choices else "X" if option.kind is float else "N"
            command.add_argument(option.flag, choices=option.choices or None, metavar=metavar, help=option.usage)

    command = commands.add_parser("package", help="make a TorchServe archive from a checkpoint")
    command.set_defaults(run=package)
    packaging.add_flags(command, DEFAULT_ARCHIVE)

    command = commands.add_parser("init", help="make a randomly initialised checkpoint, to try sizes and speeds")
    command.set_defaults(run=init)
    command.add_argument(
        "--encoder",
        required=True,
        metavar="NAME",
        help="a network of pretrainedmodels, timm:NAME, or torchvision:googlenet",
    )
    command.add_argument("--words", required=True, type=Path, metavar="F", help="text file, one word per line")
    command.add_argument("--out", type=Path, default=Path("init.pt"), metavar="F.pt")

    command = commands.add_parser("doctor", help="say what is missing or wrong, and how to fix it")
    command.set_defaults(run=doctor)
    command.add_argument("--server", metavar="URL", help="check a running server instead of this machine")
    command.add_argument("--checkpoint", type=Path, default=checkpoint, metavar="F.pt")
    command.add_argument("--config", type=Path, default=config, metavar="F")

    command = commands.add_parser("score", help="BLEU, METEOR, ROUGE-L and CIDEr of captions, as one JSON object")
    command.set_defaults(run=score)
    command.add_argument("--predictions", required=True, type=Path, metavar="F", help="JSON, one caption per clip")
    command.add_argument("--references", required=True, type=Path, metavar="F", help="JSON, the same clips")
    command.add_argument(
        "--tokenizer",
        choices=("ptb", "none"),
        default="ptb",
        help="ptb (default) for captions as typed; none if they are lower case without punctuation",
    )
    command.add_argument(
        "--per-clip", type=Path, metavar="F.jsonl", help="also write the scores of each clip to this file"
    )

    command = commands.add_parser(
        "train",
        help="prepare data, train, evaluate: the commands of training/",
        description=f"`etenet train RECIPE ...` trains. {', '.join(TRAINING)}: each has its own --help.",
    )
    command.set_defaults(run=train)
    command.add_argument("name", metavar="NAME", help="a recipe, or one of these commands")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")

    command = commands.add_parser("completion", help='for bash and zsh: eval "$(etenet completion)"')
    command.set_defaults(run=completion)
    return parser


if __name__ == "__main__":
    sys.exit(main())
