"""Responses as TorchServe's context takes them."""

from __future__ import annotations

import os
from typing import Any

from etenet.errors import ERROR_HEADER, CaptionError, Overloaded
from etenet.serving import chat, cors
from etenet.serving.config import CORS_VARIABLE
from etenet.serving.http import json_body
from etenet.serving.request import Request
from etenet.serving.trace_context import REQUEST_ID_HEADER, TRACE_HEADER


def set_headers(context: Any, number: int, request: Request) -> None:
    """Set the headers of every response."""
    context.set_response_header(number, REQUEST_ID_HEADER, request.id)
    if request.trace:
        context.set_response_header(number, TRACE_HEADER, str(request.trace))
    if os.environ.get(CORS_VARIABLE):  # TorchServe itself sends which origin may read it
        context.set_response_header(number, cors.EXPOSE_HEADER, cors.EXPOSED)


def error_body(context: Any, number: int, error: CaptionError) -> bytes:
    """Set status and headers of a response that is an error, and return its body."""
    context.set_response_status(error.status.value, error.status.phrase, number)
    context.set_response_header(number, ERROR_HEADER, error.code)
    if isinstance(error, Overloaded):
        context.set_response_header(number, "Retry-After", "1")
    context.set_response_content_type(number, "application/json")
    fields: dict[str, Any] = dict(error.as_dict()["error"])
    if chat.is_asked(context.get_all_request_header(number)):
        fields |= chat.error_fields(error.status)
    return json_body({"error": fields})
