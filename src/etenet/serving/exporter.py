"""GET /ready, /live and /metrics.

Whoever reaches the port may open any number of connections and send nothing, or send slowly. So few are open at a time,
each for a short time, and the oldest gives way to a new one: a probe sends its request at once and is answered at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from etenet import metrics
from etenet.serving.config import Address
from etenet.serving.health import Health

_log = logging.getLogger(__name__)

DEADLINE_S = 2.0  # of a connection, from its first byte to its last
MAX_CONNECTIONS = 64  # that have not sent their request yet, and as many that are answered
MAX_HEAD_BYTES = 8192
_BACKLOG = 4096  # connections that the kernel keeps; the kernel drops what does not fit, and its client waits a second
_RETRY_S = 0.05
_PIECE_BYTES = 2**16

# Source: RFC 9112, 3. A method is a token (RFC 9110, 5.6.2).
_REQUEST_LINE = re.compile(rb"([\w!#$%&'*+.^`|~-]+) (\S+) HTTP/1\.[01]\r?\n")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")

_Places = dict["asyncio.Task[None]", None]  # oldest first


@contextmanager
def exporter(health: Health, address: Address, figures: Path) -> Iterator[None]:
    """Answer while the block runs. `figures` is the folder with the metrics of the workers."""
    loop = asyncio.new_event_loop()
    with (
        socket.create_server((address.host, address.port), backlog=_BACKLOG) as listener,
        ThreadPoolExecutor(1, thread_name_prefix="metrics") as reader,
    ):
        listener.setblocking(False)
        answering = loop.create_task(_Exporter(health, figures, reader).accept(listener))
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
    def __init__(self, health: Health, figures: Path, reader: ThreadPoolExecutor) -> None:
        self._health, self._figures, self._reader = health, figures, reader
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
        loop = asyncio.get_running_loop()
        with connection, suppress(OSError):
            async with asyncio.timeout(DEADLINE_S):
                head = b""
                with _place(self._silent):
                    while not _END_OF_HEAD.search(head) and len(head) <= MAX_HEAD_BYTES:
                        piece = await loop.sock_recv(connection, MAX_HEAD_BYTES)
                        if not piece:
                            return
                        head += piece
                with _place(self._answered):
                    await loop.sock_sendall(connection, await self._response(head))
                    connection.shutdown(socket.SHUT_WR)
                    while await loop.sock_recv(connection, _PIECE_BYTES):
                        pass  # closing a connection with unread bytes would take the response back

    async def _response(self, head: bytes) -> bytes:
        try:
            return await self._answer(head)
        except Exception:  # one request must not end the others
            _log.exception("a request to the port of probes failed because of a bug")
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _answer(self, head: bytes) -> bytes:
        if len(head) > MAX_HEAD_BYTES:
            return _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        line = _REQUEST_LINE.match(head)
        if not line:
            return _error(HTTPStatus.BAD_REQUEST)
        method, target = line.groups()
        if method != b"GET":
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, "use GET", has_body=method != b"HEAD")
        match target.partition(b"?")[0]:
            case b"/ready":
                fault = self._health.fault
                return _json(not fault, {"ready": not fault, **({"reason": fault} if fault else {})})
            case b"/live":
                live = self._health.live
                return _json(live, {"live": live})
            case b"/metrics":
                # In a thread of its own: it reads files, and no probe should wait for that.
                text = await asyncio.get_running_loop().run_in_executor(self._reader, self._exposition)
                return _response(HTTPStatus.OK, text, metrics.CONTENT_TYPE)
        return _error(HTTPStatus.NOT_FOUND, "try /ready, /live or /metrics")

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


def _error(status: HTTPStatus, message: str = "", *, has_body: bool = True) -> bytes:
    body = json.dumps({"error": {"code": status.name.lower(), "message": message or status.phrase}})
    return _response(status, body.encode() if has_body else b"")


def _json(good: bool, body: Mapping[str, object]) -> bytes:
    return _response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(body).encode())


def _response(status: HTTPStatus, body: bytes, content_type: str = "application/json") -> bytes:
    allow = "Allow: GET\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"{allow}Connection: close\r\n\r\n"
    )
    return head.encode() + body
