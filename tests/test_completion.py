"""`etenet completion`, tried in the shells that people type into."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etenet.cli import main
from tests.front import program

DEADLINE_S = 30.0
SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-i"]}


class Typed:
    """An interactive shell on a terminal of its own."""

    def __init__(self, shell: str, folder: Path) -> None:
        self.terminal, other = pty.openpty()
        path = Path(program(shell))
        # Debian's zsh, unpacked, looks for its parts where it would be installed. Without a .zshrc it asks for one.
        root = path.resolve().parents[2 if path.parent.parent.name == "usr" else 1]
        (folder / ".zshenv").write_text(
            f"module_path+=({root}/usr/lib/*/zsh/*(N)) fpath+=({root}/usr/share/zsh/functions/**/(N))\n"
        )
        (folder / ".zshrc").touch()
        self.process = subprocess.Popen(
            [path, *SHELLS[shell]],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=folder,
            env={
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(folder),
                "TERM": "dumb",
                "PS1": "$ ",
            },
            start_new_session=True,
        )
        os.close(other)
        self.seen = ""

    def type(self, text: str, until: str) -> None:
        """Type, and read until the terminal shows what is expected."""
        os.write(self.terminal, text.encode())
        self.seen, end = "", time.monotonic() + DEADLINE_S
        while not re.search(until, self.seen) and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace").replace("\r", "")
        assert re.search(until, self.seen), self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_options_choices_and_files(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "holiday.mp4").touch()
    typed = Typed(shell, tmp_path)
    try:
        typed.type(". ./script; echo loa''ded\n", "loaded")
        for text, completed in (
            ("etenet capt", "etenet caption "),
            ("etenet caption --beam", "etenet caption --beam-size "),
            ("etenet caption --format co", "etenet caption --format coco "),
            ("etenet caption --out x holi", "etenet caption --out x holiday.mp4"),
        ):
            typed.type(f"{text}\t", re.escape(completed))
            typed.type("\x15", "")  # forget the line
    finally:
        typed.close()
