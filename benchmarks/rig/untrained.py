"""Networks of random weights, to measure the speed of: it does not depend on what a network has learnt."""

from __future__ import annotations

import torch

from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.preprocess import preprocess
from etenet.model.vocabulary import EOS_ID, Vocabulary


def untrained(encoder: str, crop_px: int | None, frames: torch.Tensor, *, words: int = 1) -> Checkpoint:
    """A network whose BatchNorm fits what passes through it, as a trained one's does."""
    torch.manual_seed(0)
    checkpoint = checkpoints.initialise(encoder, numbered_words(words), crop_px=crop_px)
    norms = [module for module in checkpoint.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        checkpoint.encoder(preprocess(frames, checkpoint.preprocessing))
    checkpoint.model.eval().requires_grad_(False)
    return checkpoint


def of_full_length(encoder: str, words: int, max_words: int) -> Checkpoint:
    """A network whose every sentence has `max_words` words, so that every search is of full length."""
    torch.manual_seed(0)
    return never_ending(checkpoints.initialise(encoder, numbered_words(words), max_words=max_words))


def never_ending(checkpoint: Checkpoint) -> Checkpoint:
    """The same, but that no sentence ends before the last word."""
    with torch.no_grad():
        checkpoint.model.decoder.to_words.bias[EOS_ID] = -30.0
        checkpoint.model.decoder.to_words.weight.mul_(4.0)  # or nearly all words would be equally probable
    return checkpoint


def numbered_words(count: int) -> Vocabulary:
    return Vocabulary(f"word{number}" for number in range(count))
