"""A network to measure the speed of."""

from __future__ import annotations

import torch

from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.preprocess import preprocess
from etenet.model.vocabulary import Vocabulary


def untrained(encoder: str, crop_px: int | None, frames: torch.Tensor, *, words: int = 1) -> Checkpoint:
    """A random network whose BatchNorm fits what passes through it, as a trained one's does."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(f"word{number}" for number in range(words))
    checkpoint = checkpoints.initialise(encoder, vocabulary, crop_px=crop_px)
    norms = [module for module in checkpoint.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        checkpoint.model.encoder(preprocess(frames, checkpoint.preprocessing))
    checkpoint.model.eval().requires_grad_(False)
    return checkpoint
