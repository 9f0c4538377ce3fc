"""One training process, or several started by `torchrun`: ranks, exchange of values, and SIGTERM.

Several processes train with DDP, over gloo on CPUs and nccl on GPUs. With one process, every exchange returns its own
value.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event
from types import FrameType
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

ValueT = TypeVar("ValueT")

_TIMEOUT = timedelta(days=1)  # the other ranks wait while rank 0 computes scores, longer than torch's default allows


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the `count` that train together; rank 0 writes the files."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: Event = field(default_factory=Event)  # set by SIGTERM

    @property
    def first(self) -> bool:
        return self.rank == 0

    def ddp(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its gradients are the mean over all processes."""
        return DistributedDataParallel(module, broadcast_buffers=False) if self.count > 1 else module

    def all_reduce_sum(self, value: float) -> float:
        """The sum of `value` over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.item()

    def should_stop(self) -> bool:
        """Whether any process got SIGTERM. All processes get the same result."""
        return self.all_reduce_sum(float(self.stop.is_set())) > 0

    def broadcast(self, value: ValueT) -> ValueT:
        """Rank 0's value, in all processes. Also a barrier."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=self.device)
        return box[0]


@contextmanager
def init_processes() -> Iterator[Processes]:
    """Join the process group if `torchrun` started this process. SIGTERM sets `stop` and does not end the process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)  # GPU only
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    processes = Processes(int(os.environ.get("RANK", 0)), count, device)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        processes.stop.set()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        if count > 1:
            distributed.destroy_process_group()
