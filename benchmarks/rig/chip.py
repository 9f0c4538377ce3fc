"""What a chip does at best, and what the network asks of it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rig.timing import median_ms
from etenet.model.encoder import Encoder
from etenet.video.clip import FRAMES_PER_CLIP


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
    """Operations of the forward pass for 16 frames, as torch counts them: a multiplication with an addition is two."""
    device = next(encoder.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder(torch.zeros(1, 3, crop_px, crop_px, device=device))
    return FRAMES_PER_CLIP * float(counter.get_total_flops())
