"""Frames -> encoder input. The one function that training, evaluation and serving all use."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from etenet.model.config import Preprocessing


def preprocess(frames: Tensor, how: Preprocessing) -> Tensor:
    """Centre crop and normalise.

    frames: (..., resize_px, resize_px, 3) uint8 RGB -> (..., 3, crop_px, crop_px) float32.
    """
    if frames.dtype != torch.uint8 or frames.shape[-3:] != (how.resize_px, how.resize_px, 3):
        wanted = f"(..., {how.resize_px}, {how.resize_px}, 3)"
        raise ValueError(f"expected uint8 frames {wanted}, got {frames.dtype} {tuple(frames.shape)}")
    start = crop_start(how)
    inside = slice(start, start + how.crop_px)
    pixels = frames[..., inside, inside, :].movedim(-1, -3).float()
    if how.channels == "BGR":
        pixels = pixels.flip(-3)
    mean, std = _of_channels(how, frames.device)
    return (pixels * (how.input_max / 255) - mean) / std


@cache
def _of_channels(how: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3, 1, 1) each; kept, as who brings them to a GPU waits for it."""
    with torch.inference_mode(False):  # for training, too, whoever comes first
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (how.mean, how.std))
    return mean, std


def crop_start(how: Preprocessing) -> int:
    """First row and column of the centre crop; halves are rounded to even, as torchvision's CenterCrop does."""
    return round((how.resize_px - how.crop_px) / 2)
