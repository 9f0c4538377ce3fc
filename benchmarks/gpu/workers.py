"""Captioning processes that share a GPU, as TorchServe's workers do, under arrivals that do not wait for answers.

A worker takes the first clip that is there, and what else has come by then, up to its batch: what TorchServe does with
a `maxBatchDelay` of 1 ms. Its front end is left out: it needs Java, and takes less than `benchmarks.server` could tell
from noise. The peer is the plain code of `benchmarks.peers.plain` on the GPU, one clip at a time.
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
from benchmarks import saturation
from benchmarks.gpu.scale import Scale
from benchmarks.peers.plain import PlainCaptioner
from benchmarks.rig.clips import drifting
from benchmarks.rig.load import Arrival, throughput_per_s
from etenet.captioning.options import CaptionOptions

START_DEADLINE_S = 300.0
ANSWER_DEADLINE_S = 60.0
MODERATE = 0.7  # of the capacity
_processes = multiprocessing.get_context("spawn")  # what is forked cannot use the GPU


def working(checkpoint: Path, scale: Scale, device: torch.device) -> dict[str, Any]:
    """By workers: capacity and latency by batch, and the whole curve for the best batch; and what plain code can do."""
    clip, by_workers = drifting(scale.clip_s, 426, 240), {}
    for workers in scale.workers:
        with _crew(_ours, workers, checkpoint, clip, device) as crew:
            by_workers[workers] = _measured(crew, scale)
        print(f"{workers} workers: {by_workers[workers]}", flush=True)
    with _crew(_plain, 1, checkpoint, clip, device) as crew:
        plain_per_s = crew.capacity_per_s(1, scale.load_s)
    best = max(by_workers.values(), key=lambda of_workers: of_workers["capacity_per_s"])
    return {
        "by_workers": by_workers,
        "best": best,
        "plain_per_s": plain_per_s,
        "ratio_to_plain": best["capacity_per_s"] / plain_per_s,
    }


def _measured(crew: _Crew, scale: Scale) -> dict[str, Any]:
    by_batch = {}
    for batch in scale.worker_batches:
        capacity = crew.capacity_per_s(batch, scale.load_s)
        by_batch[batch] = {"capacity_per_s": capacity, **crew.under_load(batch, MODERATE * capacity, scale.load_s)}
    best = max(by_batch, key=lambda batch: by_batch[batch]["capacity_per_s"])
    capacity = by_batch[best]["capacity_per_s"]
    return {
        "by_batch": by_batch,
        "best_batch": best,
        "capacity_per_s": capacity,
        "curve": [crew.under_load(best, share * capacity, scale.load_s) for share in scale.shares],
    }


@dataclass(frozen=True, slots=True)
class _Crew:
    """Workers. Moments are of `time.monotonic`, which all processes of a machine share."""

    asked: Any  # the moment at which a clip comes
    answered: Any  # that, and the moment of its caption
    batch: Any  # how many clips a worker takes at most

    def capacity_per_s(self, batch: int, seconds: float) -> float:
        """Captions per second while more clips wait than are taken."""
        self.batch.value = batch
        end_s, arrivals, asked = time.monotonic() + seconds, [], 0
        while time.monotonic() < end_s or len(arrivals) < 2 * batch:
            while asked - len(arrivals) < 4 * batch:
                self.asked.put(time.monotonic())
                asked += 1
            arrivals += self._answers(1)
        self._answers(asked - len(arrivals))
        return throughput_per_s(arrivals)

    def under_load(self, batch: int, rate_per_s: float, seconds: float) -> dict[str, float]:
        """Percentiles of the ms from the moment at which a clip comes, by chance, to its caption."""
        self.batch.value = batch
        gaps_s = np.random.default_rng(0).exponential(1 / rate_per_s, 2 + int(seconds * rate_per_s))
        moments_s = (time.monotonic() + np.cumsum(gaps_s)).tolist()
        for moment_s in moments_s:
            time.sleep(max(0.0, moment_s - time.monotonic()))
            self.asked.put(moment_s)
        latencies_ms = [1000 * arrival.seconds for arrival in self._answers(len(moments_s))]
        percentiles = np.percentile(latencies_ms, saturation.PERCENTILES)
        named = {f"p{p:g}": float(ms) for p, ms in zip(saturation.PERCENTILES, percentiles, strict=True)}
        return {"rate_per_s": rate_per_s, **named}

    def _answers(self, count: int) -> list[Arrival]:
        return [Arrival(200, *self.answered.get(timeout=ANSWER_DEADLINE_S)) for _ in range(count)]


_Caption = Callable[[int], object]  # captions the clip so many times


@contextmanager
def _crew(
    how: Callable[[Path, bytes, str], _Caption], workers: int, checkpoint: Path, clip: bytes, device: torch.device
) -> Iterator[_Crew]:
    """So many workers, all ready."""
    crew = _Crew(_processes.Queue(), _processes.Queue(), _processes.Value("i", 1))
    arguments = how, checkpoint, clip, str(device), crew.asked, crew.answered, crew.batch
    processes = [_processes.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if problem := crew.answered.get(timeout=START_DEADLINE_S):
                raise RuntimeError(f"a worker does not start: {problem}")
        yield crew
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(
    how: Callable[[Path, bytes, str], _Caption],
    checkpoint: Path,
    clip: bytes,
    device: str,
    asked: Any,
    answered: Any,
    batch: Any,
) -> None:
    try:
        caption = how(checkpoint, clip, device)
        caption(1)
    except Exception as error:
        answered.put(f"{type(error).__name__}: {error}")
        return
    answered.put(None)
    while True:
        moments_s = [asked.get()]
        with suppress(queue.Empty):
            while len(moments_s) < batch.value:
                moments_s.append(asked.get_nowait())
        caption(len(moments_s))
        answered_s = time.monotonic()
        for moment_s in moments_s:
            answered.put((moment_s, answered_s))


def _ours(checkpoint: Path, clip: bytes, device: str) -> _Caption:
    captioner = etenet.load(checkpoint, device=device, record_gpu=True)
    return lambda count: captioner.caption_batch([clip] * count, [CaptionOptions()] * count)


def _plain(checkpoint: Path, clip: bytes, device: str) -> _Caption:
    captioner = PlainCaptioner(checkpoint, device=device)
    return lambda count: [captioner.caption(clip) for _ in range(count)]
