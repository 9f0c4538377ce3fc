"""nginx before the server, with the configuration of deploy/: who asks well gets what the server says, whoever asks
badly, slowly or too much is kept from it.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml

from etenet.serving.config import ServerConfig
from etenet.video.limits import DecodeLimits
from tests.conftest import EXAMPLES, REPOSITORY, Server, ask, wait_until
from tests.front import CONFIGURATION, behind_nginx, edit, nginx

CAPTIONS = [(REPOSITORY / "examples" / name, caption) for name, caption in EXAMPLES.items()]
CLIP = CAPTIONS[0][0].read_bytes()


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


def port_of(server: Server) -> int:
    return int(server.inference.rpartition(":")[2])


def answer_to(port: int, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """What is answered to raw bytes, until the connection is closed: status, headers in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        # A server that does not want to read the rest may hang up hard after it answered.
        with suppress(ConnectionResetError):
            while received := connection.recv(65536):
                answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = (line.partition(": ") for line in lines)
    return int(status.split()[1]), {name.lower(): value for name, _, value in headers}, body


def request(target: str = "/predictions/etenet", *headers: str, method: str = "PUT", length: int = 0) -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: x",
        "Connection: close",
        f"Content-Length: {length}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(("path", "caption"), CAPTIONS, ids=lambda value: getattr(value, "stem", ""))
def test_a_caption_comes_through(front: Server, path: Path, caption: str) -> None:
    assert front.caption(path.read_bytes()).json()["caption"] == caption


def test_the_handler_speaks_for_itself(server: Server, front: Server) -> None:
    for body, headers in ((b"hello", {}), (b"", {}), (CLIP, {"X_Etenet_Beam_Size": "many"}), (CLIP[:3000], {})):
        assert front.caption(body, **headers) == server.caption(body, **headers)


def test_options_and_explanations_come_through(front: Server) -> None:
    assert len(front.caption(CLIP, X_Etenet_Captions="3").json()["captions"]) == 3
    assert ask(f"{front.inference}/explanations/etenet", CLIP).json()["captions"][0]["attention"]


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (request("/models"), 404, "not_found"),
        (request("/metrics", method="GET"), 404, "not_found"),
        (request("/predictions/other"), 404, "not_found"),
        (request("/predictions/etenet/../../models"), 404, "not_found"),
        (request(method="DELETE"), 405, "method_not_allowed"),
        (request("nowhere"), 400, "bad_request"),
        (request("/predictions/etenet", "Content-Type: multipart/form-data"), 400, "bad_request"),
        (request("/predictions/etenet", "Content-Type: multipart/form-data; boundary="), 400, "bad_request"),
        (request("/predictions/etenet", "Transfer-Encoding: nonsense"), 400, "bad_request"),
        (request("/predictions/etenet", "X: " + "x" * 40_000), 400, "bad_request"),
        (request(length=2 * 10**9), 413, "too_large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_request_for_a_caption_goes_no_further(front: Server, asked: bytes, status: int, code: str) -> None:
    found, headers, body = answer_to(port_of(front), asked)
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["content-type"] == "application/json"


def test_a_server_that_is_gone_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = closed.getsockname()[1]
    with nginx(gone) as port:
        status, headers, body = answer_to(port, request(length=5), b"hello")
    assert (status, json.loads(body)["error"]["code"]) == (502, "bad_gateway")
    assert int(headers["retry-after"]) > 0


def test_a_server_that_says_nothing_is_given_up() -> None:
    def impatient(folder: Path) -> None:
        edit(folder / "nginx.conf", "proxy_read_timeout 120s", "proxy_read_timeout 1s")

    with socket.create_server(("127.0.0.1", 0)) as silent, nginx(silent.getsockname()[1], impatient) as port:
        status, headers, body = answer_to(port, request(length=5), b"hello")
    assert (status, json.loads(body)["error"]["code"]) == (504, "gateway_timeout")
    assert int(headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("asked", "answered", "status", "code"),
    [
        ("video/mp4", "X-Etenet-Error: internal_error\r\n", 500, "internal_error"),
        ("multipart/form-data; boundary=x", "X-Etenet-Error: internal_error\r\n", 500, "internal_error"),
        ("multipart/form-data; boundary=x", "", 400, "bad_request"),
        ("video/mp4", "", 502, "bad_gateway"),
    ],
)
def test_whose_failure_it_was_is_told_apart(asked: str, answered: str, status: int, code: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as upstream, nginx(upstream.getsockname()[1]) as port:
        upstream.settimeout(10)
        with ThreadPoolExecutor(1) as client:
            asking = client.submit(
                answer_to, port, request("/predictions/etenet", f"Content-Type: {asked}", length=5), b"hello"
            )
            connection = upstream.accept()[0]
            head = f"HTTP/1.1 500 x\r\n{answered}X-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{{}}"
            connection.sendall(head.encode())
            found, headers, body = asking.result()
            connection.close()
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["x-request-id"] == "theirs"


def test_who_finds_no_place_hears_so_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, nginx(silent.getsockname()[1]) as port:
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(places())]
        for connection in waiting:
            connection.sendall(request(length=5) + b"hello")
        silent.settimeout(10)
        taken = [silent.accept()[0] for _ in waiting]
        status, headers, body = answer_to(port, request(length=5), b"hello")
        for connection in (*waiting, *taken):
            connection.close()
    assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
    assert int(headers["retry-after"]) > 0


def places() -> int:
    (count,) = re.findall(r"max_conns=(\d+)", (CONFIGURATION / "upstream.conf").read_text())
    return int(count)


def test_it_lets_in_as_many_and_as_much_as_the_server_takes() -> None:
    config = ServerConfig.read(REPOSITORY / "config.properties")
    batch = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())["batchSize"]
    assert places() == config.queue + batch
    (largest,) = re.findall(r"client_max_body_size (\d+)m;", (CONFIGURATION / "nginx.conf").read_text())
    assert DecodeLimits().max_body_bytes < int(largest) * 2**20 <= config.max_body_bytes


def test_a_body_that_calls_itself_a_form_is_captioned_all_the_same(front: Server) -> None:
    """So do curl --data-binary and urllib."""
    form = urllib.request.Request(front.predictions, data=CLIP, method="POST")
    with urllib.request.urlopen(form, timeout=30) as answer:
        assert form.get_header("Content-type") == "application/x-www-form-urlencoded"
        assert json.load(answer)["caption"] == CAPTIONS[0][1]


def test_one_address_has_no_more_connections_than_it_may(front: Server) -> None:
    """A connection counts from when nginx has read its header, so a few of those that come first may be refused."""

    def refused() -> bool:
        with socket.create_connection(front_address, timeout=10, source_address=("127.0.2.1", 0)) as one_more:
            one_more.sendall(request())
            answer = one_more.recv(65536)
        return answer.startswith(b"HTTP/1.1 503") and b'"overloaded"' in answer

    front_address = "127.0.0.1", port_of(front)
    with ExitStack() as stuck:
        for _ in range(70):
            one = socket.create_connection(front_address, source_address=("127.0.2.1", 0))
            stuck.enter_context(one).sendall(request(length=len(CLIP)) + CLIP[:100])
        wait_until(refused, 5)
        assert front.caption(CLIP).status == 200
    wait_until(lambda: not refused(), 5)


def test_half_sent_bodies_are_hung_up_on_while_good_clips_go_on(front: Server) -> None:
    half = request(length=len(CLIP)) + CLIP[: len(CLIP) // 2]
    started = time.monotonic()
    stuck = [
        socket.create_connection(("127.0.0.1", port_of(front)), source_address=(f"127.0.1.{number % 5 + 1}", 0))
        for number in range(200)
    ]
    for connection in stuck:
        connection.sendall(half)
    for path, caption in CAPTIONS:
        assert front.caption(path.read_bytes()).json()["caption"] == caption
    for connection in stuck:
        connection.settimeout(max(0.1, started + 30 - time.monotonic()))
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()
    assert time.monotonic() - started < 30


def test_it_speaks_tls_where_it_is_told_to(server: Server, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = f"-keyout {key} -out {certificate} -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        shlex.split(f"openssl req -x509 -newkey rsa:2048 -nodes {made}"), check=True, stderr=subprocess.DEVNULL
    )

    def with_tls(folder: Path) -> None:
        listen = folder / "listen.conf"
        plain, _, tls = listen.read_text().partition("\n\n")
        port = plain.split()[1].rstrip(";")
        written = "".join(line.removeprefix("#").strip() + "\n" for line in tls.splitlines() if line.endswith(";"))
        written = written.replace("listen 443", f"listen {port}").replace("fullchain.pem", str(certificate))
        listen.write_text(written.replace("privkey.pem", str(key)))

    with nginx(port_of(server), with_tls) as port:
        trusted = ssl.create_default_context(cafile=certificate)
        asked = urllib.request.Request(f"https://127.0.0.1:{port}/predictions/etenet", CLIP, method="PUT")
        asked.add_header("Content-Type", "video/mp4")
        with urllib.request.urlopen(asked, timeout=60, context=trusted) as answer:
            assert json.load(answer)["caption"] == CAPTIONS[0][1]
