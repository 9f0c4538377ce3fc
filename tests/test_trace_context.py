"""What a client says of itself, its request's id and its trace, is taken only if it has the right form."""

from __future__ import annotations

import pytest

from etenet.serving.request import Request
from etenet.serving.trace_context import REQUEST_ID, TRACEPARENT, TraceParent, request_id
from tests.conftest import REPOSITORY

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("text", ["7", "build-7/step:3", "a1B2.c_d=+", "x" * 128])
def test_an_id_of_a_client_is_the_id_of_its_request(text: str) -> None:
    assert Request.read("ours", {"body": b"clip"}, {"x-request-ID": text}).id == request_id(text) == text


@pytest.mark.parametrize("text", ["", " ", "a b", "x" * 129, "a\nb", "a\n", 'a"', "a\x00", "é", "<b>", "a;b", "%41"])
def test_an_id_that_is_none_is_replaced(text: str) -> None:
    assert Request.read("ours", {"body": b"clip"}, {"X-Request-Id": text}).id == "ours"


@pytest.mark.parametrize("text", [f"00-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-01-what comes"])
def test_the_trace_of_a_client_is_read(text: str) -> None:
    """A later version may go on behind what is known of it. Source: W3C Trace Context, 3.2.4."""
    trace = Request.read("7", {"body": b"clip"}, {"Traceparent": text}).trace
    assert trace == TraceParent(TRACE, SPAN, "01")
    assert str(trace) == f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "00",
            f"00-{TRACE}-{SPAN}",
            f"00-{TRACE}-{SPAN}-1",
            f"00-{TRACE}-{SPAN}-01-more",
            f"00-{TRACE}-{SPAN}-011",
        ),
        *(
            f"ff-{TRACE}-{SPAN}-01",
            f"00-{'0' * 32}-{SPAN}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"00-{TRACE[1:]}-{SPAN}-01",
        ),
        *(
            f"00-{TRACE.upper()}-{SPAN}-01",
            f"00-{TRACE}-{SPAN}-0g",
            f"0-{TRACE}-{SPAN}-01",
            f"01-{TRACE}-{SPAN}-01more",
        ),
    ],
)
def test_a_trace_that_is_none_is_left_out(text: str) -> None:
    assert Request.read("7", {"body": b"clip"}, {"traceparent": text}).trace is None


def test_nginx_takes_the_same_for_ids_and_traces() -> None:
    configuration = (REPOSITORY / "deploy" / "nginx" / "nginx.conf").read_text()
    for form in (REQUEST_ID, TRACEPARENT):
        assert f'"~^{form.pattern}\\z"' in configuration
