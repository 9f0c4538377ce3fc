"""Which other origins' pages may ask for captions: none, unless `cors_allowed_origin` names one, or * for all.

TorchServe, the exporter and nginx (deploy/nginx) send the same headers. Source: Fetch Standard, 3.2, CORS protocol.
"""

from __future__ import annotations

from etenet.errors import ERROR_HEADER
from etenet.serving.trace_context import REQUEST_ID_HEADER, TRACE_HEADER

METHODS = ("PUT", "POST")
# All: clients of OpenAI's send many of their own. The star does not stand for Authorization, which they send, too.
REQUEST_HEADERS = ("Authorization", "*")
EXPOSE_HEADER = "Access-Control-Expose-Headers"
EXPOSED = ", ".join((REQUEST_ID_HEADER, ERROR_HEADER.title(), "Retry-After", TRACE_HEADER))
PREFLIGHT_AGE_S = 86400


def response_headers(origin: str) -> dict[str, str]:
    """Of every response; none if no other origin may ask."""
    return {"Access-Control-Allow-Origin": origin, EXPOSE_HEADER: EXPOSED} if origin else {}


def preflight_headers(origin: str) -> dict[str, str]:
    """Of the response to the question (OPTIONS) whether a page may send a request."""
    return response_headers(origin) | {
        "Access-Control-Allow-Methods": ", ".join(METHODS),
        "Access-Control-Allow-Headers": ", ".join(REQUEST_HEADERS),
        "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
    }


def torchserve_settings(origin: str) -> dict[str, str]:
    """What `cors_allowed_origin` needs beside itself in TorchServe's configuration."""
    if not origin:
        return {}
    return {"cors_allowed_methods": ", ".join(METHODS), "cors_allowed_headers": ", ".join(REQUEST_HEADERS)}
