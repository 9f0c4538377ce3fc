"""A function of one tensor, captured once as a CUDA graph and replayed from then on: its many launches become one.

A graph reads its input from memory of its own, so every call must bring the same shape. Its output is overwritten by
the next call. Graphs of one `capturer` share their memory and are replayed one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # libraries choose kernels and allocate memory in them: neither may be captured
T = TypeVar("T")

Replay = Callable[[Tensor], T]
Capture = Callable[[Replay[T], Tensor], Replay[T]]  # a function and an example of its input, on the GPU


@dataclass(frozen=True, slots=True)
class _Graph(Generic[T]):
    function: Replay[T]  # keeps the weights alive that the graph reads
    device: torch.device
    input: Tensor
    graph: torch.cuda.CUDAGraph
    output: T

    def __call__(self, value: Tensor) -> T:  # GPU only
        with torch.cuda.device(self.device):
            self.input.copy_(value, non_blocking=True)
            self.graph.replay()
        return self.output


def capturer(device: torch.device) -> Capture[Any]:
    """Captures functions that do not synchronise with the host. On a CPU, returns them as they are.

    Capture the function that needs most memory first.
    """
    return _capturer() if device.type == "cuda" else _uncaptured


def _capturer() -> Capture[Any]:  # GPU only
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Replay[T], example: Tensor) -> Replay[T]:
        graph_input = example.clone()
        with torch.cuda.device(example.device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    function(graph_input)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = function(graph_input)
        return _Graph(function, example.device, graph_input, graph, output)

    return capture


def _uncaptured(function: Replay[T], example: Tensor) -> Replay[T]:
    """Takes only one shape, like a graph."""

    def replay(value: Tensor) -> T:
        assert value.shape == example.shape, f"captured for {tuple(example.shape)}, got {tuple(value.shape)}"
        return function(value)

    return replay
