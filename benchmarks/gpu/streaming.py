"""Bytes -> captions as in batch jobs, beside decoding alone on the same cores, and the GPU's idle share."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import etenet
from benchmarks.gpu.workload import Workload
from benchmarks.rig.clips import drifting
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Video
from etenet.runtime import GPU_BATCH_CLIPS
from etenet.sandbox.pool import Sandbox


def streaming(checkpoint: Path, workload: Workload, device: torch.device) -> dict[str, float]:
    """Clips per second, and the share of the time in which the GPU and the thread that feeds it wait for frames."""
    clip = drifting(workload.clip_s, 426, 240)
    bodies = [clip + number.to_bytes(8, "big") for number in range(workload.streamed)]  # all different
    captioner = etenet.load(checkpoint, device=str(device), record_gpu=True)
    decoders = Sandbox(resize_px=captioner.checkpoint.preprocessing.resize_px)
    started = time.perf_counter()
    decoded = [future.result()[0] for future in [decoders.submit(body) for body in bodies]]
    decode_s = time.perf_counter() - started
    decoders.close()
    batches = [decoded[at : at + GPU_BATCH_CLIPS] for at in range(0, len(decoded), GPU_BATCH_CLIPS)]
    captioner.caption_decoded(batches[0], CaptionOptions())
    started = time.perf_counter()
    for batch in batches:
        captioner.caption_decoded(batch, CaptionOptions())
    captioning_s = time.perf_counter() - started
    del decoded, batches
    videos = [Video(number, body, CaptionOptions()) for number, body in enumerate(bodies)]
    started = time.perf_counter()
    count = sum(1 for _ in captioner.caption_stream(videos, batch_clips=GPU_BATCH_CLIPS))
    whole_s = time.perf_counter() - started
    assert count == len(bodies)
    return {
        "clips_per_s": count / whole_s,
        "decode_alone_clips_per_s": count / decode_s,
        "captioning_alone_clips_per_s": count / captioning_s,
        "share_of_decoding": decode_s / whole_s,
        "gpu_idle_share": 1 - captioning_s / whole_s,
    }
