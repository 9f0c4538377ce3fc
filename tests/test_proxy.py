"""Proxies that the environment names: for other machines only, as curl and browsers use them."""

from __future__ import annotations

import json
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from etenet.cli import main
from etenet.errors import UsageError
from etenet.jobs.access import is_this_machine, proxy_to
from tests.conftest import EXAMPLES, REPOSITORY, Server, ask

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")
CLIP = REPOSITORY / "examples" / next(iter(EXAMPLES))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets these variables, and removes all others about proxies."""

    def only(**values: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return only


def own_address() -> str:
    """An address of this machine that is not a loopback one, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


HERE = ("localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.8.9.1", "::1", "0.0.0.0", "::")


@pytest.mark.parametrize("host", [*HERE, socket.gethostname(), own_address()])
def test_no_proxy_leads_to_this_machine(host: str, environment: Callable[..., None]) -> None:
    assert is_this_machine(host)
    url = f"http://{f'[{host}]' if ':' in host else host}:8080"
    for name in (*NAMES[:3], "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment(**{name: "http://proxy.example:3128"})
        assert proxy_to(url) is None
        assert proxy_to(url.replace("http:", "https:")) is None


@pytest.mark.parametrize("host", ["captions.example", "localhost.example", "192.0.2.7", "2001:db8::7", "my-localhost"])
def test_another_machine_is_reached_as_the_environment_says(host: str, environment: Callable[..., None]) -> None:
    assert not is_this_machine(host)
    netloc = f"[{host}]" if ":" in host else host
    plain, secure = f"http://{netloc}:8080", f"https://{netloc}"
    for values, of_plain, of_secure in (
        ({}, None, None),
        ({"http_proxy": "http://p:1"}, "http://p:1", None),
        ({"HTTP_PROXY": "p:1"}, "http://p:1", None),
        ({"https_proxy": "http://p:2", "http_proxy": "http://p:1"}, "http://p:1", "http://p:2"),
        ({"ALL_PROXY": "http://p:3"}, "http://p:3", "http://p:3"),
        ({"all_proxy": "http://p:3", "HTTPS_PROXY": "https://u:w@p:2"}, "http://p:3", "https://u:w@p:2"),
        ({"all_proxy": "http://p:3", "no_proxy": "*"}, None, None),
        ({"all_proxy": "http://p:3", "http_proxy": ""}, "http://p:3", "http://p:3"),
    ):
        environment(**values)
        assert (proxy_to(plain), proxy_to(secure)) == (of_plain, of_secure), values


def test_hosts_in_no_proxy_are_reached_directly(environment: Callable[..., None]) -> None:
    environment(http_proxy="http://p:1", no_proxy="inside.example,.corp.example,b.example:8080")
    direct = ("inside.example", "inside.example:8080", "a.corp.example", "b.example:8080")
    assert [proxy_to(f"http://{netloc}") for netloc in direct] == [None] * 4
    assert [proxy_to(f"http://{netloc}") for netloc in ("outside.example", "b.example:80")] == ["http://p:1"] * 2


def test_a_proxy_of_another_kind_is_refused_without_its_password(environment: Callable[..., None]) -> None:
    environment(ALL_PROXY="socks5h://user:secret@p:1")
    with pytest.raises(
        UsageError, match=r"socks5h proxy for captions.example.*; set http_proxy.*or no_proxy="
    ) as raised:
        proxy_to("http://captions.example")
    assert "secret" not in str(raised.value)


@pytest.fixture
def proxy(server: Server) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A proxy that takes the server for any machine, and the URLs and authorisations that it was asked with."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append((self.path, self.headers["Proxy-Authorization"]))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            response = ask(server.inference + urlsplit(self.path).path, body, {"Content-Type": "video/mp4"})
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            self.wfile.write(response.body)

        do_POST = do_PUT  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_a_job_and_doctor_reach_another_machine_through_the_proxy(
    proxy: tuple[str, list[tuple[str, str | None]]], environment: Callable[..., None], tmp_path: Path
) -> None:
    where, asked = proxy
    environment(http_proxy=f"http://me:p%40ss@{where}")
    assert main(["caption", str(CLIP), "--server", "http://captions.example", "--out", f"{tmp_path}/out.jsonl"]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines() if "video" in line]
    assert record["caption"] == EXAMPLES[CLIP.name]
    by_job = len(asked)
    assert main(["doctor", "--server", "http://captions.example"]) == 0
    assert by_job < len(asked)
    authorisation = f"Basic {b64encode(b'me:p@ss').decode()}"
    assert set(asked) == {("http://captions.example/predictions/etenet", authorisation)}
