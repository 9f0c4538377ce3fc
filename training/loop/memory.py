"""The memory of a training process: reuse of freed memory, recomputed activations, the peak, and its end."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from etenet.errors import UsageError
from training.run_settings import Stage

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


@contextmanager
def out_of_memory_named(stage: Stage) -> Iterator[None]:
    """Turn running out of memory, on a GPU or not, into a `UsageError` that says which two settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a GPU's is a RuntimeError with a name, a CPU's one without
        if not _is_out_of_memory(error):
            raise
        raise UsageError(f"out of memory; try {' '.join(_smaller(stage))}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _smaller(stage: Stage) -> list[str]:
    """Two settings. The first pair gives the same gradients."""
    clips = stage.batch_clips
    if clips > 1:
        part = next(size for size in range(2, clips + 1) if clips % size == 0)
        changes = {"batch_clips": clips // part, "accumulation_steps": stage.accumulation_steps * part}
    elif stage.encoder_learning_rate:
        changes = {"activation_checkpointing": True, "frames_per_clip": max(1, (stage.frames_per_clip or 16) // 4)}
    else:
        changes = {"captions_per_clip": 1, "samples_per_clip": min(2, stage.samples_per_clip)}
    return [f"--set {name}={value}" for name, value in changes.items()]


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # GPU only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
