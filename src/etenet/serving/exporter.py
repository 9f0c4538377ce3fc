"""GET /ready, /live and /metrics; and the page, with its requests for captions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

from etenet import metrics
from etenet.serving.config import Address
from etenet.serving.health import Health
from etenet.serving.page import HEADERS, page
from etenet.serving.relay import PATHS, Relay


@contextmanager
def exporter(health: Health, address: Address, figures: Path, relay: Relay) -> Iterator[None]:
    """Answer while the block runs. `figures` is the folder with the metrics of the workers."""
    files = page()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/ready":
                    fault = health.fault()
                    self._send_json(not fault, {"ready": not fault, **({"reason": fault} if fault else {})})
                case "/live":
                    live = health.live
                    self._send_json(live, {"live": live})
                case "/metrics":
                    self._send(
                        HTTPStatus.OK, metrics.exposition(figures, ready=not health.fault()), metrics.CONTENT_TYPE
                    )
                case path if file := files.get(path):
                    self._send(HTTPStatus.OK, file.content, file.content_type, HEADERS)
                case _:
                    self._send_error(HTTPStatus.NOT_FOUND, "try /, /ready, /live or /metrics")

        def do_PUT(self) -> None:
            if self.path not in PATHS:
                self.send_error(HTTPStatus.NOT_IMPLEMENTED)
                return
            self.close_connection = True  # the rest of a refused body is not read
            response = relay(self)
            with suppress(ConnectionError):  # a page that is closed, or sends another video, does not wait
                self._send(response.status, response.body, headers=response.headers)

        def do_POST(self) -> None:
            self.do_PUT()

        def send_error(self, code: int, *_: object, **__: object) -> None:
            """For a malformed request and an unknown method: JSON, where http.server would send HTML."""
            unknown = code == HTTPStatus.NOT_IMPLEMENTED
            status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
            self._send_error(status, "use GET" if unknown else status.phrase)

        def _send_error(self, status: HTTPStatus, message: str) -> None:
            error = {"code": status.name.lower(), "message": message}
            self._send(status, json.dumps({"error": error}).encode())

        def _send_json(self, good: bool, body: Mapping[str, object]) -> None:
            self._send(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(body).encode())

        def _send(
            self,
            status: int,
            body: bytes,
            content_type: str = "application/json",
            headers: Mapping[str, str] = MappingProxyType({}),
        ) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": content_type} | dict(headers)).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            if status == HTTPStatus.METHOD_NOT_ALLOWED:
                self.send_header("Allow", "GET")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Probes come every few seconds: none of them is logged."""

    server = ThreadingHTTPServer((address.host, address.port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="exporter", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
