"""A network compiled by torch for training, or uncompiled where that fails.

Compiling a large network takes minutes, so only the first shape is compiled. A batch of another shape, such as the
smaller last one of an epoch, runs uncompiled. Knows nothing of what the network is for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
Compiler = Callable[..., Any]  # torch.compile or a stand-in


class CompiledForward:
    """`forward`, a function of one tensor with the weights of `network`."""

    def __init__(self, forward: Forward, network: nn.Module, compiler: Compiler = torch.compile) -> None:
        self._forward, self._network, self._compiler = forward, network, compiler
        self._shape: torch.Size | None = None
        self._compiled: Forward | None = None
        self.compile_s = 0.0

    @property
    def works(self) -> bool:
        """Whether the first shape runs compiled."""
        return self._compiled is not None

    def __call__(self, value: Tensor) -> Tensor:
        if self._shape is None:
            self._shape = value.shape
            self._compiled = self._compile_for(value)
        if self._compiled is None or value.shape != self._shape:
            return self._forward(value)
        return self._compiled(value)

    def _compile_for(self, value: Tensor) -> Forward | None:
        """Compile, and run forward and backward once: the backward pass is compiled when it runs. Sets no gradient."""
        started = time.perf_counter()
        weights = [weight for weight in self._network.parameters() if weight.requires_grad]
        try:
            compiled: Forward = self._compiler(self._forward, dynamic=False)
            torch.autograd.grad(compiled(value).sum(), weights, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"training: the encoder runs uncompiled: torch.compile fails here ({reason})", file=sys.stderr)
            return None
        self.compile_s = time.perf_counter() - started
        return compiled
