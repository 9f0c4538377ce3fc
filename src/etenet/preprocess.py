"""Frames -> encoder input. The one function that training, evaluation and serving all use."""

from __future__ import annotations

import torch
from torch import Tensor

from etenet.config import Preprocessing


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
    mean = torch.tensor(how.mean, device=frames.device)[:, None, None]
    std = torch.tensor(how.std, device=frames.device)[:, None, None]
    return (pixels * (how.input_max / 255) - mean) / std


def crop_start(how: Preprocessing) -> int:
    """First row and column of the centre crop; halves are rounded to even, as torchvision's CenterCrop does."""
    return round((how.resize_px - how.crop_px) / 2)
