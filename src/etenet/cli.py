"""The `etenet` command. Results go to stdout or the file asked for, everything else to stderr.

Exit status: 0 all done, 1 some items failed (they are listed), 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from etenet.errors import CaptionError, EtenetError, JavaError, UsageError

DEFAULT_CHECKPOINT = Path("model_store/demo.pt")
DEFAULT_ARCHIVE = Path("model_store/etenet.mar")
DEFAULT_CONFIG = Path("config.properties")
BATCH_CLIPS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except EtenetError as error:
        print(f"etenet {options.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, JavaError) else 2
    return status


def serve(options: argparse.Namespace) -> int:
    from etenet import server

    config = server.ServerConfig.read(options.config)
    return server.serve(config, mar=DEFAULT_ARCHIVE, checkpoint=options.checkpoint)


def caption(options: argparse.Namespace) -> int:
    import etenet

    names = ("beam_size", "captions", "max_words", "length_penalty")
    wish = etenet.CaptionOptions.parse({n: getattr(options, n) for n in names if getattr(options, n) is not None})
    for path in options.paths:
        if not path.is_file():
            raise UsageError(f"no file at {path}")
    captioner = etenet.load(options.checkpoint)
    failed = 0
    with open(options.out, "w", encoding="utf-8") if options.out else nullcontext(sys.stdout) as out:
        for paths in _batches(options.paths):
            outcomes = captioner.caption_batch([path.read_bytes() for path in paths], [wish] * len(paths))
            for path, outcome in zip(paths, outcomes, strict=True):
                line: dict[str, Any] = {"video": str(path)}
                if isinstance(outcome, CaptionError):
                    failed += 1
                    line |= outcome.as_dict()
                    print(f"etenet caption: {path}: {outcome}", file=sys.stderr)
                else:
                    line["caption"] = outcome.text
                    if wish.captions > 1:
                        line["captions"] = outcome.as_dict()["captions"]
                print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
    return 1 if failed else 0


def package(options: argparse.Namespace) -> int:
    from etenet import archive

    print(archive.package(options.source, options.out))
    return 0


def init(options: argparse.Namespace) -> int:
    from etenet import checkpoint as checkpoints
    from etenet.vocabulary import Vocabulary

    if not options.words.is_file():
        raise UsageError(f"no word list at {options.words}; give a text file with one word per line")
    listed = options.words.read_text(encoding="utf-8-sig").split()
    try:
        vocabulary = Vocabulary(dict.fromkeys(word.lower() for word in listed))
    except ValueError as error:
        raise UsageError(f"{options.words}: {error}") from error
    if not listed:
        raise UsageError(f"{options.words} is empty; give a text file with one word per line")
    checkpoints.save(checkpoints.initialise(options.encoder, vocabulary), options.out)
    print(options.out)
    return 0


def score(options: argparse.Namespace) -> int:
    from etenet import caption_json, scores

    if options.per_clip and not options.per_clip.parent.is_dir():
        raise UsageError(f"no folder for {options.per_clip}; make it, or name another place with --per-clip")
    predictions, references = caption_json.read(options.predictions), caption_json.read(options.references)
    result = scores.score(predictions, references, tokenizer=options.tokenizer)
    print(json.dumps({**result.overall, "clips": len(result.per_clip), "tokenizer": result.tokenizer}))
    if len(result.per_clip) == 1:
        print("etenet score: CIDEr means nothing here: it compares a clip's words with other clips'", file=sys.stderr)
    if options.per_clip:
        lines = ({"video": clip, "caption": predictions[clip][0], **of} for clip, of in result.per_clip.items())
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
    good = True
    for finding in findings:
        good &= finding.good
        print(finding, flush=True)
    return 0 if good else 1


def _batches(paths: Sequence[Path]) -> Iterator[list[Path]]:
    rest = iter(paths)
    while batch := list(islice(rest, BATCH_CLIPS)):
        yield batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="etenet", description="Video captioning: a clip goes in, a sentence comes out."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("serve", help="start the server; ends on Ctrl-C or SIGTERM")
    command.set_defaults(run=serve)
    command.add_argument("--checkpoint", type=Path, metavar="F.pt", help=f"default: the archive {DEFAULT_ARCHIVE}")
    command.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="F")

    command = commands.add_parser("caption", help="caption files here, without a server; one JSON object per line")
    command.set_defaults(run=caption)
    command.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="F.pt")
    command.add_argument("--out", type=Path, metavar="F.jsonl", help="default: standard output")
    command.add_argument("--beam-size", metavar="N", help="1 to 10, default 5")
    command.add_argument("--captions", metavar="N", help="how many of the beam to give, default 1")
    command.add_argument("--max-words", metavar="N", help="1 to 50, default: the checkpoint's own")
    command.add_argument("--length-penalty", metavar="X", help="0 to 2, default 0")

    command = commands.add_parser("package", help="make a TorchServe archive of a checkpoint")
    command.set_defaults(run=package)
    command.add_argument("source", type=Path, metavar="CHECKPOINT")
    command.add_argument("--out", type=Path, default=DEFAULT_ARCHIVE, metavar="F.mar")

    command = commands.add_parser("init", help="make a randomly initialised checkpoint, for trying sizes and speeds")
    command.set_defaults(run=init)
    command.add_argument("--encoder", required=True, metavar="NAME", help="a network of pretrainedmodels")
    command.add_argument("--words", required=True, type=Path, metavar="F", help="text file, one word per line")
    command.add_argument("--out", type=Path, default=Path("init.pt"), metavar="F.pt")

    command = commands.add_parser("doctor", help="say what is missing or wrong here, and how to mend it")
    command.set_defaults(run=doctor)
    command.add_argument("--server", metavar="URL", help="look at a running server instead of this machine")
    command.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="F.pt")
    command.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="F")

    command = commands.add_parser("score", help="BLEU, METEOR, ROUGE-L and CIDEr of captions, as one JSON object")
    command.set_defaults(run=score)
    command.add_argument("--predictions", required=True, type=Path, metavar="F", help="JSON, one caption per clip")
    command.add_argument("--references", required=True, type=Path, metavar="F", help="JSON, the same clips")
    command.add_argument(
        "--tokenizer",
        choices=("ptb", "none"),
        default="ptb",
        help="ptb (default) for raw captions; none for those already in lower case without punctuation",
    )
    command.add_argument("--per-clip", type=Path, metavar="F.jsonl", help="also write the figures of each clip here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
