"""Passes requests of the page on to TorchServe where there is no nginx: a browser lets a page ask only its own port.

Bodies pass through in small pieces, and only a few at a time: this is no front end for clients.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import uuid
from http import HTTPStatus

from etenet.serving import archive, cors
from etenet.serving.http import Head, error_response, headers_of, response
from etenet.serving.loopback import Address
from etenet.serving.trace_context import REQUEST_ID_HEADER, TRACE_HEADER, TRACE_STATE_HEADER, TraceParent, request_id

METHODS = cors.METHODS
# What curl -T clip.mp4 adds to a path that ends with a slash is not looked at.
_PATH = re.compile(f"(/(?:predictions|explanations)/{archive.MODEL_NAME})(?:/[^/]*)?")
AT_ONCE = 8
PIECE_DEADLINE_S, RESPONSE_DEADLINE_S = 10.0, 120.0  # as in deploy/nginx/nginx.conf
_PIECE_BYTES = 65536
_PASSED_ON = ("content-encoding", TRACE_HEADER, TRACE_STATE_HEADER)
_PASSED_BACK = ("X-Etenet-Error", "Retry-After", TRACE_HEADER)

_Response = tuple[int, bytes, str, dict[str, str]]  # status, body, type of the body, other headers


def captions_at(path: str) -> str | None:
    """The path under which TorchServe captions what is sent to this one; None if it is no path for captions."""
    found = _PATH.fullmatch(path)
    return found[1] if found else None


class Relay:
    """Passes requests for captions on to TorchServe, with bodies of at most `max_body_bytes`.

    `cors_allowed_origin` is whose pages may ask, beside the server's own.
    """

    def __init__(self, torchserve: Address, max_body_bytes: int, cors_allowed_origin: str = "") -> None:
        self._torchserve, self._max_body_bytes = torchserve, max_body_bytes
        self.cors_allowed_origin = cors_allowed_origin
        self._running = 0

    async def __call__(self, client: socket.socket, head: Head, body: bytes) -> bytes:
        """The response to a request of which the head and the first bytes of the body have come."""
        id = request_id(head.headers.get(REQUEST_ID_HEADER.lower(), "")) or str(uuid.uuid4())
        headers = {REQUEST_ID_HEADER: id, **cors.response_headers(self.cors_allowed_origin)}
        if trace := TraceParent.read(head.headers.get(TRACE_HEADER, "")):
            headers[TRACE_HEADER] = str(trace)

        def refusal(status: HTTPStatus, message: str, code: str = "") -> bytes:
            return error_response(status, message, code=code, headers=headers)

        length = head.headers.get("content-length", "")
        if not length.isdecimal():
            return refusal(HTTPStatus.LENGTH_REQUIRED, "the length of the video must be in the header", "bad_request")
        if int(length) > self._max_body_bytes:
            message = "the video is too large; send a shorter or smaller one"
            return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, "too_large")
        if self._running >= AT_ONCE:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the page is busy; try again in a moment", "overloaded")
        self._running += 1
        try:
            status, answer, content_type, passed_back = await self._passed_on(client, head, id, body, int(length))
            return response(status, answer, content_type, headers | passed_back)
        except TimeoutError:
            return refusal(HTTPStatus.GATEWAY_TIMEOUT, "the video was not captioned in time; try again")
        except (OSError, EOFError, KeyError, ValueError, asyncio.LimitOverrunError, http.client.HTTPException):
            return refusal(HTTPStatus.BAD_GATEWAY, "the captioner cannot be reached; try again in a moment")
        finally:
            self._running -= 1

    async def _passed_on(self, client: socket.socket, head: Head, id: str, body: bytes, length: int) -> _Response:
        """What TorchServe responds."""
        reader, writer = await asyncio.open_connection(self._torchserve.host, self._torchserve.port)
        try:
            fields = {
                name: value
                for name, value in head.headers.items()
                if name.startswith("x-etenet-") or name in _PASSED_ON
            } | {
                "accept": head.headers.get("accept", "*/*"),
                "connection": "close",
                "content-length": str(length),
                "content-type": "application/octet-stream",
                "host": f"{self._torchserve.host}:{self._torchserve.port}",
                REQUEST_ID_HEADER: id,
            }
            path = captions_at(head.path)
            lines = [f"PUT {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
            writer.write("\r\n".join(lines).encode("latin-1"))
            await _pass_body(client, writer, body[:length], length)
            async with asyncio.timeout(RESPONSE_DEADLINE_S):
                return await _response_of(reader)
        finally:
            writer.close()


async def _pass_body(client: socket.socket, writer: asyncio.StreamWriter, piece: bytes, length: int) -> None:
    while True:
        writer.write(piece)
        length -= len(piece)
        async with asyncio.timeout(PIECE_DEADLINE_S):
            await writer.drain()
            if not length:
                return
            piece = await asyncio.get_running_loop().sock_recv(client, min(length, _PIECE_BYTES))
        if not piece:
            raise ConnectionAbortedError("the client went away")


async def _response_of(torchserve: asyncio.StreamReader) -> _Response:
    """Raises `EOFError` or `ValueError` if it is no whole response."""
    head = await torchserve.readuntil(b"\r\n\r\n")
    line, _, rest = head.partition(b"\n")
    headers = headers_of(rest)
    body = await torchserve.readexactly(int(headers["content-length"]))
    passed = {name: value for name in _PASSED_BACK if (value := headers.get(name.lower()))}
    return int(line.split()[1]), body, headers.get("content-type", "application/json"), passed
