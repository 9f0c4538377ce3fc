"""`python -m benchmarks.gpu --out DIR`: what a GPU makes of each stage, beside the plain network and the chip's limits.

Needs the repository, torch and a CUDA GPU, and takes less than eight minutes. The network is untrained, its frames are
noise: speed depends on neither. Which captions come out is looked at with the demo checkpoint. `--dry-run` does all of
it once in miniature, on whatever there is; without a GPU nothing is recorded, and no figure means anything.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import etenet
from benchmarks import saturation
from benchmarks.clips import drifting
from benchmarks.encoder import untrained
from benchmarks.record import REPOSITORY, RESULTS, conclude
from etenet import checkpoint as checkpoints
from etenet.caption_stream import caption_stream
from etenet.captioner import WORDS, Captioner
from etenet.checkpoint import Checkpoint
from etenet.config import FRAMES_PER_CLIP, CaptionOptions
from etenet.cuda_graph import recorded
from etenet.decoder import Decoder
from etenet.decoder_search import GpuSearch, search
from etenet.gpu_encoder import GpuEncoder
from etenet.preprocess import preprocess
from etenet.sandbox import Sandbox
from etenet.segments import WHOLE
from etenet.video import SampledVideo, middle_of_slices, sample_frames
from training import demo_world

DEMO = REPOSITORY / "model_store" / "demo.pt"
SEARCHED_CLIPS = 16


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything is measured."""

    encoder: str = "inceptionresnetv2"
    crop_px: int | None = None
    words: int = 12_000
    max_words: int = 20
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # clips
    rounds: int = 20
    matrix: int = 8192
    rendered: int = 200  # clips whose captions are compared
    streamed: int = 400
    clip_s: float = 10.0
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the capacity
    load_s: float = 4.0  # per point
    sizes: tuple[tuple[int, int], ...] = ((426, 240), (854, 480), (1280, 720), (1920, 1080), (3840, 2160))


MINIATURE = Scale(
    encoder="squeezenet1_1",
    crop_px=64,
    words=30,
    max_words=3,
    batches=(1, 2),
    rounds=1,
    matrix=64,
    rendered=2,
    streamed=4,
    clip_s=2.0,
    shares=(0.5,),
    load_s=0.1,
    sizes=((64, 48),),
)


def median_ms(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """From the call until its results are there."""
    run()
    times = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _at_once(function: Callable[[Tensor], Any], _: Tensor) -> Callable[[Tensor], Any]:
    return function


def ceilings(scale: Scale, device: torch.device) -> dict[str, float]:
    """What the chip does at best: a large matrix product in bfloat16, and a large copy (bytes read and written)."""
    a, b = torch.randn(2, scale.matrix, scale.matrix, device=device).to(torch.bfloat16)
    product_ms = median_ms(lambda: a @ b, scale.rounds, device)
    block = torch.randn(scale.matrix, scale.matrix, device=device)
    copy_ms = median_ms(block.clone, scale.rounds, device)
    return {
        "tflop_per_s": 2 * scale.matrix**3 / product_ms / 1e9,
        "copy_gb_per_s": 2 * block.nbytes / copy_ms / 1e6,
    }


def encoders(checkpoint: Checkpoint, device: torch.device) -> dict[str, Callable[[np.ndarray], Tensor]]:
    """Frames on the host (N, resize_px, resize_px, 3) -> features, by whom."""
    how, record = checkpoint.preprocessing, recorded if device.type == "cuda" else _at_once
    plain = checkpoint.model.encoder.to(device).eval()

    def eager(frames: np.ndarray, dtype: torch.dtype) -> Tensor:
        """As most would write it."""
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pixels = preprocess(torch.from_numpy(frames).to(device), how)
            return plain(pixels.to(memory_format=torch.channels_last))

    ours = {"ours, uncompiled": GpuEncoder(plain, how, device=device, compiled=False, record=record)}
    if device.type == "cuda":
        ours["ours"] = GpuEncoder(plain, how, device=device)
    return {
        **ours,
        "eager torch, bfloat16 autocast": lambda frames: eager(frames, torch.bfloat16),
        "eager torch, float32": lambda frames: eager(frames, torch.float32),
    }


def encoding(checkpoint: Checkpoint, scale: Scale, device: torch.device, tflop_per_s: float) -> dict[str, Any]:
    """Clips per second by batch size, one clip's latency, and the share of the chip's ceiling."""
    how, rng = checkpoint.preprocessing, np.random.default_rng(0)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        checkpoint.model.encoder(torch.zeros(1, 3, how.crop_px, how.crop_px))
    clip_flops = FRAMES_PER_CLIP * counter.get_total_flops()
    shape = (how.resize_px, how.resize_px, 3)
    clips_per_s: dict[str, dict[int, float]] = {}
    started = time.perf_counter()
    contenders = encoders(checkpoint, device)
    prepared_s = time.perf_counter() - started
    reference = rng.integers(0, 256, (FRAMES_PER_CLIP, *shape), dtype=np.uint8)
    expected = contenders["eager torch, float32"](reference)
    for name, run in contenders.items():
        clips_per_s[name] = {}
        for clips in scale.batches:
            frames = rng.integers(0, 256, (clips * FRAMES_PER_CLIP, *shape), dtype=np.uint8)
            ms = median_ms(lambda run=run, frames=frames: run(frames), scale.rounds, device)
            clips_per_s[name][clips] = 1000 * clips / ms
            print(f"{name:32} {clips:3} clips {ms:9.2f} ms {1000 * clips / ms:9.1f} clips/s", flush=True)
    best = {name: max(by_batch.values()) for name, by_batch in clips_per_s.items()}
    ours = "ours" if "ours" in best else "ours, uncompiled"
    cosine = torch.nn.functional.cosine_similarity(contenders[ours](reference).float(), expected.float())
    return {
        "clips_per_s": clips_per_s,
        "best_clips_per_s": best[ours],
        "one_clip_ms": 1000 / clips_per_s[ours][1],
        "share_of_ceiling": best[ours] * clip_flops / (tflop_per_s * 1e12),
        "ratio_to_eager_bfloat16": best[ours] / best["eager torch, bfloat16 autocast"],
        "feature_cosine": float(cosine.min()),
        "prepared_s": prepared_s,
    }


def searching(decoder: Decoder, scale: Scale, device: torch.device) -> dict[str, float]:
    """Beam search of width 5 for 16 clips, recorded and not."""
    decoder = decoder.to(device).eval()
    features = torch.rand(SEARCHED_CLIPS, FRAMES_PER_CLIP, decoder.config.feature_size, device=device)
    record = recorded if device.type == "cuda" else _at_once
    ours = GpuSearch(decoder, max_words=scale.max_words, words=WORDS, device=device, record=record)
    return {
        "ours_ms": median_ms(lambda: ours(features), scale.rounds, device),
        "step_by_step_ms": median_ms(
            lambda: search(decoder, features, beam_size=5, max_words=scale.max_words, words=WORDS),
            scale.rounds,
            device,
        ),
    }


def captions_equal(bodies: Sequence[bytes], device: torch.device) -> dict[str, float]:
    """The share of clips that get the caption of the plain network in float32 on the CPU."""
    options = CaptionOptions()

    def captions(captioner: Captioner) -> list[str]:
        told = dict(caption_stream(captioner, ((n, body, WHOLE) for n, body in enumerate(bodies)), options))
        return [getattr(told[number], "text", str(told[number])) for number in range(len(bodies))]

    expected = captions(etenet.load(DEMO))
    found = captions(etenet.load(DEMO, device=str(device), record_gpu=True))
    return {
        "clips": len(bodies),
        "equal_share": statistics.mean(a == b for a, b in zip(found, expected, strict=True)),
    }


def rendered(count: int) -> list[bytes]:
    """The examples, and clips of the demo world."""
    examples = [path.read_bytes() for path in sorted((REPOSITORY / "examples").glob("*.mp4"))]
    return [*examples, *map(demo_world.render, islice(demo_world.clips(), count))]


def streaming(checkpoint: Path, scale: Scale, device: torch.device) -> dict[str, float]:
    """Bytes to captions beside decoding alone on the same cores, and how long the GPU had nothing to do."""
    clip = drifting(scale.clip_s, 426, 240)
    bodies = [clip + number.to_bytes(8, "big") for number in range(scale.streamed)]  # no two alike
    captioner = etenet.load(checkpoint, device=str(device), record_gpu=True)
    decoders = Sandbox(resize_px=captioner.checkpoint.preprocessing.resize_px)
    started = time.perf_counter()
    frames = [future.result()[0] for future in [decoders.submit(body) for body in bodies]]
    decode_s = time.perf_counter() - started
    decoders.close()
    captioner.caption_decoded(frames[:SEARCHED_CLIPS], CaptionOptions())
    started = time.perf_counter()
    captioner.caption_decoded(frames, CaptionOptions())
    alone_s = time.perf_counter() - started
    started = time.perf_counter()
    videos = ((number, body, WHOLE) for number, body in enumerate(bodies))
    count = sum(1 for _ in caption_stream(captioner, videos, CaptionOptions(), batch_clips=SEARCHED_CLIPS))
    whole_s = time.perf_counter() - started
    assert count == len(bodies)
    return {
        "clips_per_s": count / whole_s,
        "decode_alone_clips_per_s": count / decode_s,
        "share_of_decoding": decode_s / whole_s,
        "gpu_idle_share": 1 - alone_s / whole_s,
    }


def batching(captioner: Captioner, clip: SampledVideo, scale: Scale) -> dict[str, Any]:
    """Latency of captioning decoded clips that come by chance, by how many may go together and how many come.

    A batch is what has come while the one before was computed: nobody is waited for.
    """
    found: dict[str, Any] = {}
    for size in scale.batches:
        clips, options = [clip] * size, CaptionOptions()
        batch_ms = median_ms(
            lambda clips=clips, options=options: captioner.caption_decoded(clips, options), 5, captioner.device
        )
        capacity = 1000 * size / batch_ms
        curve = [_under_load(captioner, clip, size, share * capacity, scale.load_s) for share in scale.shares]
        found[str(size)] = {"capacity_per_s": capacity, "curve": curve}
        print(f"batches of {size}: {capacity:.0f} clips/s", *(f"p99 {point['p99']:.1f}" for point in curve), flush=True)
    return found


def _under_load(
    captioner: Captioner, clip: SampledVideo, most: int, rate_per_s: float, seconds: float
) -> dict[str, float]:
    """Percentiles of ms from the moment a clip is there to its caption."""
    rng, began_s = np.random.default_rng(0), time.perf_counter()
    moments = deque(began_s + np.cumsum(rng.exponential(1 / rate_per_s, 1 + int(seconds * rate_per_s))))
    latencies_ms: list[float] = []
    while moments:
        while moments[0] > time.perf_counter():
            time.sleep(0)
        now = time.perf_counter()
        batch = [moments.popleft() for _ in range(most) if moments and moments[0] <= now]
        captioner.caption_decoded([clip] * len(batch), CaptionOptions())
        latencies_ms += [1000 * (time.perf_counter() - moment) for moment in batch]
    percentiles = np.percentile(latencies_ms, saturation.PERCENTILES)
    named = {f"p{p:g}": float(ms) for p, ms in zip(saturation.PERCENTILES, percentiles, strict=True)}
    return {"rate_per_s": rate_per_s, **named}


def decoding(scale: Scale) -> dict[str, dict[str, float | str]]:
    """Milliseconds for the 16 frames of a clip, on one core and by the GPU's decoder, from 240p to 4K."""
    found: dict[str, dict[str, float | str]] = {}
    for width, height in scale.sizes:
        clip = drifting(scale.clip_s, width, height)
        ours_ms = median_ms(lambda clip=clip: sample_frames(clip, resize_px=314), 3, torch.device("cpu"))
        try:
            nvdec_ms: float | str = median_ms(lambda clip=clip: _by_nvdec(clip), 3, torch.device("cpu"))
        except (av.FFmpegError, NotImplementedError, RuntimeError, ValueError) as error:
            nvdec_ms = f"not possible here: {error}"
        found[f"{width}x{height}"] = {"one_core_ms": ours_ms, "nvdec_ms": nvdec_ms}
    return found


def _by_nvdec(body: bytes) -> None:
    """Every frame by the GPU's decoder, of which 16 come to the host and are resized."""
    hardware = HWAccel("cuda", allow_software_fallback=False)
    with av.open(io.BytesIO(body), hwaccel=hardware) as container:
        wanted = set(middle_of_slices(container.streams.video[0].frames))
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frame.reformat(314, 314, format="rgb24").to_ndarray()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="all of it once, in miniature")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    scale = MINIATURE if options.dry_run else Scale()
    if not torch.cuda.is_available() and not options.dry_run:
        sys.exit("gpu: there is no CUDA GPU here; --dry-run tries the code without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = checkpoints.default_preprocessing(scale.encoder, crop_px=scale.crop_px)
    frames = torch.randint(0, 256, (FRAMES_PER_CLIP, how.resize_px, how.resize_px, 3), dtype=torch.uint8)
    checkpoint = untrained(scale.encoder, scale.crop_px, frames, words=scale.words)
    figures: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "untrained.pt"
        checkpoints.save(checkpoint, path)
        figures["ceilings"] = ceilings(scale, device)
        figures["encoder"] = encoding(checkpoint, scale, device, figures["ceilings"]["tflop_per_s"])
        figures["beam_search"] = searching(checkpoint.model.decoder, scale, device)
        figures["captions"] = captions_equal(rendered(scale.rendered), device)
        figures["stream"] = streaming(path, scale, device)
        captioner = etenet.load(path, device=str(device), record_gpu=True)
        (clip,) = captioner.decode(drifting(scale.clip_s, 426, 240)).result()
        figures["batches"] = batching(captioner, clip, scale)
        figures["decoding"] = decoding(scale)
    for name, found in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float)))
    best = max(figures["batches"].values(), key=lambda of_size: of_size["capacity_per_s"])
    options.out.mkdir(parents=True, exist_ok=True)
    saturation.draw(best["curve"], best["capacity_per_s"], options.out / "gpu.png")
    conclude("gpu", {"dry_run": options.dry_run, "device": str(device), **figures}, folder=options.out)


if __name__ == "__main__":
    main()
