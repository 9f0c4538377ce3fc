"""How a training command ends: one line and an exit status, never a traceback for what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from etenet.errors import EtenetError, UsageError

CTRL_C = 130  # 128 + SIGINT, as shells have it


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end this process: 0 done, 1 failed, 2 wrong use, 130 after Ctrl-C, or what `main` returns."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("training: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(CTRL_C)
    except (EtenetError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
