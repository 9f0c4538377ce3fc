"""Two versions behind nginx: a canary gets its share, none loses a request, and one takes the place of the other."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain, repeat
from pathlib import Path

import pytest

from etenet.files import sha256
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, ask, running_server, wait_until
from tests.front import edit, nginx, reload, responding
from tests.test_front import port_of, request

DEPLOY = REPOSITORY / "deploy"
CANARY = DEPLOY / "nginx" / "canary.conf"
KUBERNETES_CANARY = DEPLOY / "kubernetes" / "canary" / "upstream.conf"
KUBERNETES = DEPLOY / "kubernetes" / "base" / "upstream.conf"
RUNNING, NEW = ("127.0.0.1:8080", "etenet:8080"), ("127.0.0.1:8180", "etenet-canary:8080")
CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()


def upstream(file: Path, running: int, new: int) -> Callable[[Path], None]:
    """Puts a file of deploy/ in the place of upstream.conf, with these ports."""

    def change(folder: Path) -> None:
        text = file.read_text()
        for names, port in ((RUNNING, running), (NEW, new)):
            for name in names:
                text = text.replace(name, f"127.0.0.1:{port}")
        (folder / "upstream.conf").write_text(text)

    return change


def status_from(port: int, client: str = "127.0.0.1") -> int:
    """Of an answer to a client with this address."""
    with socket.create_connection(("127.0.0.1", port), 10, (client, 0)) as connection:
        connection.sendall(request(method="POST", length=5) + b"hello")
        return int(connection.recv(65536).split()[1])


@pytest.mark.parametrize("file", [CANARY, KUBERNETES_CANARY], ids=["nginx", "kubernetes"])
def test_a_canary_gets_one_request_of_twenty(file: Path) -> None:
    asked: Counter[str] = Counter()
    with (
        responding(lambda _: asked.update(["running"])) as running,
        responding(lambda _: asked.update(["new"])) as new,
        nginx(running, upstream(file, running, new)) as port,
    ):
        assert {status_from(port) for _ in range(100)} == {200}
    assert asked == {"running": 95, "new": 5}


def test_a_client_stays_with_one_version_if_the_line_for_that_is_used() -> None:
    reached: list[str] = []

    def sticky(folder: Path) -> None:
        upstream(CANARY, running, new)(folder)
        edit(folder / "upstream.conf", "# hash", "hash")

    with (
        responding(lambda _: reached.append("running")) as running,
        responding(lambda _: reached.append("new")) as new,
        nginx(running, sticky) as port,
    ):
        for number in range(200):
            for _ in range(2):
                assert status_from(port, f"127.0.{4 + number // 100}.{number % 100 + 1}") == 200
    first, second = reached[::2], reached[1::2]
    assert first == second
    assert 0 < first.count("new") < 40


@pytest.mark.parametrize("file", [CANARY, KUBERNETES_CANARY], ids=["nginx", "kubernetes"])
@pytest.mark.parametrize("fault", ["refuses", "is down", "is gone"])
def test_a_canary_that_fails_costs_no_request(file: Path, fault: str) -> None:
    with responding(lambda _: 200) as running, responding(lambda _: 503) as refusing, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        new = refusing if fault == "refuses" else closed.getsockname()[1]
        with ExitStack() as opened:
            if fault == "is gone":  # as the address of a container that was removed: nothing there says no
                closed.listen(0)
                waiting = opened.enter_context(socket.create_connection(closed.getsockname()))
                assert waiting.getpeername()[1] == new
            port = opened.enter_context(nginx(running, upstream(file, running, new)))
            clients = opened.enter_context(ThreadPoolExecutor(4))
            assert set(clients.map(lambda _: status_from(port), range(40))) == {200}


@pytest.mark.parametrize("file", [CANARY, KUBERNETES_CANARY, KUBERNETES], ids=["nginx", "kubernetes", "one version"])
def test_servers_that_were_full_are_asked_again_at_once(file: Path) -> None:
    """By default nginx asks none of them for ten seconds, once each has refused a request that another may take."""
    statuses = chain([503] * 4, repeat(200))
    with responding(lambda _: next(statuses)) as server, nginx(server, upstream(file, server, server)) as port:
        assert [status_from(port) for _ in range(40)] == [503] * 2 + [200] * 38


class Load:
    """Clients that send one clip after the other, and what they got: a checkpoint, or what went wrong."""

    def __init__(self, url: str) -> None:
        self._url, self._over = url, threading.Event()
        self.outcomes: list[str] = []

    @contextmanager
    def running(self, clients: int = 6) -> Iterator[None]:
        with ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(self._send) for _ in range(clients)]
            try:
                yield
            finally:
                self._over.set()
            for future in futures:
                future.result()

    def _send(self) -> None:
        while not self._over.is_set():
            try:
                response = ask(f"{self._url}/predictions/etenet", CLIP)
                good = response.status == 200
                self.outcomes.append(response.json()["model"]["checkpoint"] if good else str(response.status))
            except OSError as error:
                self.outcomes.append(repr(error))

    def wait_for(self, *checkpoints: str, answers: int = 40) -> None:
        """Until each of the checkpoints, and none else, is in so many answers in a row."""

        def only_these() -> bool:
            return len(self.outcomes) >= begin + answers and set(self.outcomes[-answers:]) == set(checkpoints)

        begin = len(self.outcomes)
        wait_until(only_these, 60)


@pytest.mark.parametrize("order", ["nginx forgets it first", pytest.param("it stops first", marks=pytest.mark.long)])
def test_another_checkpoint_takes_over_under_load_without_a_lost_request(order: str, small_checkpoint: Path) -> None:
    """As docs/operating.md says: without containers, and with compose, where nginx knows both until one has stopped."""
    folders: list[Path] = []
    before, after = (f"sha256:{sha256(path)}" for path in (DEMO, small_checkpoint))
    with (
        running_server("--checkpoint", str(DEMO)) as blue,
        nginx(port_of(blue), folders.append) as port,
        ExitStack() as servers,
    ):
        (folder,), load = folders, Load(f"http://127.0.0.1:{port}")
        with load.running():
            load.wait_for(before)
            green = servers.enter_context(running_server("--checkpoint", str(small_checkpoint)))
            upstream(CANARY, port_of(blue), port_of(green))(folder)
            reload(folder)
            load.wait_for(before, after, answers=60)
            if order == "it stops first":
                assert blue.stop() == 0
                load.wait_for(after)
            upstream(DEPLOY / "nginx" / "upstream.conf", port_of(green), 0)(folder)
            reload(folder)
            load.wait_for(after)
            if order == "nginx forgets it first":
                assert blue.stop() == 0
            load.wait_for(after)
    assert len(load.outcomes) > 200
    assert set(load.outcomes) == {before, after}
