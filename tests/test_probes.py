"""Probes that say the truth: of a busy server, of one that hangs, and while their port is attacked."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from etenet.serving.exporter import DEADLINE_S, MAX_CONNECTIONS
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server, ask, decoders_of, running_server, wait_until

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
SILENT = 2000  # connections
NO_LENGTH = b"PUT /predictions/etenet HTTP/1.1\r\n\r\n"
HANG_SEEN_S = 10.0


@dataclass
class Watch:
    """What the probes answered, over and over, and how long the slowest answer took."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    slowest_s: float = 0.0


@contextmanager
def watched(server: Server, every_s: float = 0.2) -> Iterator[Watch]:
    watch, done = Watch(), threading.Event()

    def probe() -> None:
        while not done.wait(every_s):
            for page in ("ready", "live"):
                began = time.monotonic()
                watch.statuses[page, ask(f"{server.exporter}/{page}").status] += 1
                watch.slowest_s = max(watch.slowest_s, time.monotonic() - began)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield watch
    finally:
        done.set()
        prober.join()


def connected(server: Server) -> socket.socket:
    host, port = server.exporter.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * SILENT)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_probes_are_answered_within_a_second_beside_two_thousand_silent_connections(
    server: Server, thorough: bool
) -> None:
    """Each that the server closes is opened again, some with half a request, some with one that is refused at once."""
    rng, done = random.Random(0), threading.Event()
    launcher = psutil.Process(server.process.pid)
    threads = launcher.num_threads()

    def silent() -> socket.socket:
        connection = connected(server)
        with suppress(OSError):
            connection.sendall(rng.choice((b"", b"GET /rea", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", NO_LENGTH)))
        return connection

    with ThreadPoolExecutor(1) as attacker:
        held = [silent() for _ in range(SILENT)]

        def attack() -> None:
            while not done.wait(0.001):
                at = rng.randrange(SILENT)
                held[at].close()
                held[at] = silent()

        attacking = attacker.submit(attack)
        try:
            ends_s = time.monotonic() + (60 if thorough else 1)
            with watched(server, every_s=0.05) as watch:
                while time.monotonic() < ends_s:
                    assert b"\netenet_ready 1.0\n" in ask(f"{server.exporter}/metrics").body
                    assert launcher.num_threads() <= threads + 1
                    assert launcher.num_fds() < 3 * MAX_CONNECTIONS
        finally:
            done.set()
            attacking.result()
            for connection in held:
                connection.close()
    assert set(watch.statuses) == {("ready", 200), ("live", 200)}
    assert watch.slowest_s < 1


def test_a_connection_that_sends_slowly_is_closed(server: Server) -> None:
    with connected(server) as connection:
        began = time.monotonic()
        connection.settimeout(0.2)
        with suppress(ConnectionError):
            while True:
                with suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        break
                connection.sendall(b"G")
    assert time.monotonic() - began < DEADLINE_S + 2


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"GET /ready?from=kubelet HTTP/1.0\n\n", b"200"),
        (b"POST /ready HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"GET /ready\r\n\r\n", b"400"),
        (b"\0\xff\r\n\r\n", b"400"),
        (b"GET /../ready HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /ready HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"431"),
        (b"x" * 10_000, b"431"),
    ],
)
def test_the_port_of_probes_answers_malformed_requests(server: Server, request_bytes: bytes, status: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(request_bytes)
        response = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert (b"\r\nAllow: GET, HEAD\r\n" in head) == (status == b"405")


@pytest.mark.parametrize("path", ["/", "/page.js", "/ready", "/live", "/none"])
def test_head_is_answered_as_get_without_the_body(server: Server, path: str) -> None:
    responses = {}
    for method in ("GET", "HEAD"):
        with connected(server) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\n\r\n".encode())
            responses[method] = b"".join(iter(lambda: connection.recv(4096), b""))
    head, end, body = responses["GET"].partition(b"\r\n\r\n")
    assert body
    assert responses["HEAD"] == head + end


def test_a_stopped_worker_is_seen_within_ten_seconds_on_an_idle_server(server: Server) -> None:
    worker = server.worker()
    assert worker is not None
    wait_until(lambda: ask(f"{server.exporter}/ready").status == 200, 10)
    worker.suspend()
    try:
        wait_until(lambda: ask(f"{server.exporter}/ready").status == 503, HANG_SEEN_S)
        assert "it hangs" in ask(f"{server.exporter}/ready").json()["reason"]
        assert ask(f"{server.exporter}/live").status == 200  # TorchServe ends such a worker itself
    finally:
        worker.resume()
    wait_until(lambda: ask(f"{server.exporter}/ready").status == 200, 10)


STUCK = """
import threading

_handle = EtenetHandler.handle


def _stuck(self, data, context):
    if any(row.get("body") == b"get stuck" for row in data):
        threading.Event().wait()
    return _handle(self, data, context)


EtenetHandler.handle = _stuck
"""


@pytest.mark.long
@pytest.mark.parametrize("clients", [1, 60])
def test_a_worker_whose_thread_is_stuck_is_seen_within_ten_seconds(
    clients: int, folder_with_handler: Callable[[str], Path]
) -> None:
    """Alone, and with a full queue, which is no fault by itself."""
    with running_server(folder=folder_with_handler(STUCK)) as server, ThreadPoolExecutor(clients) as senders:
        sent = [senders.submit(server.caption, b"get stuck")]
        sent += [senders.submit(server.caption, CLIP) for _ in range(clients - 1)]
        wait_until(lambda: ask(f"{server.exporter}/ready").status == 503, HANG_SEEN_S)
        assert ask(f"{server.exporter}/live").status == 200
        # TorchServe ends the worker after responseTimeout, and another begins with what waits.
        wait_until(lambda: ask(f"{server.exporter}/ready").status == 200, 180)
        for future in sent:
            future.result()


@pytest.mark.long
def test_a_batch_of_clips_that_each_take_their_whole_time_is_not_a_hang(server: Server) -> None:
    """Every decoder is stopped as soon as it runs, so each clip takes 15 s of the wall clock."""
    worker, done = server.worker(), threading.Event()
    assert worker is not None

    def stop_decoders() -> None:
        while not done.wait(0.05):
            for pid in decoders_of(worker.pid):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).suspend()

    with ThreadPoolExecutor(9) as clients, watched(server) as watch:
        clients.submit(stop_decoders)
        try:
            responses = list(clients.map(server.caption, [clips.video(20 + number) for number in range(8)]))
        finally:
            done.set()
    assert {response.status for response in responses} <= {200, 503}
    assert set(watch.statuses) == {("ready", 200), ("live", 200)}


@pytest.mark.long
def test_a_flood_of_slow_clips_leaves_the_server_ready_and_alive() -> None:
    """45 connections for six minutes, with clips that take about all the processor time that a clip may have."""
    ends_s, numbers = time.monotonic() + 360, iter(range(10**9))
    slow = costly_clip()

    def send(server: Server) -> Counter[int]:
        statuses = Counter[int]()
        while time.monotonic() < ends_s:
            body = slow + struct.pack(">I4sQ", 16, b"free", next(numbers))  # so that none is known already
            statuses[server.caption(body, X_Etenet_Segment="scenes").status] += 1
        return statuses

    with (
        running_server("--checkpoint", str(DEMO)) as server,
        ThreadPoolExecutor(45) as clients,
        watched(server, every_s=1.0) as watch,
    ):
        statuses = sum(clients.map(send, [server] * 45), Counter[int]())
    print(f"responses: {dict(statuses)}, probes: {dict(watch.statuses)}")
    assert set(watch.statuses) == {("ready", 200), ("live", 200)}
    assert statuses.keys() <= {200, 422, 503}
    assert statuses[200] + statuses[422] > 20  # clients and their refusals leave little of two cores


def costly_clip() -> bytes:
    """A small file that takes about the processor time of a clip, on some machines more."""
    grey = np.full((1080, 1920, 3), 128, np.uint8)
    return clips.video(pictures=[grey] * 3000, size=(1920, 1080), preset="ultrafast")
