"""TorchServe's port, the exporter's and nginx's: the same request is understood alike at each door to a caption."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.rig.servers import config_on_free_ports
from etenet.serving import cors
from etenet.serving.chat import PATH
from tests.browser import browser, open_tab
from tests.conftest import EXAMPLES, REPOSITORY, Server, running_server, wait_until
from tests.front import CONFIGURATION, edit, nginx

NAME, CAPTION = next(iter(EXAMPLES.items()))
CLIP = REPOSITORY / "examples" / NAME
NAMES = ("torchserve", "exporter", "nginx")
PATHS = ("/predictions/etenet", "/explanations/etenet")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def log_of_nginx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nginx") / "log"


@pytest.fixture(scope="module")
def doors(server: Server, log_of_nginx: Path) -> Iterator[Mapping[str, str]]:
    def log_there(folder: Path) -> None:
        edit(folder / "nginx.conf", "access_log /dev/stdout", f"access_log {log_of_nginx}")

    with nginx(port_of(server.inference), log_there) as port:
        yield {"torchserve": server.inference, "exporter": server.exporter, "nginx": f"http://127.0.0.1:{port}"}


@pytest.fixture(scope="module", params=NAMES)
def door(request: pytest.FixtureRequest, doors: Mapping[str, str]) -> str:
    return doors[request.param]


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def sent(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, method: str = "PUT"
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of the response."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, parts.path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def curl(*arguments: str | Path) -> dict[str, object]:
    """The response of JSON to a command."""
    command = ["curl", "--silent", "--noproxy", "*", *map(str, arguments)]
    answer: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return answer


def test_curl_may_add_the_name_of_its_file_to_the_path(door: str, tmp_path: Path) -> None:
    named = tmp_path / "a clip? 100% ü.mp4"
    named.write_bytes(CLIP.read_bytes())
    for file, path in zip((CLIP, named), PATHS, strict=True):
        answer = curl("-T", file, f"{door}{path}/")
        assert answer.get("caption") == CAPTION, answer


def test_a_body_that_curl_declares_a_form_is_captioned(door: str) -> None:
    assert curl("--data-binary", f"@{CLIP}", door + PATHS[0])["caption"] == CAPTION


@pytest.mark.parametrize("field", ["data", "file", "video"])
def test_the_video_may_be_in_each_of_three_fields(door: str, field: str) -> None:
    answer = curl("-F", f"{field}=@{CLIP}", "-F", "captions=2", door + PATHS[0])
    assert answer.get("caption") == CAPTION, answer


def test_a_misspelt_option_is_refused_by_name(door: str) -> None:
    status, _, body = sent(door + PATHS[0], b"video", {"X-Etenet-Beam-Sise": "3"})
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (400, "bad_option")
    assert error["message"] == "there is no header X-Etenet-Beam-Sise; the nearest one is X-Etenet-Beam-Size"


def test_the_clients_id_and_trace_are_in_the_response_and_in_the_logs(
    door: str, server: Server, log_of_nginx: Path, request: pytest.FixtureRequest
) -> None:
    id, trace = f"job-7/{request.node.callspec.params['door']}:1", f"00-{TRACE}-{SPAN}-00"
    status, headers, _ = sent(door + PATHS[0], b"no video", {"X-Request-Id": id, "traceparent": trace})
    assert (status, headers.get_all("X-Request-Id"), headers.get_all("traceparent")) == (415, [id], [trace])
    wait_until(lambda: f"request_id={id} trace_id={TRACE} status=415" in server.log.read_text(), 5)
    if door not in (server.inference, server.exporter):
        wait_until(lambda: f'id {id}, trace "{trace}"' in log_of_nginx.read_text(), 5)


def test_an_id_that_is_unfit_is_replaced_and_a_trace_left_out(door: str, server: Server) -> None:
    unfit = {"X-Request-Id": "a b", "traceparent": f"00-{TRACE}-{SPAN}"}
    _, headers, _ = sent(door + PATHS[0], b"no video", unfit)
    (id,) = headers.get_all("X-Request-Id")
    assert id != "a b"
    assert "traceparent" not in headers
    wait_until(lambda: f"request_id={id} status=415" in server.log.read_text(), 5)


def test_an_error_that_the_front_made_itself_has_the_id_and_the_trace(doors: Mapping[str, str]) -> None:
    ours = {"X-Request-Id": "mine", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    too_large = {**ours, "Content-Length": str(2 * 10**9)}
    for name in ("exporter", "nginx"):
        status, headers, _ = sent(doors[name] + PATHS[0], b"", too_large)
        assert (status, {key: headers[key] for key in ours}) == (413, ours)
    with nginx(1) as port:
        status, headers, _ = sent(f"http://127.0.0.1:{port}{PATHS[0]}", b"video", ours)
        assert (status, {key: headers[key] for key in ours}) == (502, ours)


def test_the_page_answers_head_as_get_without_the_body(doors: Mapping[str, str]) -> None:
    for name in ("exporter", "nginx"):
        get, head = (sent(f"{doors[name]}/", method=method) for method in ("GET", "HEAD"))
        assert (head[0], head[2]) == (200, b"")
        assert {**head[1], "Date": ""} == {**get[1], "Date": ""}
        assert int(head[1]["Content-Length"]) == len(get[2])


class Collector(ThreadingHTTPServer):
    """Takes spans as a collector of OpenTelemetry does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                received = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                of_resources = [scope for each in received.resource_spans for scope in each.scope_spans]
                collector.spans += [span for scope in of_resources for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def open_doors(
    doors: Mapping[str, str], small_checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """Those of a server that lets the pages of the other one's nginx in, and sends spans."""
    config = config_on_free_ports(tmp_path_factory.mktemp("open"))
    with config.open("a") as file:
        file.write(f"cors_allowed_origin={doors['nginx']}\n")

    def let_in(folder: Path) -> None:
        edit(folder / "listen.conf", '$cors_allowed_origin ""', f'$cors_allowed_origin "{doors["nginx"]}"')

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with (
            running_server("--checkpoint", str(small_checkpoint), config=config) as server,
            nginx(port_of(server.inference), let_in) as port,
        ):
            yield {"torchserve": server.inference, "exporter": server.exporter, "nginx": f"http://127.0.0.1:{port}"}


def of_cors(headers: http.client.HTTPMessage) -> dict[str, list[str]]:
    names = {name.lower() for name in headers if name.lower().startswith("access-control-")}
    return {name: headers.get_all(name, []) for name in names}


def test_no_other_origin_may_ask_unless_it_is_let_in(door: str) -> None:
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "PUT"}
    for method, path in (("OPTIONS", PATHS[0]), ("PUT", PATHS[0]), ("GET", PATHS[0]), ("GET", "/")):
        _, headers, _ = sent(door + path, b"" if method == "PUT" else None, asked, method)
        assert not of_cors(headers)


@pytest.mark.parametrize("name", NAMES)
def test_the_origin_that_is_let_in_may_ask(open_doors: Mapping[str, str], doors: Mapping[str, str], name: str) -> None:
    origin, door = doors["nginx"], open_doors[name]
    asked = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
    status, headers, _ = sent(door + PATHS[1], None, asked, "OPTIONS")
    assert 200 <= status < 300
    allowed = {key: values for key, (values,) in of_cors(headers).items()}
    assert allowed["access-control-allow-origin"] == origin
    assert allowed["access-control-allow-methods"] == "PUT, POST"
    assert allowed["access-control-allow-headers"] == ", ".join(cors.REQUEST_HEADERS)
    for body, expected in ((CLIP.read_bytes(), 200), (b"no video", 415)):
        status, headers, _ = sent(door + PATHS[0], body, {"Origin": origin})
        assert status == expected
        assert of_cors(headers)["access-control-allow-origin"] == [origin]
        assert of_cors(headers)["access-control-expose-headers"] == [cors.EXPOSED]


def test_a_browser_lets_pages_of_that_origin_ask_and_no_others(
    open_doors: Mapping[str, str], doors: Mapping[str, str]
) -> None:
    """The page is a 404 of nginx, which has no policy of its own."""

    def question(door: str) -> str:
        headers = {"Content-Type": "video/mp4", "X-Etenet-Captions": "2", "X-Request-Id": "mine"}
        options = json.dumps({"method": "PUT", "headers": headers, "body": "no video"})
        seen = "answer => [answer.status, answer.headers.get('X-Request-Id'), answer.headers.get('X-Etenet-Error')]"
        return f"fetch('{door}{PATHS[0]}', {options}).then({seen}, String)"

    def questions_of_chats(door: str) -> list[str]:
        headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-Stainless-Lang": "js"}
        asked = {"/v1/models": {"headers": headers}, PATH: {"method": "POST", "headers": headers, "body": "{}"}}
        return [
            f"fetch('{door}{path}', {json.dumps(options)}).then(answer => answer.status, String)"
            for path, options in asked.items()
        ]

    with browser() as chromium, open_tab(chromium, f"{doors['nginx']}/elsewhere") as tab:
        for name in NAMES:
            assert tab.evaluate(question(open_doors[name])) == [415, "mine", "not_a_video"]
        for name in ("exporter", "nginx"):
            assert [tab.evaluate(each) for each in questions_of_chats(open_doors[name])] == [200, 404]
        for name in ("torchserve", "exporter"):
            assert "Failed to fetch" in tab.evaluate(question(doors[name]))


def test_nginx_lets_in_what_the_server_lets_in() -> None:
    configuration = (CONFIGURATION / "nginx.conf").read_text()
    for value in (", ".join(cors.METHODS), ", ".join(cors.REQUEST_HEADERS), cors.EXPOSED):
        assert f' "{value}";' in configuration
    assert f"1 {cors.PREFLIGHT_AGE_S};" in configuration
    hidden = {*re.findall(r"proxy_hide_header (\S+);", configuration)}
    added = re.findall(r"\n        add_header (\S+) ", configuration)
    assert {"X-Request-Id", "traceparent", *(name for name in added if "Control-Allow" in name)} <= hidden


def test_the_stages_of_a_request_reach_the_collector_as_spans_of_the_clients_trace(
    open_doors: Mapping[str, str], collector: Collector
) -> None:
    status, headers, _ = sent(
        open_doors["nginx"] + PATHS[0], CLIP.read_bytes(), {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    )
    version, trace, outer, flags = headers["traceparent"].split("-")
    assert (status, version, trace, flags) == (200, "00", TRACE, "01")
    assert outer != SPAN

    def inside(parent: str) -> list[Span]:
        return [span for span in collector.spans if span.parent_span_id.hex() == parent]

    wait_until(lambda: bool(inside(SPAN)), 10)
    assert {span.name for span in inside(outer)} == {"queue", "decode", "encode", "search"}
    assert [(span.name, span.span_id.hex()) for span in inside(SPAN)] == [("/predictions/etenet", outer)]
    assert {span.trace_id.hex() for span in inside(outer) + inside(SPAN)} == {TRACE}
