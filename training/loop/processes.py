"""One training process, or several started by `torchrun`: device, ranks, exchange of values, SIGTERM and Ctrl-C.

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

from etenet.errors import UsageError
from etenet.runtime.load import use_cores

ValueT = TypeVar("ValueT")

_TIMEOUT = timedelta(days=1)  # the other ranks wait while rank 0 computes scores, longer than torch's default allows


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the `count` that train together; rank 0 writes the files."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: Event = field(default_factory=Event)  # set by SIGTERM and by Ctrl-C
    ctrl_c: Event = field(default_factory=Event)

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
        """Whether any process got SIGTERM or Ctrl-C. All processes get the same result."""
        return self.all_reduce_sum(float(self.stop.is_set())) > 0

    def broadcast(self, value: ValueT) -> ValueT:
        """Rank 0's value, in all processes. Also a barrier."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=self.device)
        return box[0]


@contextmanager
def init_processes(device_name: str | None = None) -> Iterator[Processes]:
    """Join the process group if `torchrun` started this process; on a GPU if there is one and none is named.

    SIGTERM and Ctrl-C set `stop` and do not end the process, except for a second Ctrl-C. Raises `UsageError` if there
    is no such device.
    """
    device = device_named(device_name)
    use_cores()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # GPU only
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    processes = Processes(int(os.environ.get("RANK", 0)), count, device)

    def stop(number: int, _frame: FrameType | None) -> None:
        processes.stop.set()
        if number == signal.SIGINT:
            processes.ctrl_c.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if count > 1:
            distributed.destroy_process_group()


def device_named(name: str | None) -> torch.device:
    """Raises `UsageError` for what is no device here. None is a GPU if there is one."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if name is None:
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device; choose cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"training runs on cpu and cuda, not on --device {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs; try --device cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", rank)
    return device
