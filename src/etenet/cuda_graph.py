"""A function of one tensor, recorded once on a GPU and played back from then on: its many launches become one.

A recording reads what it is given from a place of its own, so every call must bring the same shape; what it gives is
overwritten by the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # in which libraries choose their kernels and take their memory: neither may be recorded
T = TypeVar("T")

Play = Callable[[Tensor], T]


@dataclass(frozen=True, slots=True)
class _Recording(Generic[T]):
    function: Play[T]  # whose weights the recording reads, and must not outlive
    device: torch.device
    read: Tensor
    graph: torch.cuda.CUDAGraph
    written: T

    def __call__(self, value: Tensor) -> T:
        with torch.cuda.device(self.device):
            self.read.copy_(value, non_blocking=True)
            self.graph.replay()
        return self.written


def recorded(function: Play[T], example: Tensor) -> Play[T]:
    """The function, for inputs like this one, which is on the GPU. It may neither wait for the GPU nor read from it."""
    read = example.clone()
    with torch.cuda.device(example.device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                function(read)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = function(read)
    return _Recording(function, example.device, read, graph, written)
