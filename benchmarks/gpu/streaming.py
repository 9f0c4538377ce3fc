"""Bytes -> captions, as batch jobs go: beside decoding alone on the same cores, and what the GPU does meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import etenet
from benchmarks.gpu.workload import Workload
from benchmarks.rig.clips import drifting
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import caption_stream
from etenet.sandbox.pool import Sandbox
from etenet.video.segments import WHOLE

BATCH_CLIPS = 16


def streaming(checkpoint: Path, workload: Workload, device: torch.device) -> dict[str, float]:
    """Clips per second; and for which share of the time the GPU and what feeds it have nothing to do."""
    clip = drifting(workload.clip_s, 426, 240)
    bodies = [clip + number.to_bytes(8, "big") for number in range(workload.streamed)]  # no two alike
    captioner = etenet.load(checkpoint, device=str(device), record_gpu=True)
    decoders = Sandbox(resize_px=captioner.checkpoint.preprocessing.resize_px)
    started = time.perf_counter()
    decoded = [future.result()[0] for future in [decoders.submit(body) for body in bodies]]
    decode_s = time.perf_counter() - started
    decoders.close()
    captioner.caption_decoded(decoded[:BATCH_CLIPS], CaptionOptions())
    started = time.perf_counter()
    captioner.caption_decoded(decoded, CaptionOptions())
    alone_s = time.perf_counter() - started
    del decoded
    started = time.perf_counter()
    videos = ((number, body, WHOLE) for number, body in enumerate(bodies))
    count = sum(1 for _ in caption_stream(captioner, videos, CaptionOptions(), batch_clips=BATCH_CLIPS))
    whole_s = time.perf_counter() - started
    assert count == len(bodies)
    return {
        "clips_per_s": count / whole_s,
        "decode_alone_clips_per_s": count / decode_s,
        "captioning_alone_clips_per_s": count / alone_s,
        "share_of_decoding": decode_s / whole_s,
        "gpu_idle_share": 1 - alone_s / whole_s,
    }
