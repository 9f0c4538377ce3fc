"""The only file that speaks TorchServe's handler protocol: rows and headers in, JSON bytes out.

TorchServe wants exactly one class here. One exception would answer for a whole batch, so none leaves `handle`: every
row gets its own status and its own body. Status phrases are fixed ASCII and bodies are bytes, since a newline or a
lone surrogate in either would kill the worker.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import etenet
from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.captioning import subtitles
from etenet.captioning.captions import Outcome, SegmentCaptions
from etenet.captioning.options import OPTIONS
from etenet.errors import ERROR_HEADER, DeviceFailed, EmptyBody, InternalError, NotAVideo, Overloaded
from etenet.serving.archive import ENCODER_FILE, GPU_KERNELS_FILE, verify
from etenet.serving.config import FAILURE_FILE_VARIABLE
from etenet.serving.request_log import Answered, record
from etenet.video.nvdec import GpuDecoding

_log = logging.getLogger("etenet.handler")

CANARY = CANARY_CLIP.read_bytes()
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
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        verify(folder)
        config = context.model_yaml_config or {}
        device, gpu_decoding = "cpu", None
        if torch.cuda.is_available() and properties.get("gpu_id") is not None:
            device, gpu_decoding = _on_gpu(int(properties["gpu_id"]), config.get("gpu", {}))
        model = context.manifest["model"]
        graph, kernels = (folder / name for name in (ENCODER_FILE, GPU_KERNELS_FILE))
        self.captioner = etenet.load(
            folder / model["serializedFile"],
            device=device,
            limits=etenet.DecodeLimits(**config.get("etenet", {})),
            compiled_encoder=graph if graph.exists() else None,
            record_gpu=True,
            gpu_kernels=kernels if kernels.exists() else None,
            gpu_decoding=gpu_decoding,
        )
        self.captioner.caption(CANARY)
        checkpoint = self.captioner.checkpoint_id
        metrics.WORKER_START.set_to_current_time()
        metrics.MODEL_INFO.labels(model["modelVersion"], self.captioner.encoder, checkpoint, device).set(1)
        self.model = {
            "name": context.model_name,
            "version": model["modelVersion"],
            "encoder": self.captioner.encoder,
            "checkpoint": checkpoint,
        }

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        started, count = time.perf_counter(), len(data)
        headers = [_text_headers(context.get_all_request_header(number)) for number in range(count)]
        waited_s = [metrics.seconds_since(of_request.get("x-request-start", "")) for of_request in headers]
        with metrics.in_progress(count):
            outcomes = self._outcomes(data, headers)
            answers = [self._answer(number, outcomes[number], headers[number], context) for number in range(count)]
        seconds = time.perf_counter() - started
        record(
            [
                Answered(
                    id=str(context.get_request_id(number)),
                    body_bytes=_size(data[number]),
                    waited_s=waited_s[number],
                    seconds=seconds,
                    outcome=outcomes[number],
                )
                for number in range(count)
                if data[number].get("body") != CANARY
            ]
        )
        return answers

    def _outcomes(self, data: list[Mapping[str, Any]], headers: list[dict[str, str]]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        bodies: dict[int, bytes] = {}
        options: dict[int, etenet.CaptionOptions] = {}
        for number, row in enumerate(data):
            try:
                options[number] = etenet.CaptionOptions.parse(_option_texts(row, headers[number]))
                bodies[number] = _body(row)
            except etenet.CaptionError as error:
                outcomes[number] = error
        good = [number for number in range(len(data)) if number not in outcomes]
        try:
            captions = self.captioner.caption_batch(
                [bodies[number] for number in good], [options[number] for number in good]
            )
            outcomes.update(zip(good, captions, strict=True))
        except DeviceFailed:
            _log.exception("this worker cannot go on; TorchServe starts another")
            logging.shutdown()
            os._exit(1)
        except Exception:
            _log.exception("captioning a batch failed in a way that is our own bug")
            outcomes.update(dict.fromkeys(good, InternalError("the clip could not be captioned; the log says why")))
        return [outcomes[number] for number in range(len(data))]

    def _answer(self, number: int, outcome: Outcome, headers: Mapping[str, str], context: Any) -> bytes:
        content_type = "application/json"
        if isinstance(outcome, etenet.CaptionError):
            context.set_response_status(outcome.status.value, outcome.status.phrase, number)
            context.set_response_header(number, ERROR_HEADER, outcome.code)
            if isinstance(outcome, Overloaded):
                context.set_response_header(number, "Retry-After", "1")
            body = _json(outcome.as_dict())
        elif wanted := _wanted_text(headers.get("accept", "")):
            captions = outcome.segments if isinstance(outcome, SegmentCaptions) else (outcome,)
            content_type = f"{wanted}; charset=utf-8"
            body = TEXTS[wanted]([caption.as_segment() for caption in captions]).encode()
        else:
            answer = outcome.as_dict(attention=headers.get("explain") == "True")
            timing = answer.pop("timing_ms")
            body = _json({**answer, "model": self.model, "timing_ms": timing})
        context.set_response_content_type(number, content_type)
        return body


def _on_gpu(number: int, settings: Mapping[str, Any]) -> tuple[str, GpuDecoding | None]:
    """The device of a worker that TorchServe gave a GPU, and which clips that decodes, too."""
    from_pixels = settings.get("decode_from_pixels", 0)
    return f"cuda:{number}", GpuDecoding(device=number, from_pixels=from_pixels) if from_pixels else None


def _text_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Header names in lower case; TorchServe mixes in dictionaries, one per form field, which are left out."""
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def _wanted_text(accept: str) -> str | None:
    """The first media type that we know, if that is not JSON. Source: RFC 9110, 12.5.1, without weights."""
    for media_range in accept.lower().split(","):
        media_type = media_range.partition(";")[0].strip()
        if media_type in TEXTS:
            return media_type
        if media_type in ("application/json", "*/*"):
            break
    return None


def _option_texts(row: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, str]:
    """Options from headers; a form field of the option's own name goes before them."""
    texts = {}
    for option in OPTIONS:
        if option.name in row:
            texts[option.name] = _bytes(row[option.name]).decode(errors="replace")
        elif option.header.lower() in headers:
            texts[option.name] = headers[option.header.lower()]
    return texts


def _body(row: Mapping[str, Any]) -> bytes:
    """The video: the request's body, or the form field `data`."""
    for name in ("body", "data"):
        if name in row:
            return _bytes(row[name])
    raise EmptyBody(
        "there is no video in the request; send it as the body (curl -T clip.mp4) or as the form field 'data'"
    )


def _size(row: Mapping[str, Any]) -> int:
    sent = row.get("body", row.get("data"))
    return len(sent) if isinstance(sent, bytes | bytearray | str) else 0


def _bytes(value: Any) -> bytes:
    """With another configuration than ours, TorchServe gives text as str and JSON as what it parses to."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return value.encode(errors="replace")
    raise NotAVideo("the body is JSON; send the video itself, for example with curl -T clip.mp4")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()
