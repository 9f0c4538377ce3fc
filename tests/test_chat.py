"""Chats in OpenAI's form: its own client reads the captions, with nginx and without; all else is refused."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any
from unittest.mock import Mock

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etenet
from benchmarks.rig.servers import free_ports
from etenet.captioning.captions import SegmentCaptions
from etenet.errors import BadOption, BadRequest, CaptionError, EmptyBody, ModelNotFound, NotAVideo, Overloaded, TooLarge
from etenet.serving.chat import FORM_HEADER, MAX_JSON_BYTES, MODELS, PATH, Chat
from etenet.serving.request import Request
from etenet.serving.response import error_body
from tests.conftest import EXAMPLES, REPOSITORY, Server, ask
from tests.front import behind_nginx, nginx
from tests.test_front import request, response_to
from tests.test_readme import HTTP, blocks
from tests.test_relay import relayed_to, serving
from tests.test_segments import FILM, PART_S

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CAPTION = next(iter(EXAMPLES.values()))


def data_url(video: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video).decode()}"


def messages(*urls: str, text: str = "What happens in this video?") -> list[Any]:
    videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": text}, *videos]},
    ]


def body(*urls: str, **parameters: Any) -> bytes:
    return json.dumps({"model": "etenet", "messages": messages(*urls), **parameters}).encode()


ASKED = body(data_url(CLIP))


def read(sent: bytes) -> Chat:
    return Chat.read(sent, max_words=20)


@pytest.fixture(scope="module", params=["nginx", "no nginx"])
def door(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "nginx":
            yield stack.enter_context(behind_nginx(server)).inference
        else:
            yield server.exporter


@pytest.fixture(scope="module")
def client(door: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_the_client_of_openai_gets_the_caption(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model="etenet", messages=messages(data_url(CLIP)), temperature=0.2, user="u"
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", CAPTION, "stop")
    words = len(CAPTION.split())
    assert answer.usage
    assert answer.usage.to_dict() == {"prompt_tokens": 16, "completion_tokens": words, "total_tokens": 16 + words}
    assert answer.system_fingerprint == server.caption(CLIP).json()["model"]["checkpoint"]
    assert answer.id == f"chatcmpl-{answer._request_id}"


def test_it_gets_several_sentences_short_ones_and_lines_for_segments(client: openai.OpenAI, server: Server) -> None:
    create, asked = client.chat.completions.create, messages(data_url(CLIP))
    several = create(model="etenet", messages=asked, n=6).choices
    expected = server.caption(CLIP, X_Etenet_Captions="6", X_Etenet_Beam_Size="6").json()["captions"]
    assert [choice.message.content for choice in several] == [sentence["caption"] for sentence in expected]
    short = create(model="etenet", messages=asked, max_tokens=2).choices[0]
    assert (len((short.message.content or "").split()), short.finish_reason) == (2, "length")
    unbounded = create(model="etenet", messages=asked, max_completion_tokens=4096).choices[0]
    assert (unbounded.message.content, unbounded.finish_reason) == (CAPTION, "stop")
    film = create(model="etenet", messages=messages(data_url(FILM)), extra_headers={"X-Etenet-Segment-S": str(PART_S)})
    assert (film.choices[0].message.content or "").splitlines() == list(EXAMPLES.values())
    assert film.usage
    assert film.usage.prompt_tokens == 16 * len(EXAMPLES)


def test_each_segment_has_a_line_also_if_it_is_as_the_one_before_or_withheld(captioner: etenet.Captioner) -> None:
    caption = captioner.caption(CLIP)
    unsure = replace(caption.sentences[0], confidence=0.1)
    withheld = replace(caption, sentences=(unsure,), min_confidence=0.5)
    segments = SegmentCaptions(segments=(caption, caption, withheld, caption))
    _, answer = Chat(options={}).respond(segments, id="1", checkpoint="", max_words=20)
    content = json.loads(answer)["choices"][0]["message"]["content"]
    assert content.split("\n") == [CAPTION, CAPTION, "", CAPTION]


def test_it_reads_a_stream(client: openai.OpenAI) -> None:
    asked = messages(data_url(CLIP))
    chunks = list(client.chat.completions.create(model="etenet", messages=asked, stream=True, n=2))
    texts = [
        "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == n) for n in range(2)
    ]
    assert texts[0] == CAPTION
    assert texts[1]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, None, "stop", "stop"]
    with_usage = client.chat.completions.create(
        model="etenet", messages=asked, stream=True, stream_options={"include_usage": True}
    )
    *before, last = with_usage
    assert (last.choices, [chunk.usage for chunk in before]) == ([], [None] * len(before))
    assert last.usage
    assert last.usage.prompt_tokens == 16


@pytest.mark.parametrize(
    ("parameters", "kind", "status", "code", "reason"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, 404, "model_not_found", "ask for 'etenet'"),
        ({"messages": messages()}, openai.BadRequestError, 400, "empty_body", "there is no video in the messages"),
        ({"messages": messages("https://x.org/a.mp4")}, openai.BadRequestError, 400, "bad_request", "fetches nothing"),
        ({"messages": messages(data_url(b"text"))}, openai.APIStatusError, 415, "not_a_video", "this is text"),
        (
            {"messages": messages(data_url(CLIP[:3000]))},
            openai.UnprocessableEntityError,
            422,
            "undecodable_video",
            "422",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            400,
            "bad_option",
            "tools",
        ),
        ({"extra_headers": {"X-Etenet-Captions": "many"}}, openai.BadRequestError, 400, "bad_option", "captions"),
    ],
)
def test_errors_are_those_that_it_knows(
    client: openai.OpenAI,
    parameters: dict[str, Any],
    kind: type[openai.APIStatusError],
    status: int,
    code: str,
    reason: str,
) -> None:
    asked: dict[str, Any] = {"model": "etenet", "messages": messages(data_url(CLIP)), **parameters}
    with pytest.raises(kind, match=reason) as raised:
        client.chat.completions.create(**asked)
    error = raised.value
    assert (error.status_code, error.code, error.type, error.param) == (status, code, "invalid_request_error", None)


def test_models_are_listed(client: openai.OpenAI, door: str) -> None:
    assert [model.id for model in client.models.list()] == ["etenet"]
    assert client.models.retrieve("etenet").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for path, content in MODELS.items():
        assert ask(door + path).json() == content
    assert ask(f"{door}/v1/models", b"?").status in (404, 405)
    assert ask(door + PATH).status in (404, 405)


def test_what_never_reaches_the_captioner_has_the_same_form(door: str) -> None:
    with closing(http.client.HTTPConnection(door.removeprefix("http://"), timeout=10)) as connection:
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", str(2 * 10**9))
        connection.endheaders()
        response = connection.getresponse()
        refused = response.status, {}, response.read()
    (gone,) = free_ports(1)
    with nginx(gone) as port:
        unreachable = response_to(port, request(PATH, method="POST", length=2), b"{}")
        bare = response_to(port, request(length=2), b"{}")
    for (status, _, sent), code, kind in (
        (refused, "too_large", "invalid_request_error"),
        (unreachable, "bad_gateway", "server_error"),
    ):
        error = json.loads(sent)["error"]
        assert status >= 400
        assert (error["code"], error["type"], error["param"]) == (code, kind, None)
    assert json.loads(bare[2])["error"].keys() == {"code", "message"}


@pytest.mark.parametrize(
    "sent",
    [
        ASKED,
        ASKED.replace(b"/", rb"\/"),  # as PHP writes it
        ASKED.replace(b"+", rb"\u002B"),  # as .NET writes it
        json.dumps(json.loads(ASKED), indent=4).encode(),
        ASKED.replace(b"base64,", rb"base64,\r\n"),
        ASKED.replace(b"base64,", b"base64,\n"),
        ASKED.replace(b"data:video/mp4", b"DATA:video/mp4;codecs=avc1"),
        ASKED.replace(b"What happens", rb"Is \"data:video/mp4;base64,AAAA\" what happens"),
        body(data_url(CLIP), tools=[], logprobs=None, stop=["."], response_format={"type": "text"}),
    ],
)
def test_the_video_is_found_as_every_client_writes_it(sent: bytes) -> None:
    assert read(sent) == Chat(video=CLIP, options={})


def test_the_last_video_of_a_conversation_counts() -> None:
    first, last = (json.loads(body(data_url(video)))["messages"] for video in (b"first", CLIP))
    said = {"role": "assistant", "content": "a dog runs"}
    then = {"role": "user", "content": "And then?"}
    sent = json.dumps({"model": "etenet", "messages": [*first, said, *last, said, then]}).encode()
    assert read(sent).video == CLIP


def of_message(message: Any) -> bytes:
    return json.dumps({"model": "etenet", "messages": [message]}).encode()


def of_part(part: Any) -> bytes:
    return of_message({"role": "user", "content": [part]})


@pytest.mark.parametrize(
    ("sent", "error", "reason"),
    [
        (b"", BadRequest, "the body is not a JSON object"),
        (CLIP, BadRequest, "the body is not a JSON object"),
        (b"[]", BadRequest, "the body is not a JSON object"),
        (b"{", BadRequest, "the body is not JSON"),
        (b'{"a": ' + b"[" * 60_000, BadRequest, "the body is not JSON"),
        (b'{"n": 1' + b"0" * 5000 + b"}", BadRequest, "the body is not JSON"),
        (b"{}", ModelNotFound, "there is no model None"),
        (b'{"model": ["etenet"]}', ModelNotFound, "there is no model a list"),
        (b'{"model": "etenet"}', BadRequest, "messages must be a list, got None"),
        (of_message("hello"), BadRequest, "a message must be an object with a content"),
        (of_message({"role": "user"}), BadRequest, "a message must be an object with a content"),
        (of_message({"role": "user", "content": "hello"}), EmptyBody, "there is no video"),
        (of_part("hello"), BadRequest, "a part of a content must be an object"),
        (of_part({"type": "image_url", "image_url": {"url": "data:,"}}), BadRequest, "'image_url' cannot be captioned"),
        (of_part({"type": "video_url", "video_url": "data:,"}), BadRequest, "a video must look like"),
        (of_part({"type": "video_url", "video_url": {"url": 7}}), BadRequest, "a video must look like"),
        (body("file:///etc/passwd"), BadRequest, "fetches nothing .'file'."),
        (body("//x.org/a.mp4"), BadRequest, "fetches nothing"),
        (body("data:video/mp4,AAAA"), BadRequest, "not in base64"),
        (body("data:video/mp4;base64"), BadRequest, "not in base64"),
        (body("data:video/mp4;base64,AAA"), BadRequest, "not whole base64"),
        (body("data:video/mp4;base64,A\ud800AA"), BadRequest, "not whole base64"),
        (body("data:video/mp4;base64,A%2BA"), BadRequest, "not whole base64"),
        (body("data:video/jpeg;base64,AAAA,AAAA"), NotAVideo, "frames as JPEGs"),
        (body(data_url(CLIP), data_url(CLIP)), BadRequest, "2 videos"),
        (body(data_url(CLIP), n=0), BadOption, "n must be a whole number from 1 on, got 0"),
        (body(data_url(CLIP), n=11), BadOption, "n must be from 1 to 10, got 11"),
        (body(data_url(CLIP), n=True), BadOption, "n must be a whole number"),
        (body(data_url(CLIP), max_tokens="many"), BadOption, "max_tokens must be a whole number"),
        (body(data_url(CLIP), stream="yes"), BadOption, "stream must be true or false"),
        (body(data_url(CLIP), stream_options=[1]), BadOption, "stream_options must be an object"),
        (body(data_url(CLIP), logprobs=True), BadOption, "'logprobs' is nothing that a captioner can do"),
        (body(data_url(CLIP), response_format={"type": "json_object"}), BadOption, "'response_format'"),
        (body(data_url(CLIP), beam_sise=3), BadOption, "'beam_sise'"),
        (body(data_url(CLIP), user="u" * MAX_JSON_BYTES), TooLarge, "beside its data: URLs"),
        (b'{"a": ' + b'["data:", ' * MAX_JSON_BYTES, TooLarge, "beside its data: URLs"),
        # A search that begins anew at each quote would take hours.
        pytest.param(b'{"' + rb"\"data:" * 10**6, TooLarge, "beside its data: URLs", id="escaped quotes"),
        pytest.param(b'{"model": "data:' + b"A" * 10**6 + b"\\", BadRequest, "the body is not JSON", id="no end"),
    ],
)
def test_what_is_no_chat_about_a_video_is_refused_with_the_reason(
    sent: bytes, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        read(sent)


keys = st.sampled_from(["type", "url", "video_url", "content"]) | st.text(max_size=9)
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("data:video/mp4;base64,AAAA")
values: st.SearchStrategy[Any] = st.deferred(
    lambda: leaves | st.lists(values, max_size=3) | st.dictionaries(keys, values, max_size=3)
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["model", "messages", "n", "stream", "stream_options", "tools"]), values))
def test_whatever_is_sent_is_a_chat_or_an_error_with_a_status(sent: dict[str, Any]) -> None:
    with suppress(CaptionError):
        Chat.read(json.dumps({"model": "etenet", **sent}).encode(), max_words=20)


def test_a_chat_is_read_as_the_form_of_its_video_and_options() -> None:
    headers = {FORM_HEADER: "chat", "X-Etenet-Beam-Size": "4", "Accept": "text/event-stream"}
    request = Request.read(
        "7", {"body": bytearray(body(data_url(CLIP), max_tokens=30, stream=True))}, headers, max_words=9
    )
    assert (request.body, request.options.max_words, request.options.beam_size) == (CLIP, 9, 4)
    assert request.chat
    assert (request.chat.stream, request.error) == (True, None)
    wrong = Request.read("7", {"body": b"?"}, headers | {"X-Etenet-Captions": "many"})
    assert isinstance(wrong.error, BadRequest)
    assert wrong.chat


def test_the_example_of_the_reference_runs(server: Server) -> None:
    (code,) = blocks("python", HTTP)
    here = code.replace("http://localhost:8083", server.exporter)
    answer = subprocess.run(
        [sys.executable, "-c", here], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert f"# {answer.strip()}\n" in code


def test_an_error_of_torchserve_or_during_a_shutdown_has_the_same_form() -> None:
    class Full(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    expected = ("overloaded", "server_error", None)
    with serving(Full) as torchserve, relayed_to(torchserve) as door:
        refused = ask(door + PATH, b"{}")
    error = refused.json()["error"]
    assert (refused.status, (error["code"], error["type"], error["param"])) == (503, expected)
    context = Mock(get_all_request_header=lambda _: {FORM_HEADER.lower(): "chat"})
    error = json.loads(error_body(context, 0, Overloaded("the server is shutting down")))["error"]
    assert (error["code"], error["type"], error["param"]) == expected
    assert json.loads(error_body(Mock(get_all_request_header=lambda _: {}), 0, Overloaded("busy")))["error"].keys() == {
        "code",
        "message",
    }
