"""Passes requests of the page, and chats, on to TorchServe where there is no nginx.

A browser lets a page ask only its own port, and TorchServe has no path for chats. Bodies pass through in small pieces,
and only a few at a time: this is no front end for many clients.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus

from etenet.errors import ERROR_HEADER
from etenet.serving import archive, chat
from etenet.serving.http import Head, error_response, headers_of, response_head
from etenet.serving.loopback import Address

_PREDICTIONS, _EXPLANATIONS = (f"/{kind}/{archive.MODEL_NAME}" for kind in ("predictions", "explanations"))
PATHS = {_PREDICTIONS: _PREDICTIONS, _EXPLANATIONS: _EXPLANATIONS, chat.PATH: _PREDICTIONS}  # and what they are there
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
        """The response to a request of which the head and the first bytes of the body have come.

        Of a response in pieces, what the client did not get yet.
        """
        length = head.headers.get("content-length", "")
        if not length.isdecimal():
            message = "the length of the video must be in the header"
            return _refusal(head, HTTPStatus.LENGTH_REQUIRED, message, code="bad_request")
        if int(length) > self._max_body_bytes:
            message = "the video is too large; send a shorter or smaller one"
            return _refusal(head, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="too_large")
        if self._running >= AT_ONCE:
            message = "the page is busy; try again in a moment"
            return _refusal(head, HTTPStatus.SERVICE_UNAVAILABLE, message, code="overloaded")
        self._running += 1
        try:
            return await self._passed_on(client, head, body, int(length))
        except TimeoutError:
            return _refusal(head, HTTPStatus.GATEWAY_TIMEOUT, "the video was not captioned in time; try again")
        except (OSError, EOFError, KeyError, ValueError, asyncio.LimitOverrunError, http.client.HTTPException):
            return _refusal(head, HTTPStatus.BAD_GATEWAY, "the captioner cannot be reached; try again in a moment")
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
            if head.path == chat.PATH:
                fields[chat.FORM_HEADER] = chat.FORM
            lines = [
                f"PUT {PATHS[head.path]} HTTP/1.1",
                *(f"{name}: {value}" for name, value in fields.items()),
                "",
                "",
            ]
            writer.write("\r\n".join(lines).encode("latin-1"))
            await _pass_body(client, writer, body[:length], length)
            async with asyncio.timeout(RESPONSE_DEADLINE_S):
                status, headers = await _head_of(reader)
                passed = {name: value for name in _PASSED_BACK if (value := headers.get(name.lower()))}
                passed = {"Content-Type": headers.get("content-type", "application/json"), **passed}
                if "content-length" in headers:
                    answer = await reader.readexactly(int(headers["content-length"]))
                    if head.path == chat.PATH and status >= 400 and ERROR_HEADER not in headers:  # TorchServe's own
                        code = "overloaded" if status == HTTPStatus.SERVICE_UNAVAILABLE else "internal_error"
                        message = "no caption was made; try again in a moment"
                        return _refusal(head, HTTPStatus(status), message, code=code)
                    return response_head(status, {**passed, "Content-Length": str(len(answer))}) + answer
            return await _pass_pieces(client, reader, response_head(status, {**passed, "Transfer-Encoding": "chunked"}))
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


async def _head_of(torchserve: asyncio.StreamReader) -> tuple[int, Mapping[str, str]]:
    """Status and headers of a response. Raises `EOFError` or `ValueError` if there is no whole head."""
    line, _, rest = (await torchserve.readuntil(b"\r\n\r\n")).partition(b"\n")
    return int(line.split()[1]), headers_of(rest)


async def _pass_pieces(client: socket.socket, torchserve: asyncio.StreamReader, piece: bytes) -> bytes:
    """Send the chunks of a response as they come, after its head; returns the last one, nothing if it breaks off.

    Source: RFC 9112, 7.1.
    """
    with suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        size = 1
        while size:
            async with asyncio.timeout(PIECE_DEADLINE_S):
                await asyncio.get_running_loop().sock_sendall(client, piece)
            async with asyncio.timeout(RESPONSE_DEADLINE_S):
                line = await torchserve.readuntil(b"\r\n")
                size = int(line.partition(b";")[0], 16)
                piece = line + await torchserve.readexactly(size + 2)
        return piece
    return b""


def _refusal(head: Head, status: HTTPStatus, message: str, *, code: str = "") -> bytes:
    more = chat.error_fields(status) if head.path == chat.PATH else {}
    return error_response(status, message, code=code, more=more)
