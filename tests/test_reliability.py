"""A real server under attack: hostile clips, killed processes, malformed HTTP.

`--hostile` runs the long form. The attacks run one after another against a server of this file's own.
"""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest

from etenet.video.limits import DecodeLimits
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Response, Server, decoders_of, running_server, runs, wait_until
from tests.front import behind_nginx
from tests.hostile import Trap, hostile_files
from tests.hostile.alarm import Alarm
from tests.test_hostile import allowed_outcomes

LIMITS = DecodeLimits()
PATIENCE_S = 0.5  # with a response
BATCH_S = 1.0  # for the other clips of the batch
# Of a worker under attack, and of its largest decoder.
MOST_GROWTH = {"descriptors": 2, "threads": 0, "processes": 0, "memory": 32 * 2**20, "memory of a decoder": 32 * 2**20}
GOOD = {caption: (REPOSITORY / "examples" / name).read_bytes() for name, caption in EXAMPLES.items()}


@pytest.fixture(scope="module")
def attacked() -> Iterator[Server]:
    with running_server("--checkpoint", str(DEMO)) as running:
        yield running


def contents(response: Response) -> object:
    """A 200 response without its timing and its probabilities, whose last digit depends on the size of the batch."""
    fields = response.json()
    words = [[word["word"] for word in sentence["words"]] for sentence in fields["captions"]]
    return {**fields, "captions": words, "timing_ms": None}


def worker_of(server: Server) -> psutil.Process:
    worker = server.worker()
    assert worker is not None
    return worker


def test_hostile_files_share_batches_with_good_ones(attacked: Server, alarm: Alarm, thorough: bool) -> None:
    files = list(hostile_files(alarm.trap))
    random.Random(0).shuffle(files)
    files = files if thorough else files[::6]
    alone = {caption: contents(attacked.caption(body)) for caption, body in GOOD.items()}
    worker, wrong = worker_of(attacked), {}
    longest_s = (LIMITS.decode_cpu_s if thorough else LIMITS.decode_deadline_s) + BATCH_S
    with ThreadPoolExecutor(8) as clients:
        for start in range(0, len(files), 6):
            caption, body = list(GOOD.items())[start // 6 % len(GOOD)]
            good = clients.submit(attacked.caption, body)
            responses = {file: clients.submit(_timed, attacked, file.body) for file in files[start : start + 6]}
            for file, future in responses.items():
                response, seconds = future.result()
                outcome = (
                    "accept" if response.status == 200 else "reject" if 400 <= response.status < 500 else "neither"
                )
                reason = response.json().get("caption") or response.json()["error"]["message"]
                if outcome not in allowed_outcomes(file) or not reason or seconds > longest_s:
                    wrong[file.name] = (response.status, seconds, response.body[:200])
            assert contents(good.result()) == alone[caption]
    assert not wrong
    figures = attacked.figures()
    mean_batch = figures["etenet_batch_size_clips_sum"] / figures["etenet_batch_size_clips_count"]
    assert mean_batch > 1.5, "few batches were shared"
    assert worker_of(attacked).pid == worker.pid
    assert not alarm.triggered()


def _timed(server: Server, body: bytes) -> tuple[Response, float]:
    started = time.monotonic()
    return server.caption(body), time.monotonic() - started


@dataclass
class Load:
    """Clients that send good clips without a pause, and the results."""

    server: Server
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    begun_s: float = 0.0  # when the request was sent that got the latest response

    def await_response_to_a_new_request(self, deadline_s: float) -> None:
        now = time.monotonic()
        wait_until(lambda: self.begun_s > now, deadline_s)

    def send(self, number: int, done: threading.Event) -> None:
        clips = list(GOOD.items())[number:] + list(GOOD.items())[:number]
        while not done.is_set():
            for caption, body in clips:
                began = time.monotonic()
                try:
                    response = self.server.caption(body)
                except OSError:
                    self.statuses[0] += 1
                    continue
                self.statuses[response.status] += 1
                if response.status == 200:
                    self.begun_s = max(self.begun_s, began)
                    if response.json()["caption"] != caption:
                        self.wrong.append(f"{caption!r} expected, got {response.json()['caption']!r}")


@contextmanager
def load(server: Server, clients: int = 4) -> Iterator[Load]:
    running, done = Load(server), threading.Event()
    with ThreadPoolExecutor(clients) as threads:
        sent = [threads.submit(running.send, number, done) for number in range(clients)]
        try:
            yield running
        finally:
            done.set()
            for future in sent:
                future.result()


@pytest.mark.long
def test_a_killed_decoder_costs_no_clip_and_a_stopped_one_only_its_own(attacked: Server) -> None:
    worker, stops = worker_of(attacked), 0
    count = len(decoders_of(worker.pid))
    with load(attacked) as traffic:
        for number in range(3 * 50):
            victim = decoders_of(worker.pid)[number % count]
            attack = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)[number % 3]
            stops += attack == signal.SIGSTOP
            psutil.Process(victim).send_signal(attack)
            wait_until(lambda: is_replaced(victim, worker.pid, count), LIMITS.decode_deadline_s + 5)  # noqa: B023
            traffic.await_response_to_a_new_request(1.0)
    print(f"{number + 1} decoders: responses {dict(traffic.statuses)}")
    assert traffic.wrong == []
    assert set(traffic.statuses) <= {200, 503}
    assert traffic.statuses[503] <= stops
    assert worker_of(attacked).pid == worker.pid


def is_replaced(victim: int, worker: int, count: int) -> bool:
    now = decoders_of(worker)
    return len(now) == count and victim not in now


def test_a_killed_worker_costs_only_its_own_requests(attacked: Server, thorough: bool) -> None:
    clients, waits_s, outages_s, count = 4, [], [], 20 if thorough else 2
    for _ in range(count):
        with load(attacked, clients) as traffic:
            traffic.await_response_to_a_new_request(60)
            worker = worker_of(attacked)
            orphans = decoders_of(worker.pid)
            killed_s = time.time()
            worker.kill()
            wait_until(lambda: not any(map(runs, orphans)), 5)  # noqa: B023
            traffic.await_response_to_a_new_request(60)
            outages_s.append(time.time() - killed_s)
            waits_s.append(worker_of(attacked).create_time() - killed_s)
        assert traffic.wrong == []
        assert sum(count for status, count in traffic.statuses.items() if status != 200) <= clients
    print(
        f"{count} workers killed: a new one starts within {max(waits_s):.1f} s, responds within {max(outages_s):.1f} s"
    )
    assert not thorough or max(waits_s) < 2


def test_a_thousand_hostile_requests_leave_nothing_behind(attacked: Server, alarm: Alarm, thorough: bool) -> None:
    assert not growth(attacked, alarm.trap, 1000 if thorough else 130)


LEAK = """
_kept, _handle = [], EtenetHandler.handle


def _leaking(self, data, context):
    _kept.append((open(__file__), b"x" * 2**21))
    return _handle(self, data, context)


EtenetHandler.handle = _leaking
"""


@pytest.mark.long
def test_a_handler_that_leaks_is_caught(alarm: Alarm, folder_with_handler: Callable[[str], Path]) -> None:
    with running_server(folder=folder_with_handler(LEAK)) as leaky:
        assert growth(leaky, alarm.trap, 130) == {"descriptors", "memory"}


def growth(server: Server, trap: Trap, count: int) -> set[str]:
    """The resources of which a warm worker uses more after each of two attacks of `count` hostile requests.

    One attack alone may still fill caches and arenas of malloc. A leak grows every time.
    """
    files = [file.body for file in hostile_files(trap) if len(file.body) < 2**20]
    random.Random(0).shuffle(files)
    large = clips.video(20, size=(3840, 2160), preset="ultrafast")

    def attack(count: int) -> None:
        bodies = [body for number, file in enumerate(files * 3) for body in (file, large)[: 1 + (number % 12 == 0)]]
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(server.caption, bodies[:count]))

    attack(count // 2)
    worker, leaking = worker_of(server), set(MOST_GROWTH)
    for _ in range(2):
        before = used_by(worker)
        attack(count)
        after = used_by(worker)
        print(f"{count} requests: grown by", {name: after[name] - before[name] for name in MOST_GROWTH})
        leaking = {name for name in leaking if after[name] > before[name] + MOST_GROWTH[name]}
        if not leaking:
            break
    return leaking


def used_by(worker: psutil.Process) -> dict[str, int]:
    return {
        "descriptors": worker.num_fds(),
        "threads": worker.num_threads(),
        "processes": len(worker.children()),
        "memory": worker.memory_info().rss,
        "memory of a decoder": max(psutil.Process(pid).memory_info().rss for pid in decoders_of(worker.pid)),
    }


def test_malformed_http_gets_a_response_or_a_closed_connection(attacked: Server, thorough: bool) -> None:
    worker, statuses = worker_of(attacked), Counter[str]()
    for request, status in responses_to_malformed(attacked, 10_000 if thorough else 300):
        known = status == "500" and breaks_torchserve(request)
        assert known or not status.startswith("5"), (status, request[:300])
        statuses[status] += 1
    print(f"{sum(statuses.values())} malformed requests: {dict(statuses)}")
    assert min(statuses["400"], statuses["500"]) > 0
    assert_unharmed(attacked, worker)


def test_behind_nginx_malformed_http_gets_no_5xx(attacked: Server, thorough: bool) -> None:
    worker, statuses = worker_of(attacked), Counter[str]()
    with behind_nginx(attacked) as front:
        for request, status in responses_to_malformed(front, 10_000 if thorough else 600):
            assert not status.startswith("5"), (status, request[:300])
            statuses[status] += 1
        print(f"{sum(statuses.values())} malformed requests: {dict(statuses)}")
        assert statuses["400"] > 0
        assert_unharmed(front, worker)


def assert_unharmed(server: Server, worker: psutil.Process) -> None:
    for caption, body in GOOD.items():
        assert server.caption(body).json()["caption"] == caption
    assert worker_of(server).pid == worker.pid


def responses_to_malformed(server: Server, count: int) -> Iterator[tuple[bytes, str]]:
    rng = random.Random(count)
    requests = [malformed(rng) for _ in range(count)]
    with ThreadPoolExecutor(12) as clients:
        yield from zip(requests, clients.map(partial(_raw, server), requests), strict=True)


def _raw(server: Server, request: bytes) -> str:
    """The status of the response, or "none" if the connection is closed without one.

    TorchServe closes a connection of which the client closes its half. So that is done only where it waits for the rest
    of the request.
    """
    host, port = server.inference.removeprefix("http://").split(":")
    response = b""
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection, suppress(OSError):
        connection.sendall(request)
        try:
            response = connection.recv(4096)
        except TimeoutError:
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10)
            try:
                response = connection.recv(4096)
            except TimeoutError:
                pytest.fail(f"no response to {request[:300]!r}")
    return response[9:12].decode("latin-1") if response.startswith(b"HTTP/1.") else "none"


def breaks_torchserve(request: bytes) -> bool:
    """Whether TorchServe's front end responds with 500 to such a request. SECURITY.md describes the two kinds."""
    line, *headers = request.split(b"\r\n")
    target = b"".join(line.split(b" ")[1:2])
    return not target.startswith(b"/") or any(b"multipart/form-data" in header.lower() for header in headers)


_METHODS = [
    "GET",
    "PUT",
    "POST",
    "HEAD",
    "OPTIONS",
    "DELETE",
    "PATCH",
    "TRACE",
    "CONNECT",
    "get",
    "P\0ST",
    "",
    "A" * 5000,
]
_PATHS = [
    *("/predictions/etenet", "/predictions/none", "/predictions/", "/", "//", "/../../etc/passwd", "/ping", "*"),
    *("/predictions/etenet/9", "/predictions/etenet?a=%ff%00", "/" + "a" * 9000, "/%zz", "\x00", "http://x/", ""),
    *("/models", "/v1/models/etenet:predict", "/explanations/none", "/api-description", "/metrics"),
]
_VERSIONS = ["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "HTTP/1.1 extra", "ICY", "", "HTTP/-1"]
_HEADERS = [
    *("Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: abc"),
    *("Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: chunked", "Transfer-Encoding: nonsense"),
    *("Transfer-Encoding: chunked\r\nContent-Length: 3", "Content-Type: application/json", "Content-Type: text/plain"),
    *("Content-Type: multipart/form-data", "Content-Type: multipart/form-data; boundary=", "Content-Type: \xff"),
    *("Content-Type: multipart/form-data; boundary=ab", 'Content-Type: multipart/form-data; boundary=""'),
    *("Content-Type: application/x-www-form-urlencoded", "Expect: 100-continue", "Connection: Upgrade\r\nUpgrade: h2c"),
    *("X: " + "x" * 9000, ": no name", "No colon", " folded: yes", "X-Etenet-Beam-Size: 999", "Host: a\r\nHost: b"),
    *("Accept: \r\n", "Authorization: Bearer x", "Cookie: " + "a=b; " * 500, "Range: bytes=9-1", "\0: \0"),
]
_BODIES = [
    b"",
    b"hello",
    b"{",
    b'{"data": 1}',
    b"5\r\nhello\r\n0\r\n\r\n",
    b"FFFFFFFF\r\nx",
    b"-5\r\n",
    b"\0" * 100,
    b"--\r\n",
    b"--ab",
    b"&&data=%zz",
    b"data=x\ry",
    b"--ab\r\n\r\nx\r\n--ab--\r\n",
    b"--ab\r\nContent-Disposition: form-data\r\n\r\nx\r\n--ab--\r\n",
    b'--ab\r\nContent-Disposition: form-data; name="data"\r\nContent-Transfer-Encoding: x\r\n\r\nx\r\n--ab--\r\n',
    b'--ab\r\nContent-Disposition: form-data; name=""; filename="\r\n\r\n--ab\r\n--ab--',
]


def malformed(rng: random.Random) -> bytes:
    """A malformed HTTP request, or random bytes."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 300))
    lines = [" ".join((rng.choice(_METHODS), rng.choice(_PATHS), rng.choice(_VERSIONS)))]
    lines += rng.sample(_HEADERS, rng.randrange(4))
    request = "\r\n".join([*lines, "", ""]).encode("latin-1") + rng.choice(_BODIES)
    if rng.random() < 0.2:
        request = request[: rng.randrange(1, len(request) + 1)]
    if rng.random() < 0.2:
        request = bytes(byte ^ (rng.random() < 0.02) << rng.randrange(8) for byte in request)
    return request
