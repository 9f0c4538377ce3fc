"""GET /ready, /live and /metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from etenet import metrics
from etenet.serving.health import Health
from etenet.serving.loopback import Address


@contextmanager
def exporter(health: Health, address: Address, figures: Path) -> Iterator[None]:
    """Answer while the block runs. `figures` is the folder with the metrics of the workers."""

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
                case _:
                    error = {"code": "not_found", "message": "try /ready, /live or /metrics"}
                    self._send(HTTPStatus.NOT_FOUND, json.dumps({"error": error}).encode())

        def send_error(self, code: int, *_: object, **__: object) -> None:
            """For a malformed request and an unknown method: JSON, where http.server would send HTML."""
            unknown = code == HTTPStatus.NOT_IMPLEMENTED
            status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
            error = {"code": status.name.lower(), "message": "use GET" if unknown else status.phrase}
            self._send(status, json.dumps({"error": error}).encode())

        def _send_json(self, good: bool, body: Mapping[str, object]) -> None:
            self._send(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(body).encode())

        def _send(self, status: HTTPStatus, body: bytes, content_type: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
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
