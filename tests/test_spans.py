"""Spans of requests and their stages, in memory; no import of OpenTelemetry unless a variable asks for them."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import etenet
from etenet.captioning.captions import Outcome
from etenet.captioning.stream import Stage
from etenet.errors import InternalError, NotAVideo
from etenet.serving.request import Request
from etenet.serving.spans import Spans
from handler import etenet_handler
from tests.conftest import EXAMPLES, REPOSITORY

BODIES = [(REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def memory() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Spans:
    return Spans(SimpleSpanProcessor(memory))


def request(id: str, **headers: str) -> Request:
    return Request.read(id, {"body": b"clip"}, {name.replace("_", "-"): text for name, text in headers.items()})


def of_requests(memory: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans of whole requests, by the ids of those."""
    outer = [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]
    return {span.attributes["http.request.header.x-request-id"][0]: span for span in outer}


def inside(memory: InMemorySpanExporter, outer: ReadableSpan) -> list[ReadableSpan]:
    """In the order in which they began."""
    all_of_it = [span for span in memory.get_finished_spans() if span.parent == outer.context]
    return sorted(all_of_it, key=lambda span: span.start_time)


def recorded(spans: Spans, requests: list[Request], captioner: etenet.Captioner) -> list[Outcome]:
    """Caption a clip for each request, and record that."""
    stages: list[Stage[int]] = []
    began_s = time.perf_counter()
    bodies = BODIES[: len(requests)]
    outcomes = captioner.caption_batch(bodies, [each.options for each in requests], on_stage=stages.append)
    requests[:] = spans.record(requests, outcomes, stages, began_s)
    return outcomes


def test_the_stages_of_a_request_lie_in_it_and_after_each_other(
    spans: Spans, memory: InMemorySpanExporter, captioner: etenet.Captioner
) -> None:
    before_ns = time.time_ns()
    requests = [request("first", X_Request_Start=f"t={time.time() - 2:.3f}"), request("second"), request("third")]
    outcomes = recorded(spans, requests, captioner)
    after_ns = time.time_ns()
    assert set(of_requests(memory)) == {"first", "second", "third"}
    for one, outcome in zip(requests, outcomes, strict=True):
        outer = of_requests(memory)[one.id]
        stages = inside(memory, outer)
        queue = ["queue"] if one.id == "first" else []
        assert [span.name for span in stages] == [*queue, "decode", "encode", "search"]
        for earlier, later in pairwise(stages):
            assert outer.start_time <= earlier.start_time <= earlier.end_time <= later.start_time
            assert later.end_time <= outer.end_time <= after_ns
        waited_ns = 2 * 10**9 if queue else 0
        assert before_ns - waited_ns - 10**7 <= outer.start_time <= after_ns - waited_ns
        search = stages[-1]
        assert search.end_time - search.start_time >= 1e6 * outcome.timing_ms.search - 2
        assert dict(search.attributes) == {"etenet.videos": 3}
        assert outer.attributes["http.response.status_code"] == 200
    names = {span.resource.attributes["service.name"] for span in memory.get_finished_spans()}
    assert names == {"etenet"}


def test_a_request_is_a_span_of_its_clients_trace(spans: Spans, memory: InMemorySpanExporter) -> None:
    state = {"tracestate": "vendor=1,other=2"}
    requests = [
        request("sampled", traceparent=f"00-{TRACE}-{SPAN}-01", **state),
        request("not sampled", traceparent=f"00-{TRACE}-{SPAN}-00"),
        request("own"),
    ]
    error = NotAVideo("text")
    sampled, unsampled, own = spans.record(requests, [error, error, error], [], time.perf_counter())
    assert set(of_requests(memory)) == {"sampled", "own"}
    outer = of_requests(memory)["sampled"]
    assert (f"{outer.parent.trace_id:032x}", f"{outer.parent.span_id:016x}") == (TRACE, SPAN)
    assert outer.context.trace_state.to_header() == state["tracestate"]
    assert str(sampled.trace) == f"00-{TRACE}-{outer.context.span_id:016x}-01"
    assert (unsampled.trace.trace_id, unsampled.trace.flags) == (TRACE, "00")
    assert own.trace.trace_id == f"{of_requests(memory)['own'].context.trace_id:032x}" != TRACE


def test_errors_are_named_and_only_our_own_are_errors_of_the_span(spans: Spans, memory: InMemorySpanExporter) -> None:
    requests = [request("theirs"), request("ours"), request("a probe", Etenet_Probe="secret")]
    probe = Request.read("probe", {"body": b"clip"}, {"Etenet-Probe": "secret"}, probe_secret="secret")
    outcomes = [NotAVideo("text"), InternalError("bug"), NotAVideo("text")]
    *_, traced = spans.record([*requests[:2], probe], outcomes, [], time.perf_counter())
    assert traced.trace is None
    found = of_requests(memory)
    assert set(found) == {"theirs", "ours"}
    attributes = {
        id: (span.attributes["http.response.status_code"], span.attributes["error.type"]) for id, span in found.items()
    }
    assert attributes == {"theirs": (415, "not_a_video"), "ours": (500, "internal_error")}
    assert {id: span.status.status_code for id, span in found.items()} == {
        "theirs": StatusCode.UNSET,
        "ours": StatusCode.ERROR,
    }


def test_the_environment_names_the_service(memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "captions")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    Spans(SimpleSpanProcessor(memory)).record([request("7")], [NotAVideo("text")], [], time.perf_counter())
    (span,) = memory.get_finished_spans()
    assert span.resource.attributes["service.name"] == "captions"
    assert span.resource.attributes["deployment.environment.name"] == "test"


def test_stages_are_told_with_the_numbers_of_their_videos(captioner: etenet.Captioner) -> None:
    stages: list[Stage[int]] = []
    options = [etenet.CaptionOptions(), etenet.CaptionOptions(cut=etenet.Cut(segment_s=1))]
    captioner.caption_batch([b"no video", BODIES[0]], options, on_stage=stages.append)
    decoded = [stage.videos for stage in stages if stage.name == "decode"]
    assert sorted(map(sorted, decoded)) == [[0], [1]]
    assert {stage.name: stage.videos for stage in stages if stage.name != "decode"} == {
        "encode": {1},
        "search": {1},
    }
    assert all(stage.began_s <= stage.ended_s for stage in stages)


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import os, sys; [os.environ.pop(name) for name in [*os.environ] if name.startswith('OTEL_')]; "
        "from handler import etenet_handler; assert etenet_handler._spans() is None; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("variable", etenet_handler.COLLECTOR_VARIABLES)
def test_where_opentelemetry_is_missing_the_log_says_what_to_install(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "etenet.serving.spans", None)
    with caplog.at_level(logging.WARNING):
        assert etenet_handler._spans() is None
    assert "pip install 'etenet[telemetry]'" in caplog.text
