"""How every benchmark starts: `python -m benchmarks.NAME`, with its own options and `--out`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.rig.record import REPOSITORY, RESULTS, Results
from etenet.errors import EtenetError


def start(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Results]:
    """The options, and where the result goes. Raises `UsageError` if it cannot go there, before any work is done."""
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    return options, Results.start(options.out, REPOSITORY)


def run(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status of `main`; after an error with status 2 and one line on stderr."""
    try:
        sys.exit(main())
    except EtenetError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
