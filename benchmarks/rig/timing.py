"""How long a call takes, until its results are there: once, as a median, and beside others; and its processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Seconds of the wall clock, and of the processor for all threads of this process."""

    wall_s: float
    cpu_s: float


def median_ms(run: Callable[[], object], rounds: int, device: torch.device = CPU) -> float:
    """Milliseconds, after one call to warm up."""
    run()
    return statistics.median(1000 * timed_s(run, device) for _ in range(rounds))


def medians_s(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds by name. All take turns, so that a machine that slows down slows all of them."""
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times_s[name].append(timed_s(run))
    return {name: statistics.median(of_rounds) for name, of_rounds in times_s.items()}


def timed_s(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def cost(run: Callable[[], object]) -> Cost:
    """Of one call on a CPU."""
    cpu_began_s = time.process_time()
    return Cost(timed_s(run), time.process_time() - cpu_began_s)


def wait_for(device: torch.device) -> None:
    """Until everything launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
