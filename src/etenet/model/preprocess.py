"""Frames -> encoder input, as training and the form of the network on torch compute it.

`runtime/openvino.py` and `runtime/cuda/fusion.py` have the same arithmetic in their graphs, and are checked against it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from etenet.model.config import Preprocessing, crop_start


def preprocess(frames: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Centre crop and normalise.

    frames: (..., resize_px, resize_px, 3) uint8 RGB -> (..., 3, crop_px, crop_px) float32.
    """
    expected = (preprocessing.resize_px, preprocessing.resize_px, 3)
    if frames.dtype != torch.uint8 or frames.shape[-3:] != expected:
        raise ValueError(f"expected uint8 frames (..., {expected}), got {frames.dtype} {tuple(frames.shape)}")
    start = crop_start(preprocessing)
    inside = slice(start, start + preprocessing.crop_px)
    pixels = frames[..., inside, inside, :].movedim(-1, -3).float()
    if preprocessing.channels == "BGR":
        pixels = pixels.flip(-3)
    mean, std = _mean_and_std(preprocessing, frames.device)
    return (pixels * (preprocessing.input_max / 255) - mean) / std


@cache
def _mean_and_std(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per channel, (3, 1, 1) each. Cached: copying them to a GPU blocks the host."""
    with torch.inference_mode(False):  # or training could not use tensors that inference has cached
        mean, std = (
            torch.tensor(values, device=device)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
        )
    return mean, std
