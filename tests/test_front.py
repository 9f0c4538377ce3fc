"""nginx with the configuration of deploy/ in front of the server: good requests get the server's response; malformed,
slow and too many requests do not reach it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import resource
import shlex
import shutil
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
from tests.front import CONFIGURATION, behind_nginx, edit, nginx, responding, with_keys

CAPTIONS = [(REPOSITORY / "examples" / name, caption) for name, caption in EXAMPLES.items()]
CLIP = CAPTIONS[0][0].read_bytes()


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


def port_of(server: Server) -> int:
    return int(server.inference.rpartition(":")[2])


def response_to(port: int, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes and read until the connection is closed: status, headers in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        response = b""
        # A server that does not read the rest may reset the connection after its response.
        with suppress(ConnectionResetError):
            while received := connection.recv(65536):
                response += received
    head, _, body = response.partition(b"\r\n\r\n")
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
def test_a_caption_passes(front: Server, path: Path, caption: str) -> None:
    assert front.caption(path.read_bytes()).json()["caption"] == caption


def test_responses_of_the_handler_pass_unchanged(server: Server, front: Server) -> None:
    for body, headers in ((b"hello", {}), (b"", {}), (CLIP, {"X_Etenet_Beam_Size": "many"}), (CLIP[:3000], {})):
        assert front.caption(body, **headers) == server.caption(body, **headers)


def test_options_and_explanations_pass(front: Server) -> None:
    assert len(front.caption(CLIP, X_Etenet_Captions="3").json()["captions"]) == 3
    assert ask(f"{front.inference}/explanations/etenet", CLIP).json()["captions"][0]["attention"]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (request("/models"), 404, "not_found"),
        (request("/metrics", method="GET"), 404, "not_found"),
        (request("/predictions/other"), 404, "not_found"),
        (request("/predictions/etenet/../../models"), 404, "not_found"),
        (request("/predictions/etenet?captions=3"), 400, "bad_request"),
        (request(method="DELETE"), 405, "method_not_allowed"),
        (request("nowhere"), 400, "bad_request"),
        (request("/predictions/etenet", "Content-Type: multipart/form-data"), 400, "bad_request"),
        (request("/predictions/etenet", "Content-Type: multipart/form-data; boundary="), 400, "bad_request"),
        (request("/predictions/etenet", "Transfer-Encoding: nonsense"), 400, "bad_request"),
        (request("/predictions/etenet", "X: " + "x" * 40_000), 400, "bad_request"),
        (request("/error/headers"), 404, "not_found"),
        (request(length=2 * 10**9), 413, "too_large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_for_anything_else_does_not_pass(front: Server, sent: bytes, status: int, code: str) -> None:
    actual, headers, body = response_to(port_of(front), sent)
    assert (actual, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["content-type"] == "application/json"


def test_headers_beyond_the_limit_are_called_too_long(front: Server) -> None:
    _, _, body = response_to(port_of(front), request("/predictions/etenet", "Cookie: " + "x" * 9000))
    assert json.loads(body)["error"]["message"].startswith("the headers are too long")


def test_a_413_says_whether_the_body_or_what_it_holds_is_too_large(front: Server) -> None:
    holds = front.caption(gzip.compress(bytes(DecodeLimits().max_body_bytes + 1)), Content_Encoding="gzip")
    _, _, body = response_to(port_of(front), request(length=2 * 10**9))
    for sent, reason in ((holds.body, "the decompressed video"), (body, "the body is larger than 64 MiB")):
        error = json.loads(sent)["error"]
        assert error["code"] == "too_large"
        assert error["message"].startswith(reason)


FORM = "Content-Type: multipart/form-data; boundary=ab"
NAMED = 'Content-Disposition: form-data; name="data"'


@pytest.mark.parametrize(
    "part",
    [
        *("", "X: y", "Content-Disposition", "Content-Disposition:", "Content-Disposition: form-data", ": x"),
        *('Content-Disposition: form-data; name=""', f"{NAMED}; filename*=x", f"{NAMED}; filename*=x''y"),
        *(f"{NAMED}; filename*=utf-8''%zz", f'{NAMED}; filename="a"\r\nContent-Type: text/plain; charset=x'),
        f"{NAMED}\r\nContent-Type: multipart/mixed",
    ],
)
def test_a_form_that_torchserve_cannot_read_is_a_bad_request(server: Server, front: Server, part: str) -> None:
    body = f"--ab\r\n{part}\r\n\r\nx\r\n--ab--\r\n".encode()
    sent = request("/predictions/etenet", FORM, length=len(body)), body
    assert response_to(port_of(server), *sent)[0] == 500  # else it needs no translation
    status, _, response = response_to(port_of(front), *sent)
    assert (status, json.loads(response)["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize("body", [b"&&", b"=", b"a=%zz", b"a=b\rc"])
def test_a_body_that_is_declared_a_form_is_not_read_as_one(server: Server, front: Server, body: bytes) -> None:
    sent = request("/predictions/etenet", "Content-Type: application/x-www-form-urlencoded", length=len(body)), body
    for door in (server, front):
        status, _, response = response_to(port_of(door), *sent)
        assert (status, json.loads(response)["error"]["code"]) == (415, "not_a_video")


DOORS = ("/predictions/etenet", "/explanations/etenet")
ELSEWHERE = ("/ping", "/models", "/models/etenet", "/predictions/other", "/api-description", "/metrics", "/invocations")


def disguised(door: str) -> Iterator[str]:
    """Targets that a proxy may take for the door, and the server behind it for something else; or the reverse."""
    for other in ELSEWHERE:
        up = "/.." * other.count("/")
        yield from (f"{other}{up}{door}", f"http://x{other}{up}{door}", f"{other}/.{up}//.{door}/.")
        yield from (f"{other}{escaped}{up}{door}" for escaped in ("%3f", "%23", "%00", "%5c", ";"))
        yield from (f"{other}{up.replace(*pair)}{door}" for pair in (("..", "%2e%2e"), ("/", "%2f"), ("/", "%5c")))
        yield from (f"{door}/../..{other}", f"{door}%2f..%2f..{other}", f"{door}/..;/..;{other}", f"{door}#{other}")
        yield from (f"/{door}?{other}", f"{other}?/../{door}")
    yield from (door + tail for tail in ("/", "/.", "/..", "%00", "%0a", "%0d%0a", "%2f", "?", "?a", ";a", ":predict"))
    yield from (door.replace(*pair) for pair in (("e", "%65"), ("/", "//"), ("/", "/./"), ("/", "%2f"), ("t", "%2574")))


def test_no_path_leads_elsewhere() -> None:
    reached: list[str] = []
    with responding(reached.append) as upstream, nginx(upstream) as port:
        targets = list(itertools.chain.from_iterable(map(disguised, DOORS)))
        statuses = [response_to(port, request(target, method="POST"))[0] for target in targets]
    assert len(targets) > 200
    assert set(reached) == {f"POST {door} HTTP/1.1" for door in DOORS}
    assert set(statuses) == {200, 400, 404}
    assert statuses.count(200) == len(reached)


@pytest.mark.parametrize("sent", [b"", b"POST /", request(length=5)[:-2]], ids=["nothing", "a word", "half a header"])
def test_good_requests_are_answered_beside_four_thousand_silent_connections(sent: bytes, usual_limit: None) -> None:
    del usual_limit
    with responding(lambda _: None) as upstream, nginx(upstream) as port, ExitStack() as silent:
        allow_descriptors(5000)
        for number in range(4000):
            address = f"127.0.{3 + number // 200}.{number % 200 + 1}", 0
            one = socket.create_connection(("127.0.0.1", port), timeout=1, source_address=address)
            silent.enter_context(one).sendall(sent)
            if number % 100 == 0:
                started = time.monotonic()
                assert response_to(port, request(method="POST", length=5), b"hello")[0] == 200
                assert time.monotonic() - started < 1


@pytest.fixture
def usual_limit() -> Iterator[None]:
    """The usual limit on descriptors, which programs that the test starts inherit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_descriptors(1024)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def allow_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_body_that_cannot_be_stored_does_not_blame_the_captioner() -> None:
    folders: list[Path] = []
    body = bytes(2**21)  # more than client_body_buffer_size
    with socket.create_server(("127.0.0.1", 0)) as upstream, nginx(upstream.getsockname()[1], folders.append) as port:
        shutil.rmtree(folders[0] / "client_body_temp")
        status, headers, response = response_to(port, request(length=len(body)), body)
    assert (status, json.loads(response)["error"]["code"]) == (503, "no_space")
    assert int(headers["retry-after"]) >= 30


def test_a_server_that_cannot_be_reached_is_a_bad_gateway() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        unused = closed.getsockname()[1]
    with nginx(unused) as port:
        status, headers, body = response_to(port, request(length=5), b"hello")
    assert (status, json.loads(body)["error"]["code"]) == (502, "bad_gateway")
    assert int(headers["retry-after"]) > 0


def test_a_server_that_does_not_respond_is_a_gateway_timeout() -> None:
    def impatient(folder: Path) -> None:
        edit(folder / "nginx.conf", "proxy_read_timeout 120s", "proxy_read_timeout 1s")

    with socket.create_server(("127.0.0.1", 0)) as silent, nginx(silent.getsockname()[1], impatient) as port:
        status, headers, body = response_to(port, request(length=5), b"hello")
    assert (status, json.loads(body)["error"]["code"]) == (504, "gateway_timeout")
    assert int(headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("content_type", "theirs", "captioners", "status", "code"),
    [
        ("video/mp4", 500, "internal_error", 500, "internal_error"),
        ("multipart/form-data; boundary=x", 500, "internal_error", 500, "internal_error"),
        ("multipart/form-data; boundary=x", 500, "", 400, "bad_request"),
        ("video/mp4", 500, "", 502, "bad_gateway"),
        ("video/mp4", 413, "too_large", 413, "too_large"),
        ("video/mp4", 503, "overloaded", 503, "overloaded"),
    ],
)
def test_an_error_is_told_apart_by_its_origin(
    content_type: str, theirs: int, captioners: str, status: int, code: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as upstream, nginx(upstream.getsockname()[1]) as port:
        upstream.settimeout(10)
        with ThreadPoolExecutor(1) as client:
            future = client.submit(
                response_to, port, request("/predictions/etenet", f"Content-Type: {content_type}", length=5), b"hello"
            )
            connection = upstream.accept()[0]
            passed_on = connection.recv(65536).decode()
            error = f"X-Etenet-Error: {captioners}\r\n" if captioners else ""
            head = f"HTTP/1.1 {theirs} x\r\n{error}X-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{{}}"
            connection.sendall(head.encode())
            actual, headers, body = future.result()
            connection.close()
    assert (actual, json.loads(body)["error"]["code"]) == (status, code)
    assert headers.get("x-etenet-error", "") == captioners  # etenet caption --server asks again without it
    assert f"\r\nX-Request-Id: {headers['x-request-id']}\r\n" in passed_on


def test_a_busy_server_refuses_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, nginx(silent.getsockname()[1]) as port:
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections_per_server())]
        for connection in waiting:
            connection.sendall(request(length=5) + b"hello")
        silent.settimeout(10)
        accepted = [silent.accept()[0] for _ in waiting]
        status, headers, body = response_to(port, request(length=5), b"hello")
        for connection in (*waiting, *accepted):
            connection.close()
    assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
    assert int(headers["retry-after"]) > 0


def connections_per_server() -> int:
    (count,) = re.findall(r"max_conns=(\d+)", (CONFIGURATION / "upstream.conf").read_text())
    return int(count)


KEYS = ("4b1f0e6d2a", "x+y/z=")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        *(((f"Authorization: {scheme} {key}",), 200) for scheme in ("Bearer", "bearer ") for key in KEYS),
        ((), 401),
        *(
            ((f"Authorization: {value}",), 401)
            for value in ("", "Bearer", "Bearer ", f"Basic {KEYS[0]}", f"Bearer {KEYS[0][:-1]}", f"Bearer {KEYS[0]}0")
        ),
        *(
            ((f"Authorization: {value}",), 401)
            for value in (" ".join(("Bearer", *KEYS)), "a#Bearer a", "# a #Bearer a", f"Bearer {KEYS[0]}, {KEYS[1]}")
        ),
    ],
)
def test_where_keys_are_set_only_who_has_one_may_ask(sent: tuple[str, ...], status: int) -> None:
    with responding(lambda _: None) as upstream, nginx(upstream, with_keys(*KEYS)) as port:
        for path in ("/predictions/etenet", "/explanations/etenet", "/v1/chat/completions?api-version=1"):
            got, headers, body = response_to(port, request(path, *sent, method="POST"))
            assert got == status
            if status == 401:
                assert headers["www-authenticate"] == "Bearer"
                assert json.loads(body)["error"]["code"] == "unauthorized"


def test_its_limits_are_those_of_the_server() -> None:
    config = ServerConfig.read(REPOSITORY / "config.properties")
    batch = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())["batchSize"]
    assert connections_per_server() == config.queue + batch
    (largest,) = re.findall(r"client_max_body_size (\d+)m;", (CONFIGURATION / "nginx.conf").read_text())
    assert DecodeLimits().max_body_bytes < int(largest) * 2**20 <= config.max_body_bytes


def test_a_body_that_is_declared_a_form_is_captioned(front: Server) -> None:
    """curl --data-binary and urllib declare every body one."""
    form = urllib.request.Request(front.predictions, data=CLIP, method="POST")
    with urllib.request.urlopen(form, timeout=30) as response:
        assert form.get_header("Content-type") == "application/x-www-form-urlencoded"
        assert json.load(response)["caption"] == CAPTIONS[0][1]


def test_the_connections_of_an_address_are_limited(front: Server) -> None:
    """A connection counts once nginx has read its header, so a few of the first may be refused, too."""

    def refused() -> bool:
        with socket.create_connection(front_address, timeout=10, source_address=("127.0.2.1", 0)) as one_more:
            one_more.sendall(request())
            response = one_more.recv(65536)
        return response.startswith(b"HTTP/1.1 503") and b'"overloaded"' in response

    front_address = "127.0.0.1", port_of(front)
    with ExitStack() as stuck:
        for _ in range(70):
            one = socket.create_connection(front_address, source_address=("127.0.2.1", 0))
            stuck.enter_context(one).sendall(request(length=len(CLIP)) + CLIP[:100])
        wait_until(refused, 5)
        assert front.caption(CLIP).status == 200
    wait_until(lambda: not refused(), 5)


def test_half_sent_bodies_are_disconnected_while_good_clips_are_captioned(front: Server) -> None:
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


def test_it_serves_tls_when_configured(server: Server, tmp_path: Path) -> None:
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
        sent = urllib.request.Request(f"https://127.0.0.1:{port}/predictions/etenet", CLIP, method="PUT")
        sent.add_header("Content-Type", "video/mp4")
        with urllib.request.urlopen(sent, timeout=60, context=trusted) as response:
            assert json.load(response)["caption"] == CAPTIONS[0][1]
        plain = ask(f"http://127.0.0.1:{port}/predictions/etenet", CLIP)
        assert (plain.status, "https://" in plain.json()["error"]["message"]) == (400, True)
