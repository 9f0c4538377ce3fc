"""OpenAI's chat completions: a request in that form -> a video and options; captions or an error -> a response.

Source: https://platform.openai.com/docs/api-reference/chat; the part `video_url` is vLLM's. The text of a conversation
is not read: the network follows no instructions.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from etenet.captioning.captions import Caption, SegmentCaptions
from etenet.captioning.options import OPTIONS, CaptionOptions
from etenet.errors import BadOption, BadRequest, EmptyBody, ModelNotFound, NotAVideo, TooLarge
from etenet.model.config import WIDEST_BEAM
from etenet.serving.archive import MODEL_NAME
from etenet.serving.http import json_body

PATH = "/v1/chat/completions"
FORM_HEADER, FORM = "Etenet-Form", "chat"  # of a request: that its body is a chat, and its response should be one

_MODEL = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": MODEL_NAME}
MODELS: Mapping[str, Mapping[str, Any]] = {  # by their paths; deploy/nginx/nginx.conf has the same
    "/v1/models": {"object": "list", "data": [_MODEL]},
    f"/v1/models/{MODEL_NAME}": _MODEL,
}

MAX_JSON_BYTES = 2**16  # of a request without its data: URLs: once it is parsed, JSON takes many times its size
MOST_WORDS = next(int(option.most) for option in OPTIONS if option.name == "max_words")

_USED = {"model", "messages", "n", "max_tokens", "max_completion_tokens", "stream", "stream_options"}
_IGNORED = {
    # How to sample: the sentence is searched for.
    *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop", "min_tokens", "reasoning_effort"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    # Whose the request is.
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
}
_ASKS_FOR_NOTHING: Mapping[str, Sequence[Any]] = {  # any other value asks for something that there is not
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_EXAMPLE = '{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}}'
_OBJECT = re.compile(rb"\s*\{")
# With its quotes, or to the end of the body: what matched nothing would be looked through again from each quote in it.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_DATA = b"data:"
_WHITE_SPACE = b" \t\r\n"
_SHOWN_LETTERS = 40


def is_asked(headers: Mapping[str, Any]) -> bool:
    """Whether a request with these headers has the form of a chat."""
    return any(name.lower() == FORM_HEADER.lower() and value == FORM for name, value in headers.items())


def longest(video_bytes: int) -> int:
    """How many bytes a request with a video of so many has at most."""
    return MAX_JSON_BYTES + 4 * (video_bytes // 3 + 1)


def error_fields(status: HTTPStatus) -> dict[str, Any]:
    """What an error of OpenAI's has beside `code` and `message`."""
    return {"type": "server_error" if status >= 500 else "invalid_request_error", "param": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """What a request asks for. `options` are texts by the names of options, as in a form."""

    video: bytes = b""
    options: Mapping[str, str]
    stream: bool = False
    with_usage: bool = False  # at the end of a stream

    @classmethod
    def read(cls, body: bytes, *, max_words: int) -> Chat:
        """`max_words` is the longest sentence that there is by default. Raises `CaptionError`."""
        request, urls = _parsed(body)
        for name, value in request.items():
            if not (value is None or name in _USED | _IGNORED or value in _ASKS_FOR_NOTHING.get(name, ())):
                raise BadOption(f"{_shown(name)} is nothing that a captioner can do; leave it out")
        if (model := request.get("model")) != MODEL_NAME:
            raise ModelNotFound(f"there is no model {_shown(model)}; ask for {MODEL_NAME!r}")
        stream_options = request.get("stream_options") or {}
        if not isinstance(stream_options, dict):
            raise BadOption(f"stream_options must be an object, got {_shown(stream_options)}")
        return cls(
            video=_video(request.get("messages"), urls),
            options=_options(request, max_words),
            stream=_flag(request, "stream"),
            with_usage=_flag(stream_options, "include_usage"),
        )

    def respond(
        self, outcome: Caption | SegmentCaptions, *, id: str, checkpoint: str, max_words: int
    ) -> tuple[str, bytes]:
        """The media type and the body of the response. `max_words` was the longest sentence that there could be."""
        captions = outcome.segments if isinstance(outcome, SegmentCaptions) else (outcome,)
        texts = _texts(outcome)
        words = [len((text or "").split()) for text in texts]
        ends = ["length" if isinstance(outcome, Caption) and count == max_words else "stop" for count in words]
        frames = sum(len(caption.video.times_s) for caption in captions)
        usage = {"prompt_tokens": frames, "completion_tokens": sum(words), "total_tokens": frames + sum(words)}
        head = {
            "id": f"chatcmpl-{id}",
            "object": "chat.completion.chunk" if self.stream else "chat.completion",
            "created": int(time.time()),
            "model": MODEL_NAME,
            "system_fingerprint": checkpoint,
        }
        if self.stream:
            return "text/event-stream", _events(head, texts, ends, usage if self.with_usage else None)
        choices = [
            _choice(index, end, message={"role": "assistant", "content": text, "refusal": None})
            for index, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return "application/json", json_body({**head, "choices": choices, "usage": usage})


def _events(
    head: Mapping[str, Any], texts: Sequence[str | None], ends: Sequence[str], usage: Mapping[str, int] | None
) -> bytes:
    """All chunks of a stream: there is no caption before there is a whole one. Source: OpenAI's chat/streaming."""
    deltas = [_choice(index, None, delta={"role": "assistant", "content": text}) for index, text in enumerate(texts)]
    deltas += [_choice(index, end, delta={}) for index, end in enumerate(ends)]
    chunks = [{**head, "choices": [delta]} for delta in deltas]
    if usage:
        chunks = [*({**chunk, "usage": None} for chunk in chunks), {**head, "choices": [], "usage": usage}]
    return b"".join(b"data: %b\n\n" % line for line in (*map(json_body, chunks), b"[DONE]"))


def _choice(index: int, end: str | None, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": end}


def _parsed(body: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The request, in which each data: URL is replaced by a short name, and the URLs by these names."""
    if not _OBJECT.match(body):
        raise BadRequest("the body is not a JSON object; send a chat in OpenAI's form")
    rest, urls, at = bytearray(), dict[str, bytes](), 0
    for match in _TEXT.finditer(body):
        if len(rest) + match.start() - at > MAX_JSON_BYTES:
            break
        if body[match.start() + 1 : match.start() + 1 + len(_DATA)].lower() != _DATA:
            continue
        rest += body[at : match.start()] + b'"data:%d"' % len(urls)
        urls[f"data:{len(urls)}"] = match[0]
        at = match.end()
    if len(rest) + len(body) - at > MAX_JSON_BYTES:
        raise TooLarge(f"the request has more than {MAX_JSON_BYTES} bytes beside its data: URLs; send less text")
    try:
        return json.loads(rest + body[at:]), urls
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error}); send a chat in OpenAI's form") from error


def _video(messages: Any, data_urls: Mapping[str, bytes]) -> bytes:
    """That of the last message that has one."""
    if not isinstance(messages, list):
        raise BadRequest(f"messages must be a list, got {_shown(messages)}")
    urls = next(filter(None, map(_video_urls, reversed(messages))), [])
    if not urls:
        raise EmptyBody(f"there is no video in the messages; add {_EXAMPLE} to the content of one")
    if len(urls) > 1:
        raise BadRequest(f"the message has {len(urls)} videos; send each in a request of its own")
    if urls[0] not in data_urls:
        scheme = urls[0].partition(":")[0]
        raise BadRequest(
            f"the server fetches nothing ({_shown(scheme)}), or a client could make it read what only the server may; "
            "send the video itself, as data:video/mp4;base64,..."
        )
    return _decoded(data_urls[urls[0]])


def _video_urls(message: Any) -> list[str]:
    match message:
        case {"content": [*parts]}:
            pass
        case {"content": str() | None} | {"role": "assistant"}:
            return []
        case _:
            raise BadRequest(f"a message must be an object with a content of text or parts, got {_shown(message)}")
    urls = []
    for part in parts:
        match part:
            case {"type": "text" | "refusal"}:
                pass
            case {"type": "video_url", "video_url": {"url": str(url)}}:
                urls.append(url)
            case {"type": "video_url"}:
                raise BadRequest(f"a video must look like {_EXAMPLE}")
            case {"type": str(kind)}:
                raise BadRequest(f"a part of the type {_shown(kind)} cannot be captioned; send a video, as {_EXAMPLE}")
            case _:
                raise BadRequest(f"a part of a content must be an object with a type, got {_shown(part)}")
    return urls


def _decoded(url: bytes) -> bytes:
    """The bytes in a data: URL, which has its quotes and JSON's escapes. Source: RFC 2397."""
    try:
        text = json.loads(url, strict=False).encode() if b"\\" in url else url[1:-1]
        head, comma, data = text.partition(b",")
        kind, *parameters = head.lower().split(b";")
        if not comma or b"base64" not in parameters:
            raise BadRequest("the data: URL of the video is not in base64; send data:video/mp4;base64,...")
        if kind == b"data:video/jpeg":
            raise NotAVideo("frames as JPEGs (video/jpeg) are no video; send the video file itself")
        return base64.b64decode(data.translate(None, _WHITE_SPACE), validate=True)
    except ValueError as error:
        raise BadRequest("the data: URL of the video is not whole base64; encode the file again") from error


def _options(request: Mapping[str, Any], max_words: int) -> dict[str, str]:
    texts = {}
    for name in ("max_tokens", "max_completion_tokens"):
        if most := _count(request, name):
            texts["max_words"] = str(min(most, max_words))
    if sentences := _count(request, "n"):
        if sentences > WIDEST_BEAM:
            raise BadOption(f"n must be from 1 to {WIDEST_BEAM}, got {sentences}")
        texts |= {"captions": str(sentences), "beam_size": str(max(sentences, CaptionOptions().beam_size))}
    return texts


def _count(request: Mapping[str, Any], name: str) -> int | None:
    value: int | None = request.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise BadOption(f"{name} must be a whole number from 1 on, got {_shown(value)}")
    return value


def _flag(request: Mapping[str, Any], name: str) -> bool:
    value = request.get(name)
    if value not in (None, True, False):
        raise BadOption(f"{name} must be true or false, got {_shown(value)}")
    return bool(value)


def _texts(outcome: Caption | SegmentCaptions) -> list[str | None]:
    """The content of each choice: the sentences of a clip, or as one choice a line for each segment."""
    if isinstance(outcome, SegmentCaptions):
        return ["\n".join(caption.text or "" for caption in outcome.segments)]
    return [outcome.text, *(sentence.text for sentence in outcome.sentences[1:])]


def _shown(value: Any) -> str:
    """Short, whatever a client sent."""
    names: dict[type, str] = {dict: "an object", list: "a list"}
    return names.get(type(value)) or repr(value)[:_SHOWN_LETTERS]
