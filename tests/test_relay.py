"""The exporter passes the page's requests on, a few at a time, and says what is wrong otherwise."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import cast

import pytest

from benchmarks.rig.servers import free_ports
from etenet.serving import relay
from etenet.serving.exporter import exporter
from etenet.serving.health import Health
from etenet.serving.loopback import Address
from etenet.serving.relay import AT_ONCE, Relay
from tests.conftest import EXAMPLES, REPOSITORY, Response, Server, ask

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
PATHS = ("/predictions/etenet", "/explanations/etenet")
PATH = PATHS[1]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@contextmanager
def relayed_to(port: int, max_body_bytes: int = 1000) -> Iterator[str]:
    address, health = Address("127.0.0.1", free_ports(1)[0]), cast("Health", None)
    with exporter(health, address, Path(), Relay(Address("127.0.0.1", port), max_body_bytes)):
        yield address.url


def code_of(response: Response) -> str:
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize("path", PATHS)
def test_the_exporter_gives_the_response_of_torchserve(server: Server, path: str) -> None:
    options = {"X-Etenet-Captions": "2", "X-Etenet-Thumbnails": "32"}
    direct, relayed = (ask(url + path, CLIP, options) for url in (server.inference, server.exporter))
    answers = [response.json() for response in (direct, relayed)]
    for answer in answers:
        del answer["timing_ms"]
    assert answers[0] == answers[1]
    assert relayed.content_type == direct.content_type
    assert relayed.request_id
    text = ask(server.exporter + path, CLIP, {"Accept": "text/plain"})
    assert (text.content_type, text.body.decode().strip()) == (
        "text/plain; charset=utf-8",
        answers[0]["caption"],
    )


def test_it_passes_errors_on_and_refuses_other_paths(server: Server) -> None:
    refused = ask(server.exporter + PATH, b"no video")
    assert (refused.status, code_of(refused)) == (415, "not_a_video")
    for path in ("/models/etenet", "/predictions/etnet", "/v1/chat/completions/"):
        other = ask(server.exporter + path, b"?")
        assert (other.status, code_of(other)) == (404, "not_found")
        assert "/predictions/etenet" in other.json()["error"]["message"]


def test_a_client_that_leaves_is_no_error_in_the_log(server: Server) -> None:
    before = len(server.log.read_bytes())
    host, port = server.exporter.removeprefix("http://").split(":")
    for sent in (CLIP, CLIP[:100]):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset when it closes
            client.sendall(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(CLIP)}\r\n\r\n".encode() + sent)
        assert ask(server.exporter + PATH, CLIP).status == 200  # behind it in the queue
    assert ask(f"{server.exporter}/live").status == 200
    assert b"Traceback" not in server.log.read_bytes()[before:]


def test_a_body_beyond_the_limit_is_not_passed_on() -> None:
    with relayed_to(1, max_body_bytes=2**20) as front:
        too_large = ask(front + PATH, bytes(2**20 + 1))
        assert (too_large.status, code_of(too_large)) == (413, "too_large")
        assert "larger than 1 MiB;" in too_large.json()["error"]["message"]


def test_options_in_a_query_are_refused() -> None:
    with relayed_to(1) as front:
        refused = ask(f"{front}{PATH}?captions=3", b"clip")
        assert (refused.status, code_of(refused)) == (400, "bad_request")
        assert "X-Etenet-Captions" in refused.json()["error"]["message"]


def test_a_body_without_a_length_is_refused() -> None:
    with relayed_to(1) as front:
        host, port = front.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            assert connection.recv(100).split()[1] == b"411"


def test_without_torchserve_it_says_so() -> None:
    (closed,) = free_ports(1)
    with relayed_to(closed) as front:
        gone = ask(front + PATH, b"video")
        assert (gone.status, code_of(gone)) == (502, "bad_gateway")


def test_one_request_more_than_there_is_room_for_is_refused_and_the_next_is_not() -> None:
    together = Barrier(AT_ONCE + 1, timeout=30)

    class Slow(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait()
            together.wait()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with ExitStack() as stack:
        torchserve = stack.enter_context(serving(Slow))
        front = stack.enter_context(relayed_to(torchserve))
        clients = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        held = [clients.submit(ask, front + PATH, b"video") for _ in range(AT_ONCE)]
        together.wait()
        refused = ask(front + PATH, b"video")
        assert (refused.status, code_of(refused)) == (503, "overloaded")
        assert "takes 8 requests at a time" in refused.json()["error"]["message"]
        together.wait()
        assert [future.result().status for future in held] == [200] * AT_ONCE


@pytest.mark.parametrize(
    ("length", "status"),
    [
        pytest.param("9" * 5000, b"413", id="thousands of digits"),
        *(("1" * 19, b"413"), ("-1", b"411"), ("0x5", b"411"), ("", b"411")),
    ],
)
def test_no_length_of_a_body_ends_the_port(length: str, status: bytes) -> None:
    with relayed_to(1) as front:
        host, port = front.removeprefix("http://").split(":")
        for _ in range(2):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"PUT {PATH} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
                assert connection.recv(100).split()[1] == status


def test_a_bug_in_one_request_does_not_end_the_port() -> None:
    class Broken(Relay):
        async def __call__(self, *_: object) -> bytes:
            raise RuntimeError("a bug")

    address, relay = Address("127.0.0.1", free_ports(1)[0]), Broken(Address("127.0.0.1", 1), 1000)
    with exporter(cast("Health", None), address, Path(), relay):
        with suppress(OSError):
            ask(address.url + PATH, b"video")
        assert ask(f"{address.url}/v1/models").status == 200


@pytest.mark.parametrize(
    ("content_type", "theirs", "status", "code"),
    [
        ("video/mp4", 503, 503, "overloaded"),
        ("video/mp4", 500, 502, "bad_gateway"),
        ("multipart/form-data; boundary=x", 500, 400, "bad_request"),
        ("multipart/form-data", 500, 502, "bad_gateway"),  # which is not passed on as a form
    ],
)
def test_errors_of_torchserve_are_told_as_by_nginx(content_type: str, theirs: int, status: int, code: str) -> None:
    class Failing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(theirs)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with serving(Failing) as torchserve, relayed_to(torchserve) as front:
        response = ask(front + PATH, b"video", {"Content-Type": content_type})
    assert (response.status, code_of(response)) == (status, code)
    assert bool(response.retry_after) == (status > 500)


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked() -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with serving(Ready) as torchserve, relayed_to(torchserve) as front:
        host, port = front.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"PUT {PATH} HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n".encode())
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"video")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_comes_slowly_does_not_keep_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "PIECE_DEADLINE_S", 0.5)
    answer = b""
    with socket.create_server(("127.0.0.1", 0)) as torchserve, relayed_to(torchserve.getsockname()[1]) as front:
        host, port = front.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.05) as connection:
            connection.sendall(f"PUT {PATH} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode())
            for _ in range(100):  # each byte comes well before the deadline of a piece
                connection.sendall(b"x")
                with suppress(TimeoutError):
                    answer = connection.recv(1000)
                    break
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_a_client_that_reads_slowly_gets_the_whole_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etenet.serving.exporter.DEADLINE_S", 0.3)
    body = bytes(6_500_000)  # more than the kernel keeps of it

    class Large(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with serving(Large) as torchserve, relayed_to(torchserve) as front:
        host, port = front.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            connection.connect((host, int(port)))
            connection.sendall(f"PUT {PATH} HTTP/1.1\r\nContent-Length: 5\r\n\r\nvideo".encode())
            time.sleep(1)
            received = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert len(received.partition(b"\r\n\r\n")[2]) == len(body)
