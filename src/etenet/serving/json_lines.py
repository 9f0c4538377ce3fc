"""Standard error as lines of JSON, whoever writes to it: this process, Java, or a library that knows no log."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime

STDERR = 2
END_DEADLINE_S = 5.0  # a process that outlives this one would keep the pipe open


def write_json_lines() -> None:
    """From now until this process ends. A line that is a JSON object stays as it is; empty lines are left out."""
    reading, writing = os.pipe()
    stderr = os.dup(STDERR)
    os.dup2(writing, STDERR)
    os.close(writing)

    def wrap() -> None:
        with (
            open(reading, errors="backslashreplace") as lines,
            open(stderr, "wb", buffering=0, closefd=False) as out,
        ):
            for line in lines:
                if text := line.strip():
                    with suppress(OSError):  # this line is lost, but the disk may have room for the next
                        out.write(f"{text if _is_object(text) else _wrapped(text)}\n".encode(errors="backslashreplace"))

    thread = threading.Thread(target=wrap, daemon=True)

    def end() -> None:
        sys.stderr.flush()
        os.dup2(stderr, STDERR)
        thread.join(END_DEADLINE_S)

    thread.start()
    atexit.register(end)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _wrapped(text: str) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": text})
