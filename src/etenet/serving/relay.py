"""Passes requests of the page on to TorchServe where there is no nginx: a browser lets a page ask only its own port.

Bodies pass through in small pieces, and only a few at a time: this is no front end for clients.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from http import HTTPStatus

from etenet.serving import archive
from etenet.serving.http import Head, error_response, headers_of, response
from etenet.serving.loopback import Address

PATHS = frozenset(f"/{kind}/{archive.MODEL_NAME}" for kind in ("predictions", "explanations"))
METHODS = ("PUT", "POST")
AT_ONCE = 8
PIECE_DEADLINE_S, RESPONSE_DEADLINE_S = 10.0, 120.0  # as in deploy/nginx/nginx.conf
_PIECE_BYTES = 65536
_PASSED_BACK = ("X-Request-Id", "X-Etenet-Error", "Retry-After")


class Relay:
    """Passes requests for captions on to TorchServe, with bodies of at most `max_body_bytes`."""

    def __init__(self, torchserve: Address, max_body_bytes: int) -> None:
        self._torchserve, self._max_body_bytes = torchserve, max_body_bytes
        self._running = 0

    async def __call__(self, client: socket.socket, head: Head, body: bytes) -> bytes:
        """The response to a request of which the head and the first bytes of the body have come."""
        length = head.headers.get("content-length", "")
        if not length.isdecimal():
            message = "the length of the video must be in the header"
            return error_response(HTTPStatus.LENGTH_REQUIRED, message, code="bad_request")
        if int(length) > self._max_body_bytes:
            message = "the video is too large; send a shorter or smaller one"
            return error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="too_large")
        if self._running >= AT_ONCE:
            message = "the page is busy; try again in a moment"
            return error_response(HTTPStatus.SERVICE_UNAVAILABLE, message, code="overloaded")
        self._running += 1
        try:
            return await self._passed_on(client, head, body, int(length))
        except TimeoutError:
            return error_response(HTTPStatus.GATEWAY_TIMEOUT, "the video was not captioned in time; try again")
        except (OSError, EOFError, KeyError, ValueError, asyncio.LimitOverrunError, http.client.HTTPException):
            return error_response(HTTPStatus.BAD_GATEWAY, "the captioner cannot be reached; try again in a moment")
        finally:
            self._running -= 1

    async def _passed_on(self, client: socket.socket, head: Head, body: bytes, length: int) -> bytes:
        reader, writer = await asyncio.open_connection(self._torchserve.host, self._torchserve.port)
        try:
            fields = {name: value for name, value in head.headers.items() if name.startswith("x-etenet-")} | {
                "accept": head.headers.get("accept", "*/*"),
                "connection": "close",
                "content-length": str(length),
                "content-type": "application/octet-stream",
                "host": f"{self._torchserve.host}:{self._torchserve.port}",
            }
            lines = [f"PUT {head.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
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


async def _response_of(torchserve: asyncio.StreamReader) -> bytes:
    """Raises `EOFError` or `ValueError` if it is no whole response."""
    head = await torchserve.readuntil(b"\r\n\r\n")
    line, _, rest = head.partition(b"\n")
    headers = headers_of(rest)
    body = await torchserve.readexactly(int(headers["content-length"]))
    passed = {name: value for name in _PASSED_BACK if (value := headers.get(name.lower()))}
    return response(int(line.split()[1]), body, headers.get("content-type", "application/json"), passed)
