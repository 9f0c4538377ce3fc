"""One optimizer step's gradients: a window of examples, in micro-batches, over one process or several.

Shapes: B clips, L frames per clip, D feature size, K sentences per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from etenet.config import Preprocessing
from etenet.errors import UsageError
from etenet.model import EtENet
from etenet.preprocess import preprocess
from training.datasets import Sentences
from training.loss import sentence_losses
from training.order import Example
from training.processes import Processes
from training.recipes import Stage

Load = Callable[[Sequence[Example]], tuple[Tensor, Sentences]]  # what a clip shows, and what is said about it


class Trainee(nn.Module):
    """A network with its loss, as the one module that DDP wraps."""

    def __init__(self, model: EtENet, preprocessing: Preprocessing, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.stage = stage

    def features(self, seen: Tensor) -> Tensor:
        """uint8 frames (B, L, resize_px, resize_px, 3), or features that are known already -> features (B, L, D)."""
        if seen.dtype != torch.uint8:
            return seen
        weights = self.model.decoder.embedding.weight
        frames = preprocess(seen, self.preprocessing).to(weights.dtype)
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.stage.mixed_precision):
            return self.model.encode(frames).to(weights.dtype)

    def losses(self, features: Tensor, sentences: Sentences) -> Tensor:
        """features (B, L, D), K sentences per clip -> the loss of each (B, K)."""
        return sentence_losses(self.model.decoder, features, sentences, attention_penalty=self.stage.attention_penalty)

    def forward(self, seen: Tensor, sentences: Sentences) -> Tensor:
        return self.losses(self.features(seen), sentences)


def accumulate(
    trainee: nn.Module, window: Sequence[Example], load: Load, *, micro_batch: int, processes: Processes
) -> float:
    """Add the gradient of the window's mean loss, whatever the micro-batch; return the sum of its losses.

    Each sentence weighs 1 / (sentences in the window). Processes exchange gradients once, with the last
    micro-batch. `trainee` is a `Trainee`, wrapped by `Processes.together`.
    """
    sentences = len(window) * len(window[0].captions)
    mine = window[processes.rank :: processes.count]
    weight = processes.count / sentences if mine else 0.0  # DDP takes the mean of the processes' gradients
    mine = mine or window[:1]  # who has nothing to add must still take part
    total = 0.0
    for start in range(0, len(mine), micro_batch):
        last = start + micro_batch >= len(mine)
        with nullcontext() if last or processes.count == 1 else trainee.no_sync():
            losses = trainee(*load(mine[start : start + micro_batch]))
            if not torch.isfinite(losses).all():
                raise UsageError("the loss is not finite any more; lower the learning rate (--set ...) and go on")
            (losses.sum() * weight).backward()
        total += losses.detach().double().sum().item() * (weight > 0)
    return processes.total(total)
