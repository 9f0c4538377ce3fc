"""A function of one tensor, recorded once on a GPU and played back from then on: its many launches become one.

A recording reads what it is given from a place of its own, so every call must bring the same shape; what it gives is
overwritten by the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # in which libraries choose their kernels and take their memory: neither may be recorded
T = TypeVar("T")

Play = Callable[[Tensor], T]


def recorded(function: Play[T], example: Tensor) -> Play[T]:
    """The function, for inputs like this one, which is on the GPU. It may neither wait for the GPU nor read from it."""
    read, device = example.clone(), torch.cuda.device(example.device)
    with device:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                function(read)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = function(read)

    def play(value: Tensor) -> T:
        with device:
            read.copy_(value, non_blocking=True)
            graph.replay()
        return written

    return play
