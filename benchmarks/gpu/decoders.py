"""Bytes -> 16 frames on the cores and by the GPU's decoder (NVDEC), from 240p to 4K: ours, PyAV's and torchcodec's."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel
from numpy.typing import NDArray

from benchmarks.gpu.workload import Workload
from benchmarks.rig.clips import drifting
from benchmarks.rig.timing import median_ms
from etenet.linux import cores
from etenet.sandbox.pool import Sandbox
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import middle_of_slices, sample_frames, sample_segments
from etenet.video.segments import WHOLE

RESIZE_PX = 314
ROUNDS = 3
EVERY_SIZE = GpuDecoding(from_pixels=1)


def decoding(workload: Workload) -> dict[str, Any]:
    """Milliseconds for a clip in one thread, and clips per second of all decoder processes together."""
    in_software, on_gpu = Sandbox(resize_px=RESIZE_PX), Sandbox(resize_px=RESIZE_PX, gpu=EVERY_SIZE)
    figures: dict[str, Any] = {"processes": cores(), "gpu_fault_in_the_sandbox": on_gpu.gpu_fault}
    for width, height in workload.sizes:
        clip = drifting(workload.clip_s, width, height)
        row: dict[str, float | bool | str | None] = {
            "one_core_ms": _ms(partial(sample_frames, clip, resize_px=RESIZE_PX)),
            "gpu_ms": _ms(partial(_ours, clip)),
            "gpu_every_frame_ms": _ms(partial(_pyav, clip)),
            "torchcodec_gpu_ms": _ms(partial(_torchcodec, clip)),
        }
        row["cores_clips_per_s"] = _rate(in_software, clip, workload.pooled)
        row["gpu_clips_per_s"] = None if on_gpu.gpu_fault else _rate(on_gpu, clip, workload.pooled)
        if isinstance(row["gpu_ms"], float):
            row["frames_equal"] = np.array_equal(sample_frames(clip, resize_px=RESIZE_PX).frames, _ours(clip))
        figures[f"{width}x{height}"] = row
        print(f"{width}x{height}: {row}", flush=True)
    in_software.close()
    on_gpu.close()
    return figures


def _ms(run: Callable[[], object]) -> float | str:
    try:
        return median_ms(run, ROUNDS, torch.device("cpu"))
    except (ImportError, av.FFmpegError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        return f"not possible here: {error}"[:200]


def _rate(sandbox: Sandbox, clip: bytes, count: int) -> float:
    """Clips per second. Each body is different, so that none is known from before."""
    bodies = [clip + number.to_bytes(8, "big") for number in range(count)]
    started = time.perf_counter()
    for future in [sandbox.submit(body) for body in bodies]:
        future.result()
    return count / (time.perf_counter() - started)


def _ours(clip: bytes) -> NDArray[np.uint8]:
    (whole,) = sample_segments(clip, WHOLE, resize_px=RESIZE_PX, gpu=EVERY_SIZE)
    if not whole.info.on_gpu:
        raise RuntimeError("the GPU did not decode it")
    return whole.frames


def _pyav(clip: bytes) -> None:
    """The GPU decodes every frame, and a core resizes 16 of them."""
    with av.open(io.BytesIO(clip), mode="r", hwaccel=HWAccel("cuda", allow_software_fallback=False)) as container:
        wanted = set(middle_of_slices(container.streams.video[0].frames))
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frame.reformat(RESIZE_PX, RESIZE_PX, format="rgb24").to_ndarray()


def _torchcodec(clip: bytes) -> None:
    """The GPU decodes 16 frames and resizes them."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(clip, device="cuda")
    frames = decoder.get_frames_at(middle_of_slices(len(decoder))).data
    torch.nn.functional.interpolate(frames.float(), size=(RESIZE_PX, RESIZE_PX), mode="bilinear", antialias=True)
    torch.cuda.synchronize()
