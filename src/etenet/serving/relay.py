"""Passes requests of the page, and chats, on to TorchServe where there is no nginx.

A browser lets a page ask only its own port, and TorchServe has no path for chats. Bodies pass through in small pieces,
and only a few at a time: this is no front end for many clients.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus

from etenet.errors import ERROR_HEADER
from etenet.serving import archive, chat, cors
from etenet.serving.http import Head, error_response, headers_of, response_head
from etenet.serving.loopback import Address
from etenet.serving.trace_context import REQUEST_ID_HEADER, TRACE_HEADER, TRACE_STATE_HEADER, TraceParent, request_id

METHODS = cors.METHODS
# What curl -T clip.mp4 adds to a path that ends with a slash is not looked at.
_PATH = re.compile(f"(/(?:predictions|explanations)/{archive.MODEL_NAME})(?:/[^/]*)?")
_OF_CHATS = f"/predictions/{archive.MODEL_NAME}"
# TorchServe's parser fails on a form without a boundary; nginx.conf has the same.
_FORM = re.compile(r'multipart/form-data.*boundary="?[^";\s].*', re.IGNORECASE)
_NO_QUERY = "options are headers, such as X-Etenet-Captions, or fields of a form; leave out what follows the ?"
AT_ONCE = 8
PIECE_DEADLINE_S, RESPONSE_DEADLINE_S = 10.0, 120.0  # as in deploy/nginx/nginx.conf
_RETRY_AFTER_S = {502: 5, 503: 1, 504: 1}  # likewise
# Of a body, from its start to any moment, as a slow one keeps others out; and of a response.
SLOWEST_BYTES_PER_S = 20_000
_PIECE_BYTES = 65536
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MOST_DIGITS = 18  # of a length: Python parses no number of thousands
_PASSED_ON = ("content-encoding", TRACE_HEADER, TRACE_STATE_HEADER)
_PASSED_BACK = (ERROR_HEADER.title(), "Retry-After", TRACE_HEADER)


def captions_at(path: str) -> str | None:
    """The path under which TorchServe captions what is sent to this one; None if it is no path for captions."""
    if path == chat.PATH:
        return _OF_CHATS
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
        """The response to a request of which the head and the first bytes of the body have come.

        Of a response in pieces, what the client did not get yet.
        """
        id = request_id(head.headers.get(REQUEST_ID_HEADER.lower(), "")) or str(uuid.uuid4())
        headers = {REQUEST_ID_HEADER: id, **cors.response_headers(self.cors_allowed_origin)}
        if trace := TraceParent.read(head.headers.get(TRACE_HEADER, "")):
            headers[TRACE_HEADER] = str(trace)
        refusal = partial(_refusal, head, headers)
        if head.query and head.path != chat.PATH:
            return refusal(HTTPStatus.BAD_REQUEST, _NO_QUERY)
        length = head.headers.get("content-length", "")
        if not length.isdecimal():
            message = "the request needs a Content-Length; send a whole file, for example with curl -T clip.mp4"
            return refusal(HTTPStatus.LENGTH_REQUIRED, message, "bad_request")
        if len(length) > _MOST_DIGITS or int(length) > self._max_body_bytes:
            message = f"the body is larger than {self._max_body_bytes / 2**20:.4g} MiB; send a shorter or smaller video"
            return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, "too_large")
        if self._running >= AT_ONCE:
            message = f"this port takes {AT_ONCE} requests at a time; try again in a moment"
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "overloaded")
        self._running += 1
        try:
            return await self._passed_on(client, head, headers, body, int(length))
        except TimeoutError:
            return refusal(HTTPStatus.GATEWAY_TIMEOUT, "the video was not captioned in time; try again")
        except (OSError, EOFError, LookupError, ValueError, asyncio.LimitOverrunError, http.client.HTTPException):
            return refusal(HTTPStatus.BAD_GATEWAY, "the captioner cannot be reached; try again in a moment")
        finally:
            self._running -= 1

    async def _passed_on(
        self, client: socket.socket, head: Head, headers: Mapping[str, str], body: bytes, length: int
    ) -> bytes:
        """What TorchServe responds, with these headers, and of a response in pieces what the client did not get yet."""
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
                "content-type": head.headers["content-type"] if _is_form(head) else "application/octet-stream",
                "host": f"{self._torchserve.host}:{self._torchserve.port}",
                REQUEST_ID_HEADER: headers[REQUEST_ID_HEADER],
            }
            if head.path == chat.PATH:
                fields[chat.FORM_HEADER] = chat.FORM
            path = captions_at(head.path)
            lines = [f"PUT {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
            writer.write("\r\n".join(lines).encode("latin-1"))
            if head.headers.get("expect", "").lower() == "100-continue":  # as curl says, which then waits for a second
                await asyncio.get_running_loop().sock_sendall(client, _CONTINUE)
            try:
                await _pass_body(client, writer, body[:length], length)
            except TimeoutError:
                message = "the video came too slowly; send a smaller one, or use a faster connection"
                return _refusal(head, headers, HTTPStatus.REQUEST_TIMEOUT, message)
            async with asyncio.timeout(RESPONSE_DEADLINE_S):
                status, of_answer = await _head_of(reader)
                passed = {name: value for name in _PASSED_BACK if (value := of_answer.get(name.lower()))}
                passed = {"Content-Type": of_answer.get("content-type", "application/json"), **headers, **passed}
                if "content-length" in of_answer:
                    answer = await reader.readexactly(int(of_answer["content-length"]))
                    if status >= 400 and ERROR_HEADER not in of_answer:
                        return _in_our_words(head, headers, status)
                    return response_head(status, {**passed, "Content-Length": str(len(answer))}) + answer
            return await _pass_pieces(client, reader, response_head(status, {**passed, "Transfer-Encoding": "chunked"}))
        finally:
            writer.close()


def _is_form(head: Head) -> bool:
    """Whether the body is a form. A chat is none, whatever its client declares."""
    return head.path != chat.PATH and bool(_FORM.fullmatch(head.headers.get("content-type", "")))


def _in_our_words(head: Head, headers: Mapping[str, str], status: int) -> bytes:
    """In place of an error of TorchServe's own, what nginx responds."""
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return _refusal(head, headers, HTTPStatus(status), "the server is busy; try again in a moment", "overloaded")
    if _is_form(head):
        message = "the form cannot be read; send the video as the body, or as its file field data"
        return _refusal(head, headers, HTTPStatus.BAD_REQUEST, message)
    message = "the captioner died while it worked on this clip; try again in a moment"
    return _refusal(head, headers, HTTPStatus.BAD_GATEWAY, message)


async def _pass_body(client: socket.socket, writer: asyncio.StreamWriter, piece: bytes, length: int) -> None:
    """Raises `TimeoutError` if a piece does not come in time, or all so far came too slowly."""
    loop = asyncio.get_running_loop()
    slowest_s = loop.time() + PIECE_DEADLINE_S  # by when as much would have come of the slowest body
    while True:
        writer.write(piece)
        length -= len(piece)
        slowest_s += len(piece) / SLOWEST_BYTES_PER_S
        async with asyncio.timeout_at(min(loop.time() + PIECE_DEADLINE_S, slowest_s)):
            await writer.drain()
            if not length:
                return
            piece = await loop.sock_recv(client, min(length, _PIECE_BYTES))
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


def _refusal(head: Head, headers: Mapping[str, str], status: HTTPStatus, message: str, code: str = "") -> bytes:
    more = chat.error_fields(status) if head.path == chat.PATH else {}
    retry = {"Retry-After": str(_RETRY_AFTER_S[status])} if status in _RETRY_AFTER_S else {}
    return error_response(status, message, code=code, headers={**headers, **retry}, more=more)
