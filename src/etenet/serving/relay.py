"""Passes requests of the page on to TorchServe where there is no nginx: a browser lets a page ask only its own port.

Bodies pass through in small pieces, and only a few at a time: this is no front end for clients.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from etenet.serving import archive

PATHS = frozenset(f"/{kind}/{archive.MODEL_NAME}" for kind in ("predictions", "explanations"))
AT_ONCE = 8
PIECE_DEADLINE_S, RESPONSE_DEADLINE_S = 10.0, 120.0  # as in deploy/nginx/nginx.conf
_PIECE_BYTES = 65536
_PASSED_BACK = ("Content-Type", "X-Request-Id", "X-Etenet-Error", "Retry-After")


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Relay:
    """Passes requests for captions on to TorchServe at `url`, with bodies of at most `max_body_bytes`."""

    def __init__(self, url: str, max_body_bytes: int) -> None:
        self._torchserve, self._max_body_bytes = urlsplit(url).netloc, max_body_bytes
        self._room = threading.BoundedSemaphore(AT_ONCE)

    def __call__(self, request: BaseHTTPRequestHandler) -> Response:
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal():
            return _refusal(HTTPStatus.LENGTH_REQUIRED, "bad_request", "the length of the video must be in the header")
        if int(length) > self._max_body_bytes:
            return _refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_large",
                "the video is too large; send a shorter or smaller one",
            )
        if not self._room.acquire(blocking=False):
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "the page is busy; try again in a moment")
        try:
            return self._passed_on(request, int(length))
        except TimeoutError:
            return _refusal(
                HTTPStatus.GATEWAY_TIMEOUT, "gateway_timeout", "the video was not captioned in time; try again"
            )
        except (OSError, http.client.HTTPException):
            return _refusal(
                HTTPStatus.BAD_GATEWAY, "bad_gateway", "the captioner cannot be reached; try again in a moment"
            )
        finally:
            self._room.release()

    def _passed_on(self, request: BaseHTTPRequestHandler, length: int) -> Response:
        request.connection.settimeout(PIECE_DEADLINE_S)
        connection = http.client.HTTPConnection(self._torchserve, timeout=RESPONSE_DEADLINE_S)
        options = {name: value for name, value in request.headers.items() if name.lower().startswith("x-etenet-")}
        headers = options | {
            "Accept": request.headers.get("Accept", "*/*"),
            "Content-Type": "application/octet-stream",
            "Content-Length": str(length),
        }
        try:
            connection.request("PUT", request.path, body=_pieces(request, length), headers=headers)
            response = connection.getresponse()
            back = {name: value for name in _PASSED_BACK if (value := response.headers.get(name))}
            return Response(response.status, back, response.read())
        finally:
            connection.close()


def _pieces(request: BaseHTTPRequestHandler, length: int) -> Iterator[bytes]:
    while length:
        piece = request.rfile.read(min(length, _PIECE_BYTES))
        if not piece:
            raise ConnectionAbortedError("the client went away")
        length -= len(piece)
        yield piece


def _refusal(status: HTTPStatus, code: str, message: str) -> Response:
    return Response(status, {}, json.dumps({"error": {"code": code, "message": message}}).encode())
