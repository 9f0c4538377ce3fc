"""`etenet package`: its flags, and what they mean together. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from etenet.errors import UsageError
from etenet.files import require_replaceable

if TYPE_CHECKING:
    from etenet.cli.int8 import Quantiser


def package(options: argparse.Namespace) -> Path:
    """The archive that was made. Raises `UsageError`."""
    from etenet.serving import archive

    source: Path = options.source
    if source.suffix == ".mar":
        raise UsageError(f"{source} is an archive already; serve it: etenet serve --checkpoint {source}")
    require_replaceable(options.out)
    if options.out.suffix != ".mar":
        raise UsageError(f"the name of an archive ends in .mar, got --out {options.out}")
    quantise = _quantiser(options)
    return archive.package(
        source,
        options.out,
        gpu=options.gpu,
        quantise=quantise,
        before_compiling=partial(
            print, "etenet package: compiling the encoder takes up to a minute ...", file=sys.stderr
        ),
    )


def _quantiser(options: argparse.Namespace) -> Quantiser | None:
    if not options.int8:
        if options.calibrate or options.references or options.agreement is not None:
            raise UsageError("--calibrate, --references and --agreement need --int8; give that too")
        return None
    if not options.calibrate:
        raise UsageError("--int8 needs clips like those to come; give them with --calibrate")
    from etenet.cli.int8 import Quantiser
    from etenet.jobs import inputs
    from etenet.scoring import caption_json

    references = caption_json.read(options.references) if options.references else None
    return Quantiser.of(inputs.clips(options.calibrate), references, options.agreement)


def add_flags(command: argparse.ArgumentParser, default_out: Path) -> None:
    command.add_argument("source", type=Path, metavar="CHECKPOINT", help="a .pt file made by training")
    command.add_argument("--out", type=Path, default=default_out, metavar="F.mar", help=f"default: {default_out}")
    command.add_argument("--gpu", action="store_true", help="compile for GPUs like this machine's, which takes minutes")
    command.add_argument(
        "--int8", action="store_true", help="encode in int8 on a CPU, which is faster; refused if captions suffer"
    )
    command.add_argument(
        "--calibrate",
        nargs="+",
        metavar="PATH",
        help="for --int8: clips, as for `etenet caption`; some set the ranges, by the others the captions are compared",
    )
    command.add_argument(
        "--references",
        type=Path,
        metavar="F.json",
        help="captions that people gave these clips; int8 may then lose at most 0.5 points of CIDEr",
    )
    command.add_argument(
        "--agreement",
        type=_share,
        metavar="SHARE",
        help="the share of clips that must keep their caption, or with --references get one as good; default 0.98, "
        "with --references no such condition",
    )


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
