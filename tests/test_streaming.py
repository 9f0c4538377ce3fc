"""Responses in pieces: each caption of a long video as soon as it is there, through every door."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from etenet.captioning.captioner import Captioner
from tests.conftest import EXAMPLES, REPOSITORY, Response, Server, ask, wait_until
from tests.front import behind_nginx, nginx
from tests.test_handler import Context, handler, unpacked  # noqa: F401  (fixtures)
from tests.test_relay import relayed_to, serving
from tests.test_segments import FILM, PART_S

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CAPTION = next(iter(EXAMPLES.values()))
LONG = {"X-Etenet-Segment-S": "1.25"}  # 14 segments
SHORT = {"X-Etenet-Segment-S": str(PART_S)}  # 6
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
PATH = "/predictions/etenet"


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


@pytest.fixture(scope="module", params=["TorchServe", "nginx", "exporter"])
def door(request: pytest.FixtureRequest, server: Server, front: Server) -> str:
    return {"TorchServe": server.inference, "nginx": front.inference, "exporter": server.exporter}[request.param]


def parsed(media_type: str, body: bytes) -> list[tuple[str, Any]]:
    """The pieces and their names. JSON lines have none: it is told by what they hold."""
    if media_type == LINES:
        pieces = [json.loads(line) for line in body.splitlines()]
        names = {"start_s": "segment", "timing_ms": "end", "error": "error"}
        return [(next(names[key] for key in piece if key in names), piece) for piece in pieces]
    events = [event.split("\n") for event in body.decode().split("\n\n")[:-1]]
    assert all(len(lines) == 2 for lines in events)
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


@contextmanager
def streaming(url: str, media_type: str = LINES) -> Iterator[http.client.HTTPResponse]:
    """A response to the film of which the body is still to be read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"Accept": media_type, "Content-Type": "video/mp4", **LONG}
    try:
        connection.request("PUT", PATH, FILM, headers)
        yield connection.getresponse()
    finally:
        connection.close()


def test_the_pieces_are_the_response_that_comes_at_once(server: Server, door: str) -> None:
    media_type = LINES if door == server.exporter else EVENTS
    whole = ask(server.predictions, FILM, SHORT).json()
    response = ask(door + PATH, FILM, {**SHORT, "Accept": media_type})
    assert (response.status, response.content_type) == (200, media_type)
    assert response.request_id
    *pieces, (name, last) = parsed(media_type, response.body)
    assert pieces == [("segment", segment) for segment in whole["segments"]]
    assert name == "end"
    assert {**last, "timing_ms": 0} == {"video": whole["video"], "model": whole["model"], "timing_ms": 0}


def test_a_clip_is_its_only_segment_and_may_be_explained(server: Server) -> None:
    url = f"{server.inference}/explanations/etenet"
    whole = ask(url, CLIP).json()
    (_, segment), (name, _) = parsed(EVENTS, ask(url, CLIP, {"Accept": EVENTS}).body)
    assert (name, segment["captions"]) == ("end", whole["captions"])


@pytest.mark.parametrize(("body", "status"), [(b"no video", 415), (CLIP[:3000], 422), (b"", 400)])
def test_an_error_before_the_first_caption_has_its_status(door: str, body: bytes, status: int) -> None:
    response = ask(door + PATH, body, {**LONG, "Accept": EVENTS})
    assert (response.status, response.content_type) == (status, "application/json")
    assert response.json()["error"]


def test_a_response_breaks_off_when_its_worker_dies_and_is_never_taken_for_a_whole_one(
    server: Server, door: str
) -> None:
    worker = server.worker()
    assert worker
    with streaming(door) as response:
        first = json.loads(response.readline())
        worker.send_signal(signal.SIGKILL)
        assert first["start_s"] == 0  # so it came before the last, as the rest shows
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    wait_until(lambda: bool(server.worker()), 60)
    wait_until(lambda: server.caption(CLIP).status == 200, 60)


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """The worker is stopped: it gets the first request of the block, and the others wait for it and make a batch."""
    worker = server.worker()
    assert worker
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


def pending(server: Server) -> int:
    (model,) = ask(f"{server.management}/models/etenet").json()
    return int(model["jobQueueStatus"]["pendingRequests"])


def test_a_batch_may_have_responses_of_every_kind(server: Server) -> None:
    kinds: Sequence[tuple[bytes, dict[str, str]]] = [
        (CLIP, {}),
        (FILM, {**SHORT, "Accept": LINES}),
        (b"no video", {"Accept": EVENTS}),
        (CLIP, {"Accept": "text/plain"}),
        (CLIP, {"Accept": EVENTS}),
        (FILM[:5000], LONG),
    ]

    def told(response: Response) -> tuple[int, str, bytes]:
        text = response.body.decode().partition('"timing_ms"')[0]
        return response.status, response.content_type, text.encode()

    alone = [told(ask(server.predictions, body, headers)) for body, headers in kinds]
    with ThreadPoolExecutor(len(kinds) + 1) as clients:
        with paused(server):
            first = clients.submit(ask, server.predictions, CLIP)
            pending(server)  # by now the worker has it
            together = [clients.submit(ask, server.predictions, body, headers) for body, headers in kinds]
            wait_until(lambda: pending(server) >= len(kinds) - 1, 30)
        assert first.result().status == 200
        assert [told(future.result()) for future in together] == alone


def test_a_client_that_leaves_in_the_middle_changes_nothing_for_the_next(server: Server, front: Server) -> None:
    worker = server.worker()
    for door in (server, front):
        with streaming(door.inference) as response:
            assert response.readline()
    assert server.caption(CLIP).json()["caption"] == CAPTION
    assert server.worker() == worker


def test_an_error_after_the_first_caption_is_the_last_piece(
    handler: Any,  # noqa: F811
    unpacked: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[int, bytes] = {}

    class Streaming(Context):
        def get_response_headers(self, number: int) -> dict[str, str]:
            return {"ts_stream_next": "true"} if number in sent else {}

    def send(pieces: dict[int, bytes], ids: dict[int, str], *_: object) -> None:
        for number, piece in pieces.items():
            assert ids == {number: f"request {number}"}
            sent[number] = sent.get(number, b"") + piece

    of_film, search = [], Captioner.search

    def fails_at_the_third(captioner: Captioner, features: Any, options: Any) -> Any:
        (of_clip,) = options.values()
        if of_clip.cut.into_segments:
            of_film.append(of_clip)
            if len(of_film) == 3:
                return {}
        return search(captioner, features, options)

    of_torchserve = SimpleNamespace(send_intermediate_predict_response=send)
    monkeypatch.setitem(sys.modules, "ts.handler_utils.utils", of_torchserve)
    monkeypatch.setattr(Captioner, "search", fails_at_the_third)
    context = Streaming(unpacked)
    context.headers = [{"Accept": LINES, "X-Etenet-Segment-S": str(PART_S)}, {"Accept": "text/plain"}]
    last, other = handler.handle([{"body": FILM}, {"body": CLIP}], context)
    pieces = parsed(LINES, sent[0] + last)
    assert [name for name, _ in pieces] == ["segment"] * (len(EXAMPLES) - 1) + ["error"]
    assert pieces[-1][1]["error"]["code"] == "internal_error"
    assert (other.decode().strip(), context.statuses) == (CAPTION, {})
    assert context.response_headers[0, "X-Accel-Buffering"] == "no"
    assert (1, "X-Accel-Buffering") not in context.response_headers


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("front_end", ["nginx", "exporter"])
def test_a_piece_is_passed_on_before_the_next_is_there(front_end: str, whole: bool) -> None:
    read = Barrier(2, timeout=30)

    class InPieces(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            for header in ("Transfer-Encoding: chunked", f"Content-Type: {LINES}", "X-Accel-Buffering: no"):
                self.send_header(*header.split(": "))
            self.end_headers()
            self.wfile.write(b"2\r\n1\n\r\n")
            read.wait()
            self.wfile.write(b"2;more=less\r\n2\n\r\n" + (b"0\r\n\r\n" if whole else b""))
            self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with serving(InPieces) as torchserve, through(front_end, torchserve) as url, streaming(url) as response:
        assert (response.status, response.headers["Content-Type"], response.readline()) == (200, LINES, b"1\n")
        read.wait()
        if whole:
            assert response.read() == b"2\n"
        else:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()


@contextmanager
def through(front_end: str, torchserve: int) -> Iterator[str]:
    if front_end == "nginx":
        with nginx(torchserve) as port:
            yield f"http://127.0.0.1:{port}"
    else:
        with relayed_to(torchserve, max_body_bytes=len(FILM)) as url:
            yield url
