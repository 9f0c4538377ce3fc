"""A real nginx with the configuration of deploy/ in front of a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        pytest.fail(f"{name} is missing; `make test` brings nginx, Prometheus, zsh and Chromium; install others")
    return path


@contextmanager
def nginx(upstream: int, change: Callable[[Path], object] = lambda _: None) -> Iterator[int]:
    """Run nginx with the files of deploy/, except for ports and the change; yields its port."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # nginx's workers are not root, even if root started it
        shutil.copytree(CONFIGURATION, folder, dirs_exist_ok=True)
        edit(folder / "upstream.conf", "127.0.0.1:8080", f"127.0.0.1:{upstream}")
        arguments = ["-p", scratch, "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        with running_nginx(arguments, folder / "listen.conf", folder / "log", partial(change, folder)) as port:
            yield port


@contextmanager
def running_nginx(
    arguments: Sequence[str], listen: Path, log: Path, change: Callable[[], object] = lambda: None
) -> Iterator[int]:
    """Run nginx on a free port, instead of the one in its listen.conf; yields the port."""
    (port,) = free_ports(1)
    (old,) = re.findall(r"^listen \d+;", listen.read_text(), re.MULTILINE)
    edit(listen, old, f"listen 127.0.0.1:{port};")
    change()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [program("nginx"), *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: is_open(port) or process.poll() is not None, 10)
        assert process.poll() is None, log.read_text()
        yield port
    finally:
        process.terminate()
        process.wait(20)


def reload(folder: Path) -> None:
    """Have the nginx of this folder read its files again."""
    command = [program("nginx"), "-p", str(folder), "-c", "nginx.conf", "-s", "reload", "-e", "stderr"]
    subprocess.run(command, check=True)


@contextmanager
def responding(on_request: Callable[[str], int | None]) -> Iterator[int]:
    """A server that is told the first line of each request and responds with the status returned, or 200; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = on_request(self.requestline)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status or 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that the file must have."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def with_keys(*keys: str) -> Callable[[Path], None]:
    """A change of nginx's files, after which only who has one of the keys may ask."""
    return lambda folder: edit(folder / "listen.conf", 'set $keys "";', f'set $keys "{" ".join(keys)}";')


@contextmanager
def behind_nginx(server: Server) -> Iterator[Server]:
    """The same server through nginx."""
    with nginx(int(server.inference.rpartition(":")[2])) as port:
        yield replace(server, inference=f"http://127.0.0.1:{port}")
