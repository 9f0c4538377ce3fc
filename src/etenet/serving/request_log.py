"""What a worker leaves behind of each request: a line in the log, and figures for Prometheus.

Nothing that a client or a clip wrote goes into a line, but for what the decoder made numbers and known names of.
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

LINE_START = "request "  # handler/log4j2.xml finds the lines by it, and leaves it out


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A request that has its outcome. `waited_s` from the front to the worker, None where the front does not say."""

    id: str
    body_bytes: int
    waited_s: float | None
    seconds: float
    outcome: Outcome

    @property
    def captions(self) -> tuple[Caption, ...]:
        """One, or those of the segments; none where there is an error."""
        if isinstance(self.outcome, CaptionError):
            return ()
        return self.outcome.segments if isinstance(self.outcome, SegmentCaptions) else (self.outcome,)


def record(batch: Sequence[Answered]) -> None:
    """Count the requests of a batch, which may be none, and print a line for each."""
    if not batch:
        return
    metrics.BATCH_CLIPS.observe(len(batch))
    metrics.BUSY_SECONDS.inc(batch[0].seconds)
    for answered in batch:
        _count(answered)
    captions = [caption for answered in batch for caption in answered.captions]
    for caption in captions[:1]:  # all captions of a batch carry the same two
        metrics.STAGE_SECONDS.labels("encode").observe(caption.timing_ms.encode / 1000)
        metrics.STAGE_SECONDS.labels("search").observe(caption.timing_ms.search / 1000)
    form = os.environ.get(REQUEST_LOG_VARIABLE, "off")
    if form != "off":
        lines = (json.dumps(_fields(one)) if form == "json" else _plain(_fields(one)) for one in batch)
        print("".join(f"{LINE_START}{line}\n" for line in lines), end="", flush=True)


def _count(answered: Answered) -> None:
    metrics.REQUEST_SECONDS.observe(answered.seconds)
    metrics.CLIP_BYTES.observe(answered.body_bytes)
    if answered.waited_s is not None:
        metrics.STAGE_SECONDS.labels("wait").observe(answered.waited_s)
    if isinstance(answered.outcome, CaptionError):
        metrics.ERRORS.labels(answered.outcome.code).inc()
        return
    metrics.CAPTIONS.inc()
    metrics.FRAMES.inc(sum(caption.video.distinct_frames for caption in answered.captions))
    metrics.STAGE_SECONDS.labels("decode").observe(answered.captions[0].timing_ms.decode / 1000)


def _fields(answered: Answered) -> dict[str, Any]:
    outcome = answered.outcome
    fields: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": answered.id,
        "status": int(outcome.status) if isinstance(outcome, CaptionError) else 200,
        "bytes": answered.body_bytes,
        "total_ms": round(1000 * answered.seconds, 1),
    }
    if answered.waited_s is not None:
        fields["wait_ms"] = round(1000 * answered.waited_s, 1)
    if isinstance(outcome, CaptionError):
        return {**fields, "error": outcome.code}
    timing, video = answered.captions[0].timing_ms, answered.captions[0].video
    stages = {"decode_ms": timing.decode, "encode_ms": timing.encode, "search_ms": timing.search}
    fields |= {name: round(value, 1) for name, value in stages.items()}
    if isinstance(outcome, SegmentCaptions):
        fields["segments"] = len(outcome.segments)
    return {**fields, "codec": video.codec, "width": video.width_px, "height": video.height_px}


def _plain(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
