"""Batch captioning on a Ray cluster: tasks decode on all its cores, and what they give streams to actors that caption.

Ray Data holds decoding back while captioning lags behind, starts an actor anew that died, and does again what was in
its hands. Every node must have this package installed and see the clips at the same paths; the checkpoint is brought
to it.
"""

from __future__ import annotations

import logging
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from etenet import checkpoint as checkpoints
from etenet import job_local
from etenet.captioner import SANDBOX_EXISTS
from etenet.config import CaptionOptions, DecodeLimits
from etenet.errors import CaptionError, Stopped
from etenet.job_inputs import Clip, is_remote
from etenet.job_records import Record, record_of
from etenet.jobs import Engine, read
from etenet.sandbox import InProcess, Sandbox

ACTORS = 1
_LIMITS = DecodeLimits()


def engine(
    checkpoint: Path, options: CaptionOptions, *, details: bool, address: str | None = None, actors: int = ACTORS
) -> Engine:
    """On the cluster at `address` (where None, on this machine). Raises `CheckpointError`."""
    resize_px = checkpoints.load(checkpoint).preprocessing.resize_px

    def captions(clips: Iterable[Clip]) -> Iterator[Record]:
        by_path: dict[str, list[str]] = {}
        for clip in clips:
            path = clip.path if is_remote(clip.path) else str(Path(clip.path).resolve())
            by_path.setdefault(path, []).append(clip.video)
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise Stopped(f"there is no Ray cluster at {address}: {error}") from error
        try:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            weights = ray.put(np.frombuffer(checkpoint.read_bytes(), np.uint8))
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus = 1 if resources.get("GPU") else 0
            # A core is left for decoding, or captioning would wait for it for ever.
            cores = 0.0 if gpus else min(1.0, (resources["CPU"] - 1) / actors)
            outcomes = (
                ray.data.from_items([{"path": path} for path in by_path])
                # Its memory also keeps Ray from making one step of both: an actor would then decode by itself.
                .map(partial(_decoded, resize_px=resize_px), num_cpus=1, memory=_LIMITS.max_memory_bytes)
                .map_batches(
                    _Captions,
                    fn_constructor_args=([weights], options, details, len(by_path)),
                    batch_size=job_local.BATCH_CLIPS,
                    compute=ray.data.ActorPoolStrategy(size=actors),
                    num_cpus=cores,
                    num_gpus=gpus,
                )
            )
            for row in outcomes.iter_rows():
                record = pickle.loads(row["record"])
                for video in by_path[row["path"]]:
                    yield {"video": video, **record}
        except ray.exceptions.RayError as error:
            raise Stopped(
                f"the cluster cannot go on: {str(error).splitlines()[-1]}; start this job once more"
            ) from error
        finally:
            ray.shutdown()

    return captions


@cache
def _decoders(resize_px: int) -> Sandbox | InProcess:
    """One per process of Ray's, which has one task at a time."""
    if SANDBOX_EXISTS:
        return Sandbox(resize_px=resize_px, limits=_LIMITS, processes=1)
    return InProcess(resize_px=resize_px, limits=_LIMITS)


def _decoded(row: dict[str, Any], *, resize_px: int) -> dict[str, Any]:
    """The clip at a path: a `SampledVideo`, or the record that says what is wrong with it."""
    body = read(row["path"], _LIMITS.max_body_bytes)
    outcome: Any = body
    if isinstance(body, bytes):
        try:
            outcome = _decoders(resize_px).submit(body).result()
        except CaptionError as error:
            outcome = error.as_dict()
    return {"path": row["path"], "clip": pickle.dumps(outcome, protocol=5)}


class _Captions:
    """An actor that holds the network."""

    def __init__(self, weights: list[Any], options: CaptionOptions, details: bool, clips: int) -> None:
        """`weights` holds one reference: given bare, Ray would resolve it, and could not start the actor anew."""
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            file.write(ray.get(weights[0]).data)
            file.flush()
            self._captioner = job_local.load(Path(file.name), limits=_LIMITS, clips=clips)
        self._options, self._details = options, details

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        clips = [pickle.loads(clip) for clip in batch["clip"]]
        videos = [clip for clip in clips if not isinstance(clip, dict)]
        outcomes = iter(self._captioner.caption_videos(videos, self._options))
        records = [clip if isinstance(clip, dict) else self._record(next(outcomes)) for clip in clips]
        return {"path": batch["path"], "record": [pickle.dumps(record) for record in records]}

    def _record(self, outcome: Any) -> Record:
        if isinstance(outcome, CaptionError):
            return dict(outcome.as_dict())
        return record_of(outcome.as_dict(), details=self._details)
