"""What a request belongs to: the id that its client gave it, and the client's trace.

Both get into headers and logs, so what is not of their form is taken for absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REQUEST_ID_HEADER = "X-Request-Id"
TRACE_HEADER = "traceparent"
TRACE_STATE_HEADER = "tracestate"

# deploy/nginx/nginx.conf has both, too.
REQUEST_ID = re.compile("[A-Za-z0-9._:/+=-]{1,128}")
# Later versions than 00 may go on behind the flags.
TRACEPARENT = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?:-.*)?"
)


def request_id(text: str) -> str:
    """A client's id if it is fit for one, else an empty string."""
    return text if REQUEST_ID.fullmatch(text) else ""


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A span of a trace, all in hexadecimal digits. Source: W3C Trace Context, 3.2."""

    trace_id: str
    span_id: str
    flags: str

    @classmethod
    def read(cls, text: str) -> TraceParent | None:
        """None if the text is no traceparent."""
        found = TRACEPARENT.fullmatch(text)
        return cls(*found["trace"].split("-")) if found else None

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"
