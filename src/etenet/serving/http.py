"""What the server itself needs of HTTP/1.1: the head of a request, responses that end their connection, and JSON."""

from __future__ import annotations

import http.client
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType

# Source: RFC 9112, 3. A method is a token (RFC 9110, 5.6.2).
_REQUEST_LINE = re.compile(rb"([\w!#$%&'*+.^`|~-]+) (\S+) HTTP/1\.[01]\r?\n")
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class Head:
    """Of a request."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # by their names in lower case

    @classmethod
    def read(cls, data: bytes) -> Head | None:
        """None if it is malformed."""
        line = _REQUEST_LINE.match(data)
        if not line:
            return None
        method, target = (part.decode("latin-1") for part in line.groups())
        try:
            path, _, query = target.partition("?")
            return cls(method, path, query, headers_of(data[line.end() :]))
        except http.client.HTTPException:
            return None


def headers_of(data: bytes) -> dict[str, str]:
    """By their names in lower case. Raises `http.client.HTTPException` if there are too many."""
    return {name.lower(): value for name, value in http.client.parse_headers(io.BytesIO(data)).items()}


def response(
    status: int, body: bytes, content_type: str = "application/json", headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    return response_head(status, {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}) + body


def response_head(status: int, headers: Mapping[str, str]) -> bytes:
    fields = {**headers, "Connection": "close"}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def json_response(status: HTTPStatus, value: Mapping[str, object], headers: Mapping[str, str] | None = None) -> bytes:
    return response(status, json_body(value), headers=headers or {})


def json_body(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def error_response(
    status: HTTPStatus,
    message: str = "",
    *,
    code: str = "",
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
) -> bytes:
    error = {"code": code or status.name.lower(), "message": message or status.phrase, **more}
    return json_response(status, {"error": error}, headers)


def without_body(answer: bytes) -> bytes:
    """What HEAD gets instead of the response to GET. Source: RFC 9110, 9.3.2."""
    head, end, _ = answer.partition(b"\r\n\r\n")
    return head + end
