"""Captioning processes that share a GPU, as TorchServe's workers do, under arrivals that do not wait for captions.

A worker takes the first waiting clip and whatever else waits by then, up to its batch: what TorchServe does with a
`maxBatchDelay` of 1 ms. TorchServe's front end is left out: it needs Java, and its cost is below the noise of
`benchmarks.server`. The peer is the plain code of `benchmarks.peers.plain` on the GPU, one clip at a time.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import etenet
from benchmarks.gpu.workload import Workload
from benchmarks.peers.plain import PlainCaptioner
from benchmarks.rig.clips import drifting
from benchmarks.rig.load import Arrival, latency_percentiles_ms, throughput_per_s
from etenet.captioning.options import CaptionOptions

START_DEADLINE_S = 300.0
CAPTION_DEADLINE_S = 60.0
MODERATE = 0.7  # of the capacity
_processes = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU


def working(checkpoint: Path, workload: Workload, device: torch.device) -> dict[str, Any]:
    """By workers: capacity and latency of each batch, and the curve of the best batch; and the capacity of the peer."""
    clip, by_workers = drifting(workload.clip_s, 426, 240), {}
    for workers in workload.workers:
        with _crew(_ours, workers, checkpoint, clip, device) as crew:
            by_workers[workers] = _measured(crew, workload)
        print(f"{workers} workers: {by_workers[workers]}", flush=True)
    with _crew(_plain, 1, checkpoint, clip, device) as crew:
        plain_per_s = crew.capacity_per_s(1, workload.load_s)
    best = max(by_workers.values(), key=lambda of_workers: of_workers["capacity_per_s"])
    return {
        "by_workers": by_workers,
        "best": best,
        "plain_per_s": plain_per_s,
        "ratio_to_plain": best["capacity_per_s"] / plain_per_s,
    }


def _measured(crew: _Crew, workload: Workload) -> dict[str, Any]:
    by_batch = {}
    for batch in workload.worker_batches:
        capacity = crew.capacity_per_s(batch, workload.load_s)
        by_batch[batch] = {"capacity_per_s": capacity, **crew.under_load(batch, MODERATE * capacity, workload.load_s)}
    best = max(by_batch, key=lambda batch: by_batch[batch]["capacity_per_s"])
    capacity = by_batch[best]["capacity_per_s"]
    return {
        "by_batch": by_batch,
        "best_batch": best,
        "capacity_per_s": capacity,
        "curve": [crew.under_load(best, share * capacity, workload.load_s) for share in workload.shares],
    }


@dataclass(frozen=True, slots=True)
class _Crew:
    """Workers. Moments are of `time.monotonic`, which all processes of a machine share."""

    arrivals: Any  # queue: the moment at which a clip arrives
    captions: Any  # queue: that moment, and the moment of its caption
    batch: Any  # shared int: how many clips a worker takes at most

    def capacity_per_s(self, batch: int, seconds: float) -> float:
        """Captions per second while more clips wait than are taken."""
        self.batch.value = batch
        end_s, sent = time.monotonic() + seconds, 0
        captioned: list[Arrival] = []
        while time.monotonic() < end_s or len(captioned) < 2 * batch:
            while sent - len(captioned) < 4 * batch:
                self.arrivals.put(time.monotonic())
                sent += 1
            captioned += self._captioned(1)
        self._captioned(sent - len(captioned))
        return throughput_per_s(captioned)

    def under_load(self, batch: int, rate_per_s: float, seconds: float) -> dict[str, float]:
        """Latency of Poisson arrivals, from the arrival to the caption."""
        self.batch.value = batch
        gaps_s = np.random.default_rng(0).exponential(1 / rate_per_s, 2 + int(seconds * rate_per_s))
        moments_s = (time.monotonic() + np.cumsum(gaps_s)).tolist()
        for moment_s in moments_s:
            time.sleep(max(0.0, moment_s - time.monotonic()))
            self.arrivals.put(moment_s)
        return {"rate_per_s": rate_per_s, **latency_percentiles_ms(self._captioned(len(moments_s)))}

    def _captioned(self, count: int) -> list[Arrival]:
        """The next captions; waits for them."""
        return [Arrival(200, *self.captions.get(timeout=CAPTION_DEADLINE_S)) for _ in range(count)]


_Caption = Callable[[int], object]  # captions the clip so many times
_Load = Callable[[Path, bytes, str], _Caption]  # checkpoint, clip, device


@contextmanager
def _crew(load: _Load, workers: int, checkpoint: Path, clip: bytes, device: torch.device) -> Iterator[_Crew]:
    """So many workers, all ready."""
    crew = _Crew(_processes.Queue(), _processes.Queue(), _processes.Value("i", 1))
    arguments = load, checkpoint, clip, str(device), crew.arrivals, crew.captions, crew.batch
    processes = [_processes.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if problem := crew.captions.get(timeout=START_DEADLINE_S):
                raise RuntimeError(f"a worker does not start: {problem}")
        yield crew
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(load: _Load, checkpoint: Path, clip: bytes, device: str, arrivals: Any, captions: Any, batch: Any) -> None:
    """A worker process: puts None, or why it cannot start, and then a pair of moments per clip."""
    try:
        caption = load(checkpoint, clip, device)
        caption(1)
    except Exception as error:
        captions.put(f"{type(error).__name__}: {error}")
        return
    captions.put(None)
    while True:
        moments_s = [arrivals.get()]
        with suppress(queue.Empty):
            while len(moments_s) < batch.value:
                moments_s.append(arrivals.get_nowait())
        caption(len(moments_s))
        captioned_s = time.monotonic()
        for moment_s in moments_s:
            captions.put((moment_s, captioned_s))


def _ours(checkpoint: Path, clip: bytes, device: str) -> _Caption:
    captioner = etenet.load(checkpoint, device=device, record_gpu=True)
    return lambda count: captioner.caption_batch([clip] * count, [CaptionOptions()] * count)


def _plain(checkpoint: Path, clip: bytes, device: str) -> _Caption:
    captioner = PlainCaptioner(checkpoint, device=device)
    return lambda count: [captioner.caption(clip) for _ in range(count)]
