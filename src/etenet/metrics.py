"""What Prometheus hears: counters, gauges and histograms of a worker, and how they are put together.

A worker with PROMETHEUS_MULTIPROC_DIR in its environment keeps its figures in files there, which outlive it: a caption
stays counted when the worker that said it is killed. `exposition` adds up the files of all workers. Without that
folder, figures stay in the process, and nobody asks for them.

Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from etenet.errors import CaptionError

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CLIPS = (1, 2, 4, 8, 16, 32, 64)
_A_DAY_S = 86400.0
_BYTES = tuple(2**power for power in range(14, 27, 2))  # 16 KiB to 64 MiB

REQUEST_SECONDS = Histogram(
    "etenet_request_duration_seconds", "From the moment a worker takes a request to its answer.", buckets=_SECONDS
)
STAGE_SECONDS = Histogram(
    "etenet_stage_duration_seconds",
    "wait: from the front (X-Request-Start) to a worker; decode: per clip; encode, search: per batch.",
    ["stage"],
    buckets=_SECONDS,
)
BUSY_SECONDS = Counter("etenet_busy_seconds", "Time in which a worker had a batch in hand.")
BATCH_CLIPS = Histogram("etenet_batch_size_clips", "Requests that a worker takes at once.", buckets=_CLIPS)
CLIP_BYTES = Histogram("etenet_clip_size_bytes", "Bodies of requests.", buckets=_BYTES)
FRAMES = Counter("etenet_frames_decoded", "Distinct frames that captions are about.")
CAPTIONS = Counter("etenet_captions", "Requests that got a caption.")
ERRORS = Counter("etenet_errors", "Requests that got an error of the worker's, by its code.", ["code"])
for _kind in CaptionError.__subclasses__():  # so that a rate exists before the first error
    ERRORS.labels(_kind.code)
IN_PROGRESS = Gauge("etenet_requests_in_progress", "Requests in the hands of workers.", multiprocess_mode="livesum")
DECODERS = Gauge("etenet_decoder_processes", "Decoder processes that are alive.", multiprocess_mode="livesum")
DECODERS_REPLACED = Counter("etenet_decoder_processes_replaced", "Decoder processes that others took the place of.")
DECODERS_TIMED_OUT = Counter("etenet_decoder_processes_timed_out", "Clips that took longer than they may.")
GPU_DECODED = Counter("etenet_gpu_decoded", "Videos that a GPU's decoder decoded.")
WORKER_START = Gauge(
    "etenet_worker_start_time_seconds", "When the youngest worker began (Unix).", multiprocess_mode="livemax"
)
MODEL_INFO = Gauge(
    "etenet_model_info",
    "1, with what is served.",
    ["version", "encoder", "checkpoint", "device"],
    multiprocess_mode="livemax",
)


@contextmanager
def in_progress(requests: int) -> Iterator[None]:
    """Requests are in the hands of this worker meanwhile."""
    IN_PROGRESS.inc(requests)
    try:
        yield
    finally:
        IN_PROGRESS.dec(requests)


def seconds_since(request_start: str) -> float | None:
    """How long ago a front got a request, by its header X-Request-Start ("t=" and Unix seconds); None where unsaid."""
    try:
        waited_s = time.time() - float(request_start.removeprefix("t="))
    except ValueError:
        return None
    return waited_s if 0 <= waited_s < _A_DAY_S else None


def exposition(folder: Path, *, ready: bool) -> bytes:
    """What Prometheus reads: the figures of all workers that kept theirs in `folder`, and whether captions come out."""
    registry = _registry(folder)
    Gauge("etenet_ready", "1 while captions come out.", registry=registry).set(ready)
    parts = {name: version(name) for name in ("etenet", "torch", "torchserve", "av")}
    Gauge("etenet_build_info", "1, with what the server is made of.", parts, registry=registry).labels(**parts).set(1)
    return generate_latest(registry)


def total(folder: Path, figure: Counter | Gauge) -> float:
    """The sum of one figure over all workers and labels."""
    return sum(
        sample.value
        for family in _registry(folder).collect()
        if family.name == figure._name
        for sample in family.samples
    )


def _registry(folder: Path) -> CollectorRegistry:
    """Of all workers that there were; gauges of those alone that are alive."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        with suppress(FileNotFoundError):
            if not Path(f"/proc/{pid}").exists():
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return registry
