"""What a chip does at best, how long something takes on it, and what the network asks of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from etenet.model.encoder import Encoder
from etenet.video.sampling import FRAMES_PER_CLIP


def median_ms(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """From the call until its results are there."""
    run()
    return statistics.median(1000 * timed_s(run, device) for _ in range(rounds))


def timed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until its results are there."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(matrix: int, rounds: int, device: torch.device) -> dict[str, float]:
    """A large matrix product in bfloat16, and a large copy (bytes read and written)."""
    a, b = torch.randn(2, matrix, matrix, device=device).to(torch.bfloat16)
    product_ms = median_ms(lambda: a @ b, rounds, device)
    block = torch.randn(matrix, matrix, device=device)
    copy_ms = median_ms(block.clone, rounds, device)
    return {
        "tflop_per_s": 2 * matrix**3 / product_ms / 1e9,
        "copy_gb_per_s": 2 * block.nbytes / copy_ms / 1e6,
    }


def clip_flops(encoder: Encoder, crop_px: int) -> float:
    """Operations for 16 frames, forth only, as torch counts them: two for a multiplication and an addition."""
    device = next(encoder.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder(torch.zeros(1, 3, crop_px, crop_px, device=device))
    return FRAMES_PER_CLIP * float(counter.get_total_flops())
