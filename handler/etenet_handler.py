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
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import etenet
from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.captioning import subtitles
from etenet.captioning.captions import Caption, Outcome, SegmentCaptions
from etenet.captioning.feature_cache import DEFAULT_BYTES
from etenet.captioning.stream import Stage
from etenet.errors import DeviceFailed, InternalError
from etenet.runtime import PACKAGED
from etenet.runtime.load import working_device
from etenet.serving import streaming
from etenet.serving.archive import ENCODER_FILE, GPU_KERNELS_FILE, verify
from etenet.serving.config import FAILURE_FILE_VARIABLE, PROBE_SECRET_VARIABLE
from etenet.serving.http import json_body
from etenet.serving.request import Request
from etenet.serving.request_log import RequestRecord, record_batch
from etenet.serving.response import error_body, set_headers
from etenet.serving.warnings_log import show_warnings

if TYPE_CHECKING:
    from etenet.serving.spans import Spans

_log = logging.getLogger("etenet.handler")

JSON = "application/json"
HAS_BEGUN_HEADER = "ts_stream_next"  # of a response of which TorchServe has sent a part
COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
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
            compiled_encoder=graph if graph.exists() else False,
            precision=config.get("precision", PACKAGED),
            record_gpu=True,
            gpu_kernels=kernels if kernels.exists() else None,
            feature_cache_bytes=feature_cache_bytes,
        )
        self.captioner.caption(CANARY_CLIP.read_bytes(), fresh=True)
        self.probe_secret = os.environ.get(PROBE_SECRET_VARIABLE, "")
        self.max_words = self.captioner.checkpoint.max_words
        self.spans = _spans()
        checkpoint, precision = self.captioner.checkpoint_id, self.captioner.network.precision
        metrics.allocate()
        metrics.WORKER_START.set_to_current_time()
        metrics.MODEL_INFO.labels(model["modelVersion"], self.captioner.encoder, precision, checkpoint, device).set(1)
        self.model = {
            "name": context.model_name,
            "version": model["modelVersion"],
            "encoder": self.captioner.encoder,
            "precision": precision,
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
                    max_words=self.max_words,
                )
                for number, row in enumerate(data)
            ]
            stages: list[Stage[int]] = []
            outcomes = self._outcomes(requests, stages, context)
            if self.spans:
                requests = self.spans.record(requests, outcomes, stages, started)
            pairs = list(zip(requests, outcomes, strict=True))
            bodies = [self._response(number, *pair, context) for number, pair in enumerate(pairs)]
        seconds = time.perf_counter() - started
        record_batch([RequestRecord(request=request, outcome=outcome, seconds=seconds) for request, outcome in pairs])
        return bodies

    def _outcomes(self, requests: Sequence[Request], stages: list[Stage[int]], context: Any) -> list[Outcome]:
        """Of each request. What was done for them is added to `stages`, by their numbers."""
        good = [number for number, request in enumerate(requests) if not request.error]

        def on_stage(stage: Stage[int]) -> None:
            stages.append(replace(stage, videos=frozenset(good[number] for number in stage.videos)))

        try:
            captioned = self.captioner.caption_batch(
                [requests[number].body for number in good],
                [requests[number].options for number in good],
                [self._sender(number, requests[number], context) for number in good],
                fresh=[place for place, number in enumerate(good) if requests[number].is_probe],
                on_stage=on_stage,
            )
            captions = iter(captioned)
            return [request.error or next(captions) for request in requests]
        except DeviceFailed:
            _log.exception("this worker cannot go on; TorchServe starts another")
            logging.shutdown()
            os._exit(1)
        except Exception:
            _log.exception("captioning a batch failed because of a bug")
            bug = InternalError("the clip could not be captioned; the log says why")
            return [request.error or bug for request in requests]

    def _sender(self, number: int, request: Request, context: Any) -> Callable[[Caption], None] | None:
        """What sends each caption of a response in pieces before the rest, which has then begun with status 200."""
        media_type = _media_type(request)
        if media_type not in streaming.FORMS:
            return None
        from ts.handler_utils.utils import send_intermediate_predict_response  # as the worker itself has it

        def send(caption: Caption) -> None:
            set_headers(context, number, request)
            context.set_response_content_type(number, media_type)
            for name, value in streaming.HEADERS.items():
                context.set_response_header(number, name, value)
            piece = streaming.piece(media_type, caption, attention=request.explain)
            id_of_torchserve = {number: context.get_request_id(number)}
            send_intermediate_predict_response({number: piece}, id_of_torchserve, "", HTTPStatus.OK, context)

        return send

    def _response(self, number: int, request: Request, outcome: Outcome, context: Any) -> bytes:
        """Of one request, whatever happens: an exception would be that of the whole batch."""
        try:
            return self._respond(number, request, outcome, context)
        except Exception:
            _log.exception("a response could not be made because of a bug")
            bug = InternalError("the response could not be made; the log says why")
            return self._respond(number, request, bug, context)

    def _respond(self, number: int, request: Request, outcome: Outcome, context: Any) -> bytes:
        """Set status and headers of a response, and return its body."""
        set_headers(context, number, request)
        media_type = _media_type(request)
        if media_type in streaming.FORMS and HAS_BEGUN_HEADER in context.get_response_headers(number):
            return streaming.last_piece(media_type, outcome, self.model)
        if isinstance(outcome, etenet.CaptionError):
            return error_body(context, number, outcome)
        if request.chat:
            content_type, body = request.chat.respond(
                outcome,
                id=request.id,
                checkpoint=self.model["checkpoint"],
                max_words=request.options.max_words or self.max_words,
            )
        elif media_type in TEXTS:
            captions = outcome.segments if isinstance(outcome, SegmentCaptions) else (outcome,)
            content_type = f"{media_type}; charset=utf-8"
            segments = [caption.as_segment() for caption in captions]
            shown = subtitles.on_players_clock(segments, captions[0].video.picture_start_s)
            body = TEXTS[media_type](shown).encode()
        else:
            fields = outcome.as_dict(attention=request.explain)
            timing, content_type = fields.pop("timing_ms"), JSON
            body = json_body({**fields, "model": self.model, "timing_ms": timing})
        context.set_response_content_type(number, content_type)
        return body


def _media_type(request: Request) -> str:
    """The first known media type of an Accept header, or else JSON. Source: RFC 9110, 12.5.1, without weights."""
    for media_range in () if request.chat else request.accept.lower().split(","):
        media_type = media_range.partition(";")[0].strip()
        if media_type in TEXTS or media_type in streaming.FORMS:
            return media_type
        if media_type in (JSON, "*/*"):
            break
    return JSON


def _spans() -> Spans | None:
    """What sends spans to the collector that a variable names; None without one, and then OpenTelemetry stays out."""
    if not any(map(os.environ.get, COLLECTOR_VARIABLES)):
        return None
    try:
        from etenet.serving.spans import Spans
    except ImportError as error:
        _log.warning("no spans are sent, as OpenTelemetry is missing (%s): pip install 'etenet[telemetry]'", error)
        return None
    return Spans.to_collector()
