"""A function of one tensor, recorded once on a GPU and played back from then on: its many launches become one.

A recording reads what it is given from a place of its own, so every call must bring the same shape; what it gives is
overwritten by the next call. Recordings of one `recorder` share their memory, and are played one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # in which libraries choose their kernels and take their memory: neither may be recorded
T = TypeVar("T")

Play = Callable[[Tensor], T]
Record = Callable[[Play[T], Tensor], Play[T]]  # the second is an example of what will be played, on the GPU


@dataclass(frozen=True, slots=True)
class _Recording(Generic[T]):
    function: Play[T]  # whose weights the recording reads, and must not outlive
    device: torch.device
    read: Tensor
    graph: torch.cuda.CUDAGraph
    written: T

    def __call__(self, value: Tensor) -> T:  # GPU only
        with torch.cuda.device(self.device):
            self.read.copy_(value, non_blocking=True)
            self.graph.replay()
        return self.written


def recorder(device: torch.device) -> Record[Any]:
    """Records functions that neither wait for the GPU nor read from it; on a CPU, gives them back.

    Begin with the function that takes most memory.
    """
    return _recorder() if device.type == "cuda" else _at_once


def _recorder() -> Record[Any]:  # GPU only
    pool = torch.cuda.graph_pool_handle()

    def recorded(function: Play[T], example: Tensor) -> Play[T]:
        read = example.clone()
        with torch.cuda.device(example.device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP_CALLS):
                    function(read)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                written = function(read)
        return _Recording(function, example.device, read, graph, written)

    return recorded


def _at_once(function: Play[T], example: Tensor) -> Play[T]:
    """It, too, takes one shape only."""

    def play(value: Tensor) -> T:
        assert value.shape == example.shape, f"made for {tuple(example.shape)}, got {tuple(value.shape)}"
        return function(value)

    return play
