"""A moving average of the weights (Polyak and Juditsky, 1992), which is validated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """After every step the average keeps `decay` of itself. In its first steps less, so that it forgets the start.

    With a decay of 0 it is the weights themselves, and costs nothing.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self.average = {name: weight.detach().clone() for name, weight in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, from 1."""
        decay = min(self._decay, step / (step + 9))
        for name, average in self.average.items():
            average.lerp_(self._weights[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the weights are the average."""
        own = {name: self._weights[name].detach().clone() for name in self.average}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(own)

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in average.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)
