"""GET /ready, /live and /metrics; the page, with its requests for captions; and chats.

Whoever reaches the port may open any number of connections and send nothing, or send slowly. So few are open at a time,
each for a short time, and the oldest gives way to a new one: a probe sends its request at once and is answered at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from etenet import metrics
from etenet.serving import cors
from etenet.serving.chat import MODELS
from etenet.serving.health import Health
from etenet.serving.http import END_OF_HEAD, Head, error_response, json_response, response, without_body
from etenet.serving.loopback import Address
from etenet.serving.page import HEADERS, page
from etenet.serving.relay import METHODS, SLOWEST_BYTES_PER_S, Relay, captions_at

_log = logging.getLogger(__name__)

DEADLINE_S = 2.0  # of a connection, from its first byte to its last; the relay has its own
MAX_CONNECTIONS = 64  # that have not sent their request yet, and as many that are answered
MAX_HEAD_BYTES = 8192
_BACKLOG = 4096  # connections that the kernel keeps; the kernel drops what does not fit, and its client waits a second
_RETRY_S = 0.05
_PIECE_BYTES = 2**16

_Places = dict["asyncio.Task[None]", None]  # oldest first


@contextmanager
def exporter(health: Health, address: Address, figures: Path, relay: Relay) -> Iterator[None]:
    """Answer while the block runs. `figures` is the folder with the metrics of the workers."""
    loop = asyncio.new_event_loop()
    with (
        socket.create_server((address.host, address.port), backlog=_BACKLOG) as listener,
        ThreadPoolExecutor(1, thread_name_prefix="metrics") as reader,
    ):
        listener.setblocking(False)
        answering = loop.create_task(_Exporter(health, figures, reader, relay).accept(listener))
        thread = threading.Thread(target=_run, args=(loop, answering), name="exporter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(answering.cancel)
            thread.join()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


class _Exporter:
    def __init__(self, health: Health, figures: Path, reader: ThreadPoolExecutor, relay: Relay) -> None:
        self._health, self._figures, self._reader, self._relay = health, figures, reader, relay
        self._files = page()
        self._paths = {"/ready", "/live", "/metrics", *MODELS, *self._files}
        self._silent: _Places = {}
        self._answered: _Places = {}

    async def accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError:  # no descriptor is left, or the client has gone
                    await asyncio.sleep(_RETRY_S)
                    continue
                group.create_task(self._serve(connection))
                await asyncio.sleep(0)  # the new connection is read before the next is accepted

    async def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                await self._answer_on(connection)
        except Exception:  # it must not end the others
            _log.exception("a connection to the port of probes was closed because of a bug")

    async def _answer_on(self, connection: socket.socket) -> None:
        async with asyncio.timeout(DEADLINE_S) as deadline:
            with _place(self._silent):
                received = await _until_end_of_head(connection)
            end = END_OF_HEAD.search(received)
            head = Head.read(received[: end.end()]) if end else None
            if end and head and captions_at(head.path) and head.method in METHODS:
                deadline.reschedule(None)
                answer = await self._relay(connection, head, received[end.end() :])
                send_s = DEADLINE_S + len(answer) / SLOWEST_BYTES_PER_S
                deadline.reschedule(asyncio.get_running_loop().time() + send_s)
                with _place(self._answered):
                    await _send(connection, answer)
            elif received:
                with _place(self._answered):
                    await _send(connection, await self._response(head, too_long=not end))

    async def _response(self, head: Head | None, *, too_long: bool) -> bytes:
        try:
            answer = await self._answer(head, too_long=too_long)
        except Exception:  # one request must not end the others
            _log.exception("a request to the port of probes failed because of a bug")
            bug = "the request failed because of a bug in the server; its log says why"
            answer = error_response(HTTPStatus.INTERNAL_SERVER_ERROR, bug, code="internal_error")
        return without_body(answer) if head and head.method == "HEAD" else answer

    async def _answer(self, head: Head | None, *, too_long: bool) -> bytes:
        if too_long:
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return error_response(too_large, "the headers are too long; send fewer or shorter ones", code="bad_request")
        if not head:
            return error_response(HTTPStatus.BAD_REQUEST, "this is not a request that the server understands")
        if head.method == "OPTIONS" and self._relay.cors_allowed_origin:
            return response(HTTPStatus.OK, b"", headers=cors.preflight_headers(self._relay.cors_allowed_origin))
        if captions_at(head.path):
            return _not_allowed("send the video with PUT or POST", METHODS)
        if head.method not in ("GET", "HEAD") and head.path in self._paths:
            return _not_allowed("use GET", ("GET", "HEAD"))
        match head.path:
            case "/ready":
                fault = self._health.fault
                return _health(not fault, {"ready": not fault, **({"reason": fault} if fault else {})})
            case "/live":
                live = self._health.live
                return _health(live, {"live": live})
            case "/metrics":
                # In a thread of its own: it reads files, and no probe should wait for that.
                text = await asyncio.get_running_loop().run_in_executor(self._reader, self._exposition)
                return response(HTTPStatus.OK, text, metrics.CONTENT_TYPE)
            case path if path in MODELS:
                return json_response(
                    HTTPStatus.OK, MODELS[path], cors.response_headers(self._relay.cors_allowed_origin)
                )
            case path if file := self._files.get(path):
                headers = HEADERS | cors.response_headers(self._relay.cors_allowed_origin)
                return response(HTTPStatus.OK, file.content, file.content_type, headers)
        return error_response(
            HTTPStatus.NOT_FOUND, "try /, /ready, /live or /metrics, or send a video to /predictions/etenet"
        )

    def _exposition(self) -> bytes:
        return metrics.exposition(self._figures, ready=not self._health.fault)


@contextmanager
def _place(taken: _Places) -> Iterator[None]:
    """One of `MAX_CONNECTIONS` places for the current task, from which the oldest is cancelled if none is free."""
    task = asyncio.current_task()
    assert task
    if len(taken) >= MAX_CONNECTIONS:
        oldest = next(iter(taken))
        del taken[oldest]
        oldest.cancel()
    taken[task] = None
    try:
        yield
    finally:
        taken.pop(task, None)


async def _until_end_of_head(connection: socket.socket) -> bytes:
    """What has come, with the end of the head in it unless the head is too long; nothing if the client has gone."""
    received = b""
    while not END_OF_HEAD.search(received) and len(received) <= MAX_HEAD_BYTES:
        piece = await asyncio.get_running_loop().sock_recv(connection, MAX_HEAD_BYTES)
        if not piece:
            return b""
        received += piece
    return received


async def _send(connection: socket.socket, answer: bytes) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, answer)
    connection.shutdown(socket.SHUT_WR)
    while await loop.sock_recv(connection, _PIECE_BYTES):
        pass  # closing a connection with unread bytes would take the response back


def _not_allowed(message: str, methods: Sequence[str]) -> bytes:
    return error_response(HTTPStatus.METHOD_NOT_ALLOWED, message, headers={"Allow": ", ".join(methods)})


def _health(good: bool, body: dict[str, object]) -> bytes:
    return json_response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, body)
