"""Frames on the host -> features on the GPU: ours, eager and compiled torch, ONNX Runtime, TensorRT, and the ceiling.

The peers are set up as a fair user would: torch normalises the frames on the GPU, the network runs in half precision,
and its inputs and outputs stay on the GPU.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.workload import Workload
from benchmarks.rig.chip import clip_flops
from benchmarks.rig.timing import median_ms, timed_s, wait_for
from etenet.model.checkpoint import Checkpoint
from etenet.model.preprocess import preprocess
from etenet.runtime.cuda import GpuEncoder
from etenet.video.clip import FRAMES_PER_CLIP

Encode = Callable[[NDArray[np.uint8]], Tensor]
OURS, EXACT = "ours", "eager torch, float32"
PEERS = ("torch.compile, float16", "eager torch, float16 autocast", EXACT, "ONNX Runtime", "TensorRT")


def encoding(
    checkpoint: Checkpoint, workload: Workload, device: torch.device, tflop_per_s: float, folder: Path
) -> dict[str, Any]:
    """Clips per second by batch size, the latency of one clip, the share of the chip's ceiling, ratios to the peers."""
    size_px, rng = checkpoint.preprocessing.resize_px, np.random.default_rng(0)
    most = max(workload.batches) * FRAMES_PER_CLIP
    frames = rng.integers(0, 256, (most, size_px, size_px, 3), dtype=np.uint8)
    figures: dict[str, dict[str, Any]] = {}
    features: dict[str, Tensor] = {}
    for name, prepare in contenders(checkpoint, workload, device, folder):
        started = time.perf_counter()
        try:
            encode = prepare()
            features[name] = encode(frames[:FRAMES_PER_CLIP]).float().cpu()
        except Exception as error:
            figures[name] = {"not_possible_here": f"{type(error).__name__}: {error}"[:300]}
        else:
            prepared_s = time.perf_counter() - started
            figures[name] = {"prepared_s": prepared_s, **_speed(encode, frames, workload, device)}
            del encode
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {figures[name]}", flush=True)
    ours = figures[OURS]["best_clips_per_s"]
    best = {name: row["best_clips_per_s"] for name, row in figures.items() if "best_clips_per_s" in row}
    flops = clip_flops(checkpoint.encoder, checkpoint.preprocessing.crop_px)
    cosine = torch.nn.functional.cosine_similarity(features[OURS], features[EXACT])
    return {
        "contenders": figures,
        "clip_gflop": flops / 1e9,
        "best_clips_per_s": ours,
        "one_clip_ms": figures[OURS]["one_clip_ms"],
        "share_of_ceiling": ours * flops / (tflop_per_s * 1e12),
        "ratio_to_peers": {name: ours / best[name] for name in PEERS if name in best},
        "feature_cosine": float(cosine.min()),
    }


def contenders(
    checkpoint: Checkpoint, workload: Workload, device: torch.device, folder: Path
) -> Iterator[tuple[str, Callable[[], Encode]]]:
    """Names, and what prepares each."""
    preprocessing, plain = checkpoint.preprocessing, checkpoint.encoder.to(device).eval()
    on_gpu = device.type == "cuda"

    @torch.inference_mode()
    def eager(frames: NDArray[np.uint8], *, half: bool) -> Tensor:
        """As most people would write it."""
        with torch.autocast(device.type, torch.float16 if on_gpu else torch.bfloat16, enabled=half):
            pixels = preprocess(torch.from_numpy(frames).to(device), preprocessing)
            features: Tensor = plain(pixels.to(memory_format=torch.channels_last))
            return features

    ours = partial(GpuEncoder, plain, preprocessing, frames_per_clip=FRAMES_PER_CLIP, device=device)
    yield OURS, lambda: ours(compiled=on_gpu)
    yield "ours, uncompiled", lambda: ours(compiled=False)
    yield PEERS[0], lambda: by_torch_compile(checkpoint, device)
    yield PEERS[1], lambda: lambda frames: eager(frames, half=True)
    yield EXACT, lambda: lambda frames: eager(frames, half=False)
    yield PEERS[3], lambda: by_onnxruntime(checkpoint, workload, device, folder, "CUDA" if on_gpu else "CPU")
    yield PEERS[4], lambda: by_onnxruntime(checkpoint, workload, device, folder, "Tensorrt")


def by_torch_compile(checkpoint: Checkpoint, device: torch.device) -> Encode:
    """The network as it is, through torch's compiler with CUDA graphs of its own: what our fusing must beat."""
    on_gpu, preprocessing = device.type == "cuda", checkpoint.preprocessing
    dtype = torch.float16 if on_gpu else torch.float32
    network: Any = copy.deepcopy(checkpoint.encoder).to(device, dtype).to(memory_format=torch.channels_last).eval()
    compiled: Any = torch.compile(network, mode="reduce-overhead", disable=not on_gpu)

    @torch.inference_mode()
    def encode(frames: NDArray[np.uint8]) -> Tensor:
        pixels = preprocess(torch.from_numpy(frames).to(device), preprocessing).to(dtype)
        features: Tensor = compiled(pixels.contiguous(memory_format=torch.channels_last))
        return features.clone()  # the next call overwrites it

    return encode


def by_onnxruntime(
    checkpoint: Checkpoint, workload: Workload, device: torch.device, folder: Path, provider: str
) -> Encode:
    """The network by one of ONNX Runtime's providers. `RuntimeError` if that is not installed."""
    import onnxruntime

    provider += "ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this ONNX Runtime has no {provider}")
    if device.type == "cuda":
        onnxruntime.preload_dlls()  # torch's CUDA libraries
    preprocessing, dtype = checkpoint.preprocessing, torch.float16 if device.type == "cuda" else torch.float32
    graph = folder / "network.onnx"
    if not graph.exists():
        _export(checkpoint, device, dtype, graph)
    shapes = {
        name: f"pixels:{clips * FRAMES_PER_CLIP}x3x{preprocessing.crop_px}x{preprocessing.crop_px}"
        for name, clips in (("min", 1), ("opt", max(workload.batches)), ("max", max(workload.batches)))
    }
    settings = {f"trt_profile_{name}_shapes": shape for name, shape in shapes.items()} | {"trt_fp16_enable": "True"}
    session = onnxruntime.InferenceSession(
        graph, providers=[(provider, settings if provider.startswith("Tensorrt") else {})]
    )
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} does not load here")
    size = checkpoint.model.decoder.config.feature_size

    @torch.inference_mode()
    def encode(frames: NDArray[np.uint8]) -> Tensor:
        pixels = preprocess(torch.from_numpy(frames).to(device), preprocessing).to(dtype).contiguous()
        features = torch.empty(len(frames), size, device=device)
        binding = session.io_binding()
        place = device.type, device.index or 0
        kind = np.float16 if dtype == torch.float16 else np.float32
        binding.bind_input("pixels", *place, kind, tuple(pixels.shape), pixels.data_ptr())
        binding.bind_output("features", *place, np.float32, tuple(features.shape), features.data_ptr())
        wait_for(device)
        session.run_with_iobinding(binding)
        return features

    return encode


def _export(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, graph: Path) -> None:
    encoder, crop_px = copy.deepcopy(checkpoint.encoder).to(device, dtype).eval(), checkpoint.preprocessing.crop_px
    torch.onnx.export(
        encoder,
        (torch.zeros(FRAMES_PER_CLIP, 3, crop_px, crop_px, device=device, dtype=dtype),),
        graph,
        input_names=["pixels"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("frames")},),
        dynamo=True,
        verbose=False,
    )


def _speed(encode: Encode, frames: NDArray[np.uint8], workload: Workload, device: torch.device) -> dict[str, Any]:
    """Latency of one clip, and throughput of batches launched one after the other, waiting only for the last."""
    clips_per_s = {}
    for clips in workload.batches:
        batch = frames[: clips * FRAMES_PER_CLIP]
        encode(batch)
        calls = partial(_calls, encode, batch, workload.rounds)
        seconds = statistics.median(timed_s(calls, device) for _ in range(3))
        clips_per_s[clips] = workload.rounds * clips / seconds
    one = frames[:FRAMES_PER_CLIP]
    return {
        "one_clip_ms": median_ms(lambda: encode(one), workload.rounds, device),
        "clips_per_s": clips_per_s,
        "best_clips_per_s": max(clips_per_s.values()),
    }


def _calls(encode: Encode, batch: NDArray[np.uint8], count: int) -> None:
    for _ in range(count):
        encode(batch)
