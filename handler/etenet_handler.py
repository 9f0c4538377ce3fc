"""The handler of the version that captions, in TorchServe's protocol: rows and headers in, JSON bytes out.

TorchServe wants exactly one class here. An exception would fail a whole batch, so none leaves `handle`: every row gets
its own status and its own body. Status phrases are fixed ASCII and bodies are bytes, because a newline or a lone
surrogate in either would kill the worker.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import etenet
from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.captioning import subtitles
from etenet.captioning.captions import Outcome, SegmentCaptions
from etenet.captioning.feature_cache import DEFAULT_BYTES
from etenet.errors import DeviceFailed, InternalError
from etenet.runtime.load import working_device
from etenet.serving.archive import ENCODER_FILE, GPU_KERNELS_FILE, verify
from etenet.serving.config import FAILURE_FILE_VARIABLE, PROBE_SECRET_VARIABLE
from etenet.serving.request import Request
from etenet.serving.request_log import RequestRecord, record_batch
from etenet.serving.response import error_body, json_body
from etenet.serving.warnings_log import show_warnings

_log = logging.getLogger("etenet.handler")

TEXTS: Mapping[str, Callable[[subtitles.Segments], str]] = {
    "text/plain": subtitles.plain,
    "text/vtt": subtitles.vtt,
    "application/x-subrip": subtitles.srt,
}


class EtenetHandler:
    """Captions batches of HTTP requests with the checkpoint of its own archive."""

    def initialize(self, context: Any) -> None:
        try:
            self._load(context)
        except Exception as error:
            if path := os.environ.get(FAILURE_FILE_VARIABLE):
                Path(path).write_text(f"{type(error).__name__}: {error}")
            raise

    def _load(self, context: Any) -> None:
        show_warnings()
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        verify(folder)
        config = context.model_yaml_config or {}
        gpu = properties.get("gpu_id")
        device = "cpu" if gpu is None else working_device(f"cuda:{gpu}")
        model, settings = context.manifest["model"], dict(config.get("etenet", {}))
        feature_cache_bytes = settings.pop("feature_cache_bytes", DEFAULT_BYTES)
        limits = etenet.DecodeLimits(**settings)
        self.max_body_bytes = limits.max_body_bytes
        graph, kernels = (folder / name for name in (ENCODER_FILE, GPU_KERNELS_FILE))
        self.captioner = etenet.load(
            folder / model["serializedFile"],
            device=device,
            limits=limits,
            compiled_encoder=graph if graph.exists() else None,
            record_gpu=True,
            gpu_kernels=kernels if kernels.exists() else None,
            feature_cache_bytes=feature_cache_bytes,
        )
        self.captioner.caption(CANARY_CLIP.read_bytes(), fresh=True)
        self.probe_secret = os.environ.get(PROBE_SECRET_VARIABLE, "")
        checkpoint = self.captioner.checkpoint_id
        metrics.allocate()
        metrics.WORKER_START.set_to_current_time()
        metrics.MODEL_INFO.labels(model["modelVersion"], self.captioner.encoder, checkpoint, device).set(1)
        self.model = {
            "name": context.model_name,
            "version": model["modelVersion"],
            "encoder": self.captioner.encoder,
            "checkpoint": checkpoint,
        }

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        started = time.perf_counter()
        metrics.STEPS.inc()
        with metrics.in_progress(len(data)):
            requests = [
                Request.read(
                    str(context.get_request_id(number)),
                    row,
                    context.get_all_request_header(number),
                    max_body_bytes=self.max_body_bytes,
                    probe_secret=self.probe_secret,
                )
                for number, row in enumerate(data)
            ]
            outcomes = self._outcomes(requests)
            pairs = list(zip(requests, outcomes, strict=True))
            bodies = [self._respond(number, *pair, context) for number, pair in enumerate(pairs)]
        seconds = time.perf_counter() - started
        record_batch([RequestRecord(request=request, outcome=outcome, seconds=seconds) for request, outcome in pairs])
        return bodies

    def _outcomes(self, requests: Sequence[Request]) -> list[Outcome]:
        good = [request for request in requests if not request.error]
        try:
            outcomes = self.captioner.caption_batch(
                [request.body for request in good],
                [request.options for request in good],
                fresh=[number for number, request in enumerate(good) if request.is_probe],
            )
            captions = iter(outcomes)
            return [request.error or next(captions) for request in requests]
        except DeviceFailed:
            _log.exception("this worker cannot go on; TorchServe starts another")
            logging.shutdown()
            os._exit(1)
        except Exception:
            _log.exception("captioning a batch failed because of a bug")
            bug = InternalError("the clip could not be captioned; the log says why")
            return [request.error or bug for request in requests]

    def _respond(self, number: int, request: Request, outcome: Outcome, context: Any) -> bytes:
        """Set status and headers of a response, and return its body."""
        if isinstance(outcome, etenet.CaptionError):
            return error_body(context, number, outcome)
        content_type = "application/json"
        if text_type := _text_type(request.accept):
            captions = outcome.segments if isinstance(outcome, SegmentCaptions) else (outcome,)
            content_type = f"{text_type}; charset=utf-8"
            segments = [caption.as_segment() for caption in captions]
            shown = subtitles.on_players_clock(segments, captions[0].video.picture_start_s)
            body = TEXTS[text_type](shown).encode()
        else:
            fields = outcome.as_dict(attention=request.explain)
            timing = fields.pop("timing_ms")
            body = json_body({**fields, "model": self.model, "timing_ms": timing})
        context.set_response_content_type(number, content_type)
        return body


def _text_type(accept: str) -> str | None:
    """The first known media type of an Accept header, None for JSON. Source: RFC 9110, 12.5.1, without weights."""
    for media_range in accept.lower().split(","):
        media_type = media_range.partition(";")[0].strip()
        if media_type in TEXTS:
            return media_type
        if media_type in ("application/json", "*/*"):
            break
    return None
