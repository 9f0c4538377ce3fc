"""What a worker records of each request: a line in the log, and figures for Prometheus.

A line holds no text that a client or a clip wrote, but numbers, names that the decoder knows, and ids that were
checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from etenet import metrics
from etenet.captioning.captions import Caption, Outcome, SegmentCaptions
from etenet.errors import CaptionError
from etenet.serving.config import REQUEST_LOG_VARIABLE
from etenet.serving.request import Request

LINE_START = "request "  # handler/log4j2.xml finds the lines by it, and leaves it out


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """A request and its outcome; `seconds` is how long the worker had it."""

    request: Request
    outcome: Outcome
    seconds: float

    @property
    def captions(self) -> tuple[Caption, ...]:
        """One, or one for each segment; empty for an error."""
        if isinstance(self.outcome, CaptionError):
            return ()
        return self.outcome.segments if isinstance(self.outcome, SegmentCaptions) else (self.outcome,)


def record_batch(records: Sequence[RequestRecord]) -> None:
    """Count the requests of a batch, which may be empty, and print a line for each. Probes are counted apart."""
    if not records:
        return
    metrics.BUSY_SECONDS.inc(records[0].seconds)
    metrics.PROBES.inc(sum(bool(record.captions) for record in records if record.request.is_probe))
    records = [record for record in records if not record.request.is_probe]
    if not records:
        return
    metrics.BATCH_CLIPS.observe(len(records))
    for record in records:
        _count(record)
    timings = [caption.timing_ms for record in records for caption in record.captions]
    # Captions that were made together carry the same two: those of a batch, or a few of a response in pieces.
    for encode_ms, _ in {(timing.encode, timing.search) for timing in timings if not timing.cached}:
        metrics.STAGE_SECONDS.labels("encode").observe(encode_ms / 1000)
    for _, search_ms in {(timing.encode, timing.search) for timing in timings}:
        metrics.STAGE_SECONDS.labels("search").observe(search_ms / 1000)
    form = os.environ.get(REQUEST_LOG_VARIABLE, "off")
    if form != "off":
        lines = (json.dumps(_fields(each)) if form == "json" else _plain(_fields(each)) for each in records)
        print("".join(f"{LINE_START}{line}\n" for line in lines), end="", flush=True)


def _count(record: RequestRecord) -> None:
    request, outcome = record.request, record.outcome
    metrics.REQUEST_SECONDS.observe(record.seconds)
    metrics.CLIP_BYTES.observe(len(request.body))
    if request.waited_s is not None:
        metrics.STAGE_SECONDS.labels("wait").observe(request.waited_s)
    if isinstance(outcome, CaptionError):
        metrics.ERRORS.labels(outcome.code).inc()
        return
    metrics.CAPTIONS.inc()
    if record.captions[0].timing_ms.cached:
        return
    metrics.FRAMES.inc(sum(caption.video.distinct_frames for caption in record.captions))
    metrics.STAGE_SECONDS.labels("decode").observe(record.captions[0].timing_ms.decode / 1000)


def _fields(record: RequestRecord) -> dict[str, Any]:
    request, outcome = record.request, record.outcome
    fields: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request.id,
        **({"trace_id": request.trace.trace_id} if request.trace else {}),
        "status": int(outcome.status) if isinstance(outcome, CaptionError) else 200,
        "bytes": len(request.body),
        "total_ms": round(1000 * record.seconds, 1),
    }
    if request.waited_s is not None:
        fields["wait_ms"] = round(1000 * request.waited_s, 1)
    if isinstance(outcome, CaptionError):
        return {**fields, "error": outcome.code}
    timing, video = record.captions[0].timing_ms, record.captions[0].video
    stages = {"decode_ms": timing.decode, "encode_ms": timing.encode, "search_ms": timing.search}
    fields |= {name: round(value, 1) for name, value in stages.items()}
    if timing.cached:
        fields["cached"] = True
    if isinstance(outcome, SegmentCaptions):
        fields["segments"] = len(outcome.segments)
    return {**fields, "codec": video.codec, "width": video.width_px, "height": video.height_px}


def _plain(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
