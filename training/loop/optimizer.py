"""Adam with a rate for each part of the network, the course of the rates over a stage, and clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from training.run_settings import Stage


def adam(model: nn.Module, stage: Stage) -> torch.optim.Adam:
    """For the weights of `model.decoder` and, unless it is frozen, `model.encoder`.

    Adam moves each weight by about its rate, so the outputs of a projection move by the rate for each of its inputs: a
    wide one needs a smaller rate.
    """
    decoder, projection = model.get_submodule("decoder"), model.get_submodule("decoder.project")
    rate, of_projection = stage.decoder_learning_rate, set(projection.parameters())
    rest = [weight for weight in decoder.parameters() if weight not in of_projection]
    parts = [
        (rest, rate, stage.decoder_weight_decay),
        (list(projection.parameters()), rate * stage.projection_rate_share, stage.decoder_weight_decay),
    ]
    if stage.encoder_learning_rate:
        encoder = [weight for weight in model.get_submodule("encoder").parameters() if weight.requires_grad]
        parts.append((encoder, stage.encoder_learning_rate, stage.encoder_weight_decay))
    return torch.optim.Adam(
        [
            {"params": weights, "initial_lr": rate, "lr": rate, "weight_decay": decay}
            for weights, rate, decay in parts
            if weights
        ]
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, *, step: int, steps: int) -> dict[str, float]:
    """Before step number `step` (from 0) of `steps`. Returns the rates by the names that the log has."""
    share = learning_rate_share(step, steps, stage)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
    rates = {"learning_rate": stage.decoder_learning_rate * share}
    if stage.encoder_learning_rate:
        rates["encoder_learning_rate"] = stage.encoder_learning_rate * share
    return rates


def learning_rate_share(step: int, steps: int, stage: Stage) -> float:
    """The share of the full rates: a linear rise, and then a half cosine."""
    half_cosine = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
    decay = stage.final_learning_rate_share + (1 - stage.final_learning_rate_share) * half_cosine
    return decay * min(1.0, (step + 1) / (stage.warmup_steps + 1))


def clip_gradients(weights: Collection[nn.Parameter], stage: Stage) -> float:
    """Clip by norm, then by value, and return the norm before."""
    norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if stage.gradient_clip_norm:
        nn.utils.clip_grads_with_norm_(weights, stage.gradient_clip_norm, norm)
    if stage.gradient_clip_value:
        nn.utils.clip_grad_value_(weights, stage.gradient_clip_value)
    return norm.item()
