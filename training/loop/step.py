"""The gradients of one optimizer step: a window of examples, in micro-batches, over one process or several.

Shapes: B clips, L frames per clip, D feature size, K sentences per clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from etenet.errors import UsageError
from etenet.model.config import Preprocessing
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder
from etenet.model.etenet import EtENet
from etenet.model.preprocess import preprocess
from training.data.datasets import EncodedCaptions
from training.loop.compiling import CompiledForward, Compiler
from training.loop.loss import sentence_losses
from training.loop.order import TrainingExample
from training.loop.processes import Processes
from training.run_settings import Stage

Load = Callable[[Sequence[TrainingExample]], tuple[Tensor, Any]]  # frames or features, and what the objective takes
Objective = Callable[[Decoder, Tensor, Any], Tensor]  # features (B, L, D) and targets -> losses (B, K)


class Trainee(nn.Module):
    """A network and its loss as one module, which DDP can wrap. The loss is teacher forcing's, or the objective."""

    def __init__(
        self,
        model: EtENet,
        preprocessing: Preprocessing,
        stage: Stage,
        compiler: Compiler = torch.compile,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.model = model
        self.preprocessing = preprocessing
        self.stage = stage
        compiled = stage.compiled and isinstance(model.encoder, Encoder)
        self.compiled = CompiledForward(model.encode, self.encoder, compiler) if compiled else None

    @property
    def encoder(self) -> Encoder:
        """The encoder. A network that learns from given features has none."""
        assert isinstance(self.model.encoder, Encoder)
        return self.model.encoder

    def features(self, inputs: Tensor) -> Tensor:
        """uint8 frames (B, L, resize_px, resize_px, 3) -> features (B, L, D). Features are returned as they are.

        On a CPU a frame that repeats the one before it is not computed again.
        """
        if inputs.dtype != torch.uint8:
            return inputs
        if inputs.device.type != "cpu" or self.compiled:
            return self._encoded(inputs)
        new = _differs_from_the_one_before(inputs)
        different = inputs[new]
        if len(different) == new.numel():
            return self._encoded(inputs)
        return self._encoded(different[None])[0][new.flatten().cumsum(0) - 1].view(*new.shape, -1)

    def _encoded(self, inputs: Tensor) -> Tensor:
        weights = self.model.decoder.embedding.weight
        frames = preprocess(inputs, self.preprocessing).to(weights.dtype)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.stage.mixed_precision):
            encode = self.compiled if self.compiled and self.training and torch.is_grad_enabled() else self.model.encode
            return encode(frames).to(weights.dtype)

    def losses(self, features: Tensor, sentences: EncodedCaptions) -> Tensor:
        """features (B, L, D), K sentences per clip -> the loss of each (B, K). Labels are smoothed in training only."""
        return sentence_losses(
            self.model.decoder,
            features,
            sentences,
            attention_penalty=self.stage.attention_penalty,
            label_smoothing=self.stage.label_smoothing if self.training else 0.0,
        )

    def forward(self, inputs: Tensor, targets: Any) -> Tensor:
        features = self.features(inputs)
        return (
            self.objective(self.model.decoder, features, targets) if self.objective else self.losses(features, targets)
        )


def _differs_from_the_one_before(frames: Tensor) -> Tensor:
    """(B, L, ...) -> (B, L) bool: whether a frame of a clip shows another picture than its predecessor."""
    new = torch.ones(frames.shape[:2], dtype=torch.bool)
    new[:, 1:] = (frames[:, 1:] != frames[:, :-1]).flatten(2).any(-1)
    return new


def micro_batches(
    window: Sequence[TrainingExample], size: int, processes: Processes
) -> list[Sequence[TrainingExample]]:
    """This process's share of a window. A process without a share gets one example, as all must join DDP's exchange."""
    mine = window[processes.rank :: processes.count] or window[:1]
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def accumulate(
    trainee: nn.Module, window: Sequence[TrainingExample], load: Load, *, micro_batch: int, processes: Processes
) -> float:
    """Add the gradient of the window's mean loss and return the sum of its losses. Micro-batches change neither.

    Each sentence weighs 1 / (sentences in the window). Processes exchange gradients once, with the last
    micro-batch. `trainee` is a `Trainee`, wrapped by `Processes.ddp`. The host waits for a GPU only at the end.
    Raises `UsageError` if the loss is not finite.
    """
    sentences = len(window) * len(window[0].captions)
    has_part = processes.rank < len(window)
    weight = processes.count / sentences if has_part else 0.0  # DDP takes the mean of the processes' gradients
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    batches = micro_batches(window, micro_batch, processes)
    for number, examples in enumerate(batches, start=1):
        more = number < len(batches)
        with trainee.no_sync() if more and isinstance(trainee, DistributedDataParallel) else nullcontext():
            losses = trainee(*load(examples))
            (losses.sum() * weight).backward()
        total += losses.detach().double().sum()
    window_loss = processes.all_reduce_sum(total.item() * has_part)
    if not math.isfinite(window_loss):
        raise UsageError("the loss is no longer finite; train into another --out at a lower learning rate (--set)")
    return window_loss
