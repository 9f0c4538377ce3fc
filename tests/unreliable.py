"""A server that fails on purpose, in front of one that works."""

from __future__ import annotations

import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.conftest import Server, ask


class Unreliable:
    """A proxy that refuses half of the requests and drops some. Counts responses and the most requests in flight."""

    def __init__(self, upstream: Server, port: int) -> None:
        self.max_in_flight, self.responses = 0, 0
        now, lock, rng = 0, threading.Lock(), random.Random(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                nonlocal now
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    now += 1
                    outer.max_in_flight = max(outer.max_in_flight, now)
                    chance = rng.random()
                try:
                    if chance < 0.1:
                        self.close_connection = True
                        self.connection.close()
                        return
                    response = None if chance < 0.6 else ask(upstream.predictions, body)
                    status, content = (response.status, response.body) if response else (503, b"{}")
                finally:
                    with lock:
                        now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 503:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(content)
                outer.responses += response is not None

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
