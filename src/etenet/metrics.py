"""Metrics for Prometheus: counters, gauges and histograms of a worker, and their sum over all workers.

A worker with PROMETHEUS_MULTIPROC_DIR in its environment keeps its figures in files in that folder. The files outlive
it: a caption stays counted when its worker is killed. `exposition` adds up the files of all workers. Without the folder
the figures stay in the process and are not read.

Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from etenet.errors import CaptionError

_log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CLIPS = (1, 2, 4, 8, 16, 32, 64)
_A_DAY_S = 86400.0
_BYTES = tuple(2**power for power in range(14, 27, 2))  # 16 KiB to 64 MiB

REQUEST_SECONDS = Histogram(
    "etenet_request_duration_seconds", "Time from when a worker takes a request to its response.", buckets=_SECONDS
)
STAGE_SECONDS = Histogram(
    "etenet_stage_duration_seconds",
    "Time of a stage. wait: from the front (X-Request-Start) to a worker; decode: per clip; encode, search: per batch.",
    ["stage"],
    buckets=_SECONDS,
)
BUSY_SECONDS = Counter("etenet_busy_seconds", "Time that workers spent on batches.")
BATCH_CLIPS = Histogram("etenet_batch_size_clips", "Requests in a batch.", buckets=_CLIPS)
CLIP_BYTES = Histogram("etenet_clip_size_bytes", "Size of request bodies.", buckets=_BYTES)
FRAMES = Counter("etenet_frames_decoded", "Distinct frames that were captioned, without those of known features.")
CAPTIONS = Counter("etenet_captions", "Requests that got a caption.")
ERRORS = Counter("etenet_errors", "Requests that got an error from a worker, by error code.", ["code"])
for _kind in CaptionError.__subclasses__():  # so that a rate exists before the first error
    ERRORS.labels(_kind.code)
PROBES = Counter(
    "etenet_probes", "Test clips of the server's own that got a caption. Only busy seconds count them, too."
)
STEPS = Counter(
    "etenet_steps",
    "Steps of work: a few frames encoded, a word of a search, a second of decoding. A hung worker makes none.",
)
FEATURE_CACHE_HITS = Counter("etenet_feature_cache_hits", "Videos whose features were known.")
FEATURE_CACHE_MISSES = Counter("etenet_feature_cache_misses", "Videos that were looked up in vain.")
FEATURE_CACHE_BYTES = Gauge(
    "etenet_feature_cache_bytes", "What the features take that workers remember.", multiprocess_mode="livesum"
)
IN_PROGRESS = Gauge("etenet_requests_in_progress", "Requests that workers are working on.", multiprocess_mode="livesum")
DECODERS = Gauge("etenet_decoder_processes", "Decoder processes that run.", multiprocess_mode="livesum")
DECODERS_REPLACED = Counter(
    "etenet_decoder_processes_replaced", "Decoder processes that crashed or hung and were replaced."
)
DECODERS_TIMED_OUT = Counter("etenet_decoder_processes_timed_out", "Clips whose decoding exceeded a limit of time.")
WORKER_START = Gauge(
    "etenet_worker_start_time_seconds", "Unix time when the youngest worker started.", multiprocess_mode="livemax"
)
MODEL_INFO = Gauge(
    "etenet_model_info",
    "1; the labels say what is served.",
    ["version", "encoder", "precision", "checkpoint", "device"],
    multiprocess_mode="livemax",
)


def allocate() -> None:
    """Give the files of this process their blocks. Raises `OSError` if the disk is full.

    They are mapped and have holes: to write to one ends the process (SIGBUS) once the disk is full.
    """
    if (folder := os.environ.get(FOLDER_VARIABLE)) and sys.platform == "linux":
        for path in Path(folder).glob(f"*_{os.getpid()}.db"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@contextmanager
def in_progress(requests: int) -> Iterator[None]:
    """Count requests as in progress while the block runs."""
    IN_PROGRESS.inc(requests)
    try:
        yield
    finally:
        IN_PROGRESS.dec(requests)


def seconds_since(request_start: str) -> float | None:
    """Seconds since a front got a request, by its header X-Request-Start ("t=" and Unix seconds); None without one."""
    try:
        waited_s = time.time() - float(request_start.removeprefix("t="))
    except ValueError:
        return None
    return waited_s if 0 <= waited_s < _A_DAY_S else None


def exposition(folder: Path, *, ready: bool) -> bytes:
    """The text that Prometheus reads: the figures of all workers with files in `folder`, and readiness."""
    registry = CollectorRegistry()
    registry.register(_Workers(folder))
    Gauge("etenet_ready", "1 while the server is ready.", registry=registry).set(ready)
    parts = {name: version(name) for name in ("etenet", "torch", "torchserve", "av")}
    Gauge(
        "etenet_build_info", "1; the labels are versions of the server and its libraries.", parts, registry=registry
    ).labels(**parts).set(1)
    return generate_latest(registry)


def totals(folder: Path, *figures: Counter | Gauge) -> list[float]:
    """The sum of each figure over all workers and labels."""
    sums = dict.fromkeys((figure._name for figure in figures), 0.0)
    for family in _Workers(folder).collect():
        if family.name in sums:
            sums[family.name] = sum(sample.value for sample in family.samples)
    return list(sums.values())


class _Workers(Collector):
    """Counters and histograms of all workers so far, and gauges of those that are alive.

    A file that cannot be read (a full disk, a crash of the machine) costs its own figures and no others. One that a
    worker has only just made is empty, and has no figures yet.
    """

    _logged: ClassVar[set[Path]] = set()  # damaged files: each is logged once

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        self._forget_dead_workers()
        files = [file for file in sorted(self._folder.glob("*.db")) if _has_contents(file)]
        try:
            return _merged(files)
        except Exception:  # the client library checks little, so a damaged file raises anything
            return _merged([file for file in files if self._is_whole(file)])

    def _forget_dead_workers(self) -> None:
        for file in self._folder.glob("gauge_live*_*.db"):
            pid = file.stem.rpartition("_")[2]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    mark_process_dead(int(pid), str(self._folder))  # type: ignore[no-untyped-call]

    def _is_whole(self, file: Path) -> bool:
        try:
            _merged([file])
        except Exception as error:
            if file not in self._logged:
                self._logged.add(file)
                _log.warning(
                    "%s is damaged (%r): metrics go on without it; if /metrics must be complete, restart the server",
                    file,
                    error,
                )
            return False
        return True


def _has_contents(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False  # its worker has ended since


def _merged(files: Sequence[Path]) -> Iterable[Metric]:
    """The figures in the files of several processes, added up."""
    return MultiProcessCollector.merge(map(str, files))  # type: ignore[no-untyped-call, no-any-return]
