"""The memory of a training process: reuse of freed memory, recomputed activations, and the peak."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next step. Does nothing with another C library.

    By default every step gets its large tensors from the kernel again, page by page: measured 1.5 times slower.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute each block's activations in the backward pass instead of storing them (Chen et al., 2016)."""
    modules: Iterator[Any] = network.modules()
    for module in modules:
        if getattr(module, "inplace", False):
            module.inplace = False  # in place, it would overwrite the input that its block is recomputed from
    for part in network.children():
        for block in part.children() if isinstance(part, nn.Sequential) else (part,):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # GPU only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
