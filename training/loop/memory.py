"""What training does about memory, and says about it."""

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
    """Let malloc keep what is freed for the next step, where there is a glibc.

    Else every step gets its large tensors from the kernel again, page by page: measured 1.5 times slower.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def checkpoint_activations(network: nn.Module) -> None:
    """Compute each block's activations again in the backward pass instead of keeping them (Chen et al., 2016)."""
    modules: Iterator[Any] = network.modules()
    for module in modules:
        if getattr(module, "inplace", False):
            module.inplace = False  # or it would overwrite what the block before it is computed again from
    for part in network.children():
        for block in part.children() if isinstance(part, nn.Sequential) else (part,):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # GPU only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
