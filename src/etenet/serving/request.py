"""One request for a caption: its video and its options, or what is wrong with them.

Knows nothing of TorchServe but the mappings that it gives: a row with the fields of the body, and headers.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etenet import metrics
from etenet.captioning.options import HEADER_PREFIX, OPTIONS, CaptionOptions, unknown_option
from etenet.errors import BadOption, CaptionError, EmptyBody, NotAVideo
from etenet.serving import chat as chats
from etenet.serving import content_encoding
from etenet.serving.chat import Chat
from etenet.serving.config import PROBE_HEADER
from etenet.serving.trace_context import REQUEST_ID_HEADER, TRACE_HEADER, TRACE_STATE_HEADER, TraceParent, request_id
from etenet.video.limits import DecodeLimits

BODY = "body"  # TorchServe's name for what is no form
VIDEO_FIELDS = ("data", "file", "video")  # of a form, each as good as the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """`error` says why it cannot be captioned; then `options` are the default ones, and `body` may be empty.

    `id` is the client's own if it gave one, and `trace` the client's span, or the one that the server made in it.
    `waited_s` is the time from the front to the worker, None without a front. `is_probe`: the server itself sent it, to
    see that it captions. `chat` is what it asks for if it has the form of a chat.
    """

    id: str
    body: bytes
    options: CaptionOptions
    accept: str
    explain: bool
    waited_s: float | None
    trace: TraceParent | None = None
    trace_state: str = ""
    error: CaptionError | None = None
    is_probe: bool = False
    chat: Chat | None = None

    @classmethod
    def read(
        cls,
        id: str,
        row: Mapping[str, Any],
        headers: Mapping[str, Any],
        *,
        max_body_bytes: int = DecodeLimits().max_body_bytes,
        probe_secret: str = "",
        max_words: int = chats.MOST_WORDS,
    ) -> Request:
        """Raises nothing for what a client may send: it becomes `error`. A compressed body is decompressed.

        `max_words` is the longest sentence that there is by default.
        """
        # TorchServe puts a dictionary for each field of a form among the headers.
        texts = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        body, options, error, chat = b"", CaptionOptions(), None, None
        if chats.is_asked(texts):
            encoding = texts.pop("content-encoding", "")
            try:
                chat = Chat.read(_body(row, encoding, chats.longest(max_body_bytes)), max_words=max_words)
            except CaptionError as wrong:
                chat, error = Chat(options={}), wrong.without_frames()
            row = {BODY: chat.video, **chat.options}
        try:
            options = CaptionOptions.parse(_option_texts(row, texts))
        except CaptionError as wrong:
            error = error or wrong.without_frames()
        try:
            body = _body(row, texts.get("content-encoding", ""), max_body_bytes)
        except CaptionError as wrong:
            error = error or wrong.without_frames()
        return cls(
            id=request_id(texts.get(REQUEST_ID_HEADER.lower(), "")) or id,
            body=body,
            options=options,
            accept=texts.get("accept", ""),
            explain=texts.get("explain") == "True",
            waited_s=metrics.seconds_since(texts.get("x-request-start", "")),
            trace=TraceParent.read(texts.get(TRACE_HEADER, "")),
            trace_state=texts.get(TRACE_STATE_HEADER, ""),
            error=error,
            is_probe=_is_secret(probe_secret, texts.get(PROBE_HEADER.lower(), "")),
            chat=chat,
        )


def _is_secret(secret: str, text: str) -> bool:
    return bool(secret) and hmac.compare_digest(secret.encode(), text.encode(errors="replace"))


def _option_texts(row: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, str]:
    """A form field goes before the header of the same option. Raises `BadOption` for one that is unknown."""
    named = {option.header: option.name for option in OPTIONS}
    texts = {}
    for header, text in headers.items():
        if (name := header.title()).startswith(HEADER_PREFIX):
            if name not in named:
                raise unknown_option(name, named, "header")
            texts[named[name]] = text
    videos = [field for field in (BODY, *VIDEO_FIELDS) if field in row]
    for field in [field for field in row if field not in videos]:
        if field in named.values():
            texts[field] = _bytes(row[field]).decode(errors="replace")
        elif videos:  # else it may be the video itself, under a name that is none
            raise unknown_option(field, (*VIDEO_FIELDS, *named.values()), "form field")
    return texts


def _body(row: Mapping[str, Any], encoding: str, max_bytes: int) -> bytes:
    if BODY in row:
        return content_encoding.undo(encoding, _bytes(row[BODY]), max_bytes)
    match [field for field in VIDEO_FIELDS if field in row]:
        case [field]:
            return _bytes(row[field])
        case [_, *_] as fields:
            raise BadOption(f"the form has several videos, in {' and '.join(fields)}; send one in each request")
    if encoding:  # TorchServe finds no field in what it does not decompress
        raise NotAVideo("a form cannot be compressed; send it bare, or the compressed video alone as the body")
    raise EmptyBody(
        "there is no video in the request; send it as the body (curl -T clip.mp4) or as the form field 'data', "
        "and leave the Content-Type of a form to the client, which adds the boundary"
    )


def _bytes(value: Any) -> bytes:
    """With `decode_input_request` on, TorchServe gives text as str and JSON as parsed."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return value.encode(errors="replace")
    raise NotAVideo("the body is JSON; send the video itself, for example with curl -T clip.mp4")
