"""Responses in pieces, one for each caption: server-sent events, or lines of JSON.

Source of the events: HTML Living Standard, 9.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etenet.captioning.captions import Caption, Outcome
from etenet.errors import CaptionError
from etenet.serving.http import json_body

# nginx is told not to keep pieces back until it has many.
HEADERS = {"X-Accel-Buffering": "no"}


def _event(name: str, value: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json_body(value))


def _line(_: str, value: Any) -> bytes:
    return json_body(value) + b"\n"


FORMS: Mapping[str, Callable[[str, Any], bytes]] = {"text/event-stream": _event, "application/x-ndjson": _line}


def piece(media_type: str, caption: Caption, *, attention: bool) -> bytes:
    """Of the caption of a segment, or of a clip as its only one."""
    return FORMS[media_type]("segment", caption.as_segment(attention=attention))


def last_piece(media_type: str, outcome: Outcome, model: Mapping[str, Any]) -> bytes:
    """What holds for the whole video, or why it gets no further captions."""
    if isinstance(outcome, CaptionError):
        return FORMS[media_type]("error", outcome.as_dict())
    fields = outcome.as_dict()
    return FORMS[media_type]("end", {"video": fields["video"], "model": model, "timing_ms": fields["timing_ms"]})
