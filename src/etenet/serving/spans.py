"""Spans of requests and of their stages, for a collector of OpenTelemetry.

Whoever imports this imports OpenTelemetry. Its variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, ...) mean what they mean everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_SCHEDULE_DELAY
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import etenet
from etenet.captioning.captions import Outcome
from etenet.captioning.stream import Stage
from etenet.errors import CaptionError
from etenet.serving import archive
from etenet.serving.request import Request
from etenet.serving.trace_context import TRACE_HEADER, TRACE_STATE_HEADER, TraceParent

# A shutdown ends the worker a second after its last response.
_SEND_MS = 500


class Spans:
    """Makes spans of what has happened, and gives them to a processor.

    A request has one for all its time, and in it one for each stage: queue (from the front to the worker, if the front
    says when it had the request), decode, encode and search. Attributes are those of OpenTelemetry's semantic
    conventions for HTTP servers.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "etenet", "service.version": etenet.__version__})
        self._provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("etenet", etenet.__version__)

    @classmethod
    def to_collector(cls) -> Spans:
        """Spans that go where OTEL_EXPORTER_OTLP_ENDPOINT says, from a thread of their own."""
        os.environ.setdefault(OTEL_BSP_SCHEDULE_DELAY, str(_SEND_MS))
        return cls(BatchSpanProcessor(OTLPSpanExporter()))

    def record(
        self,
        requests: Sequence[Request],
        outcomes: Sequence[Outcome],
        stages: Sequence[Stage[int]],
        began_s: float,
    ) -> list[Request]:
        """Record a batch that the worker had from `began_s` (perf_counter) until now, and its stages, by number.

        Returns the requests, each with its span; probes have none.
        """
        traced = []
        for number, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
            own = [stage for stage in stages if number in stage.videos]
            trace = None if request.is_probe else self._record(request, outcome, own, began_s)
            traced.append(replace(request, trace=trace))
        return traced

    def flush(self) -> None:
        """Send what has not been sent yet."""
        self._provider.force_flush()

    def _record(self, request: Request, outcome: Outcome, stages: Sequence[Stage[int]], began_s: float) -> TraceParent:
        now_ns, now_s = time.time_ns(), time.perf_counter()

        def at(time_s: float) -> int:
            """Nanoseconds of Unix time."""
            return now_ns - int(1e9 * (now_s - time_s))

        received_s = began_s - (request.waited_s or 0.0)
        status = outcome.status if isinstance(outcome, CaptionError) else HTTPStatus.OK
        span = self._tracer.start_span(
            f"/{'explanations' if request.explain else 'predictions'}/{archive.MODEL_NAME}",
            context=_context_of(request),
            kind=SpanKind.SERVER,
            start_time=at(received_s),
            attributes={
                "http.response.status_code": int(status),
                "http.request.body.size": len(request.body),
                "http.request.header.x-request-id": (request.id,),
            },
        )
        if isinstance(outcome, CaptionError):
            span.set_attribute("error.type", outcome.code)
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR, outcome.code))
        queue: Stage[int] = Stage("queue", frozenset(), received_s, began_s)
        waited = [queue] if request.waited_s is not None else []
        for stage in (*waited, *stages):
            inner = self._tracer.start_span(stage.name, set_span_in_context(span), start_time=at(stage.began_s))
            if len(stage.videos) > 1:
                inner.set_attribute("etenet.videos", len(stage.videos))
            inner.end(at(stage.ended_s))
        span.end(now_ns)
        made = span.get_span_context()
        return TraceParent(format_trace_id(made.trace_id), format_span_id(made.span_id), f"{made.trace_flags:02x}")


def _context_of(request: Request) -> Context:
    """That of the client's span, if there is one."""
    headers = {TRACE_HEADER: str(request.trace), TRACE_STATE_HEADER: request.trace_state} if request.trace else {}
    return TraceContextTextMapPropagator().extract(headers, Context())
