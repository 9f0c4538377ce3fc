"""Bytes -> 16 frames by the cores and by the GPU's decoder (NVDEC), from 240p to 4K: ours, PyAV's and torchcodec's."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel

from benchmarks.gpu.workload import Workload
from benchmarks.rig.clips import drifting
from benchmarks.rig.timing import median_ms
from etenet.sandbox.pool import Sandbox
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import middle_of_slices, sample_frames, sample_segments
from etenet.video.segments import WHOLE

RESIZE_PX = 314
ROUNDS = 3
EVERY_SIZE = GpuDecoding(from_pixels=1)


def decoding(workload: Workload) -> dict[str, Any]:
    """Milliseconds for a clip by one thread, and clips per second of all decoder processes together."""
    in_software, on_gpu = Sandbox(resize_px=RESIZE_PX), Sandbox(resize_px=RESIZE_PX, gpu=EVERY_SIZE)
    found: dict[str, Any] = {"processes": len(os.sched_getaffinity(0)), "gpu_fault_behind_the_wall": on_gpu.gpu_fault}
    for width, height in workload.sizes:
        clip = drifting(workload.clip_s, width, height)
        contenders: dict[str, Callable[[], object]] = {
            "one_core_ms": lambda clip=clip: sample_frames(clip, resize_px=RESIZE_PX),
            "gpu_ms": lambda clip=clip: _by_us(clip),
            "gpu_every_frame_ms": lambda clip=clip: _by_pyav(clip),
            "torchcodec_gpu_ms": lambda clip=clip: _by_torchcodec(clip),
        }
        row: dict[str, float | bool | str | None] = {name: _ms(run) for name, run in contenders.items()}
        row["cores_clips_per_s"] = _together(in_software, clip, workload.pooled)
        row["gpu_clips_per_s"] = None if on_gpu.gpu_fault else _together(on_gpu, clip, workload.pooled)
        if isinstance(row["gpu_ms"], float):
            row["frames_equal"] = np.array_equal(sample_frames(clip, resize_px=RESIZE_PX).frames, _by_us(clip))
        found[f"{width}x{height}"] = row
        print(f"{width}x{height}: {row}", flush=True)
    in_software.close()
    on_gpu.close()
    return found


def _ms(run: Callable[[], object]) -> float | str:
    try:
        return median_ms(run, ROUNDS, torch.device("cpu"))
    except (ImportError, av.FFmpegError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        return f"not possible here: {error}"[:200]


def _together(sandbox: Sandbox, clip: bytes, count: int) -> float:
    bodies = [clip + number.to_bytes(8, "big") for number in range(count)]
    started = time.perf_counter()
    for future in [sandbox.submit(body) for body in bodies]:
        future.result()
    return count / (time.perf_counter() - started)


def _by_us(clip: bytes) -> np.ndarray:
    (video,) = sample_segments(clip, WHOLE, resize_px=RESIZE_PX, gpu=EVERY_SIZE)
    if not video.on_gpu:
        raise RuntimeError("the GPU did not decode it")
    return video.frames


def _by_pyav(clip: bytes) -> None:
    """Every frame decoded by the GPU, of which 16 are resized by a core."""
    with av.open(io.BytesIO(clip), hwaccel=HWAccel("cuda", allow_software_fallback=False)) as container:
        wanted = set(middle_of_slices(container.streams.video[0].frames))
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frame.reformat(RESIZE_PX, RESIZE_PX, format="rgb24").to_ndarray()


def _by_torchcodec(clip: bytes) -> None:
    """16 frames decoded, and resized, by the GPU."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(clip, device="cuda")
    frames = decoder.get_frames_at(middle_of_slices(len(decoder))).data
    torch.nn.functional.interpolate(frames.float(), size=(RESIZE_PX, RESIZE_PX), mode="bilinear", antialias=True)
    torch.cuda.synchronize()
