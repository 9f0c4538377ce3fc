"""The `etenet` command. Results go to stdout or to the file given, everything else to stderr.

Exit status: 0 all done, 1 something failed (each failure is listed), 2 wrong use. As in shells, 130 after Ctrl-C, and
141 if nobody reads standard output any more.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import etenet
from etenet.assets import bundled
from etenet.cli import arguments, captioning, packaging
from etenet.cli.captioning import caption
from etenet.errors import CaptionError, EtenetError, OutputLost, UsageError
from etenet.files import occupy_closed_streams, print_bytes
from etenet.files.rows import read_text
from etenet.linux import thread_settings

CHECKPOINT = "model_store/real.pt"
CONFIG = "config.properties"
DEFAULT_ARCHIVE = Path("model_store/etenet.mar")
TRAINING = ("calibrate", "curves", "evaluate", "prepare", "ship", "stills", "train")


def main(argv: Sequence[str] | None = None) -> int:
    occupy_closed_streams()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        _log_as_asked(argv)
    options = _parser().parse_args(argv)
    try:
        os.environ.update(thread_settings(os.environ))
        status: int = options.run(options)
    except EtenetError as error:
        if isinstance(error, OutputLost) and isinstance(error.__cause__, BrokenPipeError):  # `| head`: no mistake
            return 128 + signal.SIGPIPE
        print(f"etenet {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | CaptionError) else 1
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
    served = options.checkpoint or (DEFAULT_ARCHIVE if DEFAULT_ARCHIVE.exists() else _own_or_bundled(CHECKPOINT))
    return launcher.serve(config, served)


def _log_as_asked(argv: Sequence[str]) -> None:
    """Before the arguments are read, so that what is wrong with them is logged as JSON, too, if the log is to be."""
    from etenet.serving.config import request_log
    from etenet.serving.json_lines import write_json_lines

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    config = _own_or_bundled(CONFIG)
    with suppress(argparse.ArgumentError):  # no file is named
        config = parser.parse_known_args(argv)[0].config or config
    if request_log(config, os.environ) == "json":
        write_json_lines()


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
    if options.per_clip in (options.predictions, options.references):
        raise UsageError(f"--per-clip would replace {options.per_clip}, which is scored; give another path")
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
            raise UsageError(
                f"cannot write {options.per_clip}: {error.strerror}; fix that, or give another path with --per-clip"
            ) from error
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
    name, rest = options.name, options.arguments
    if name not in TRAINING:
        name, rest = "train", [name, *rest]
    sys.argv[1:] = rest
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
        help=f"a checkpoint, or an archive (F.mar); default: {DEFAULT_ARCHIVE}, or the model that etenet brings",
    )
    command.add_argument("--config", type=Path, default=config, metavar="F", help=f"settings; default: {config}")
    command.add_argument(
        "--host",
        metavar="H",
        help="address on which captions are served, such as 127.0.0.1; default: that of --config, 0.0.0.0 (all)",
    )
    command.add_argument(
        "--port",
        type=arguments.count,
        metavar="N",
        help="port on which captions are served, default 8080; the other ports move by as much",
    )

    command = commands.add_parser(
        "caption", help="caption files, folders and lists of clips; started again, it continues where it stopped"
    )
    command.set_defaults(run=caption)
    captioning.add_flags(command, checkpoint)

    command = commands.add_parser("package", help="make a TorchServe archive from a checkpoint")
    command.set_defaults(run=package)
    packaging.add_flags(command, DEFAULT_ARCHIVE)

    command = commands.add_parser("init", help="make a randomly initialised checkpoint, to try sizes and speeds")
    command.set_defaults(run=init)
    command.add_argument(
        "--encoder",
        required=True,
        metavar="NAME",
        help="a network of pretrainedmodels, timm:NAME, torchvision:googlenet, or several with + between them",
    )
    command.add_argument("--words", required=True, type=Path, metavar="F", help="text file, one word per line")
    command.add_argument("--out", type=Path, default=Path("init.pt"), metavar="F.pt", help="default: init.pt")

    command = commands.add_parser("doctor", help="say what is missing or wrong, and how to fix it")
    command.set_defaults(run=doctor)
    command.add_argument(
        "--server",
        metavar="URL",
        help="check a running server, such as http://localhost:8080, instead of this machine; ETENET_SERVER_KEY is "
        "its key",
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        default=checkpoint,
        metavar="F.pt",
        help=f"check this checkpoint, or the one in this archive (F.mar); default: {checkpoint}",
    )
    command.add_argument("--config", type=Path, default=config, metavar="F", help=f"settings; default: {config}")

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
