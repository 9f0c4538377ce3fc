"""A real nginx with the configuration of deploy/ in front of a server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rig.servers import free_ports
from tests.conftest import REPOSITORY, Server, is_open, wait_until

CONFIGURATION = REPOSITORY / "deploy" / "nginx"
DEBIAN = REPOSITORY / ".venv" / "debian"


def program(name: str) -> str:
    """A program from PATH, or from the folder in which `make test` installs missing ones."""
    folders = [os.environ["PATH"], *(str(DEBIAN / folder) for folder in ("usr/sbin", "usr/bin", "bin"))]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        pytest.fail(f"{name} is missing; `make test` installs it")
    return path


@contextmanager
def nginx(upstream: int, change: Callable[[Path], None] | None = None) -> Iterator[int]:
    """Run nginx with the files of deploy/, except for ports and the change; yields its port."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # nginx's workers are not root, even if root started it
        shutil.copytree(CONFIGURATION, folder, dirs_exist_ok=True)
        edit(folder / "listen.conf", "listen 80;", f"listen 127.0.0.1:{port};")
        edit(folder / "upstream.conf", "127.0.0.1:8080", f"127.0.0.1:{upstream}")
        if change:
            change(folder)
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [program("nginx"), "-p", scratch, "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: is_open(port) or process.poll() is not None, 10)
            assert process.poll() is None, (folder / "log").read_text()
            yield port
        finally:
            process.terminate()
            process.wait(20)


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that the file must have."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@contextmanager
def behind_nginx(server: Server) -> Iterator[Server]:
    """The same server through nginx."""
    with nginx(int(server.inference.rpartition(":")[2])) as port:
        yield replace(server, inference=f"http://127.0.0.1:{port}")
