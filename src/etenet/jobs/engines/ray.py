"""Batch captioning on a Ray cluster: tasks decode on all its cores, and what they give streams to actors that caption.

Ray Data holds decoding back while captioning lags behind, starts an actor anew that died, and does again what was in
its hands. Every node must have this package installed and see the clips at the same paths; the checkpoint is brought
to it.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from etenet.captioning.captioner import SANDBOX_EXISTS
from etenet.captioning.captions import Caption, outcome_of
from etenet.captioning.options import CaptionOptions
from etenet.errors import CaptionError, JobStopped
from etenet.files import sha256
from etenet.jobs.engines import local
from etenet.jobs.engines.local import JOB_LIMITS
from etenet.jobs.inputs import JobClip, is_remote
from etenet.jobs.journal import Record, merged, record_of
from etenet.jobs.run import Engine, Reached, part_of, read, segments_expected, size_of
from etenet.linux import thread_settings
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS
from etenet.sandbox.pool import InProcess, Sandbox
from etenet.video.clip import Clip
from etenet.video.segments import Cut

ACTORS = 1
TASK_BYTES = 2**30  # what Ray reserves for decoding a clip


def engine(
    checkpoint: Path, options: CaptionOptions, *, details: bool, address: str | None = None, actors: int = ACTORS
) -> Engine:
    """On the cluster at `address` (where None, on this machine). Raises `CheckpointError`."""
    resize_px = checkpoints.load(checkpoint).preprocessing.resize_px

    def captions(clips: Iterable[JobClip], reached: Reached) -> Iterator[Record]:
        sources: dict[tuple[str, Cut], list[str]] = {}
        for clip in clips:
            path = clip.path if is_remote(clip.path) else str(Path(clip.path).resolve())
            sources.setdefault((path, part_of(clip, options.cut)), []).append(clip.video)
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": thread_settings(os.environ)},
            )
        except (ConnectionError, ValueError) as error:
            raise JobStopped(f"there is no Ray cluster at {address}: {error}") from error
        try:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            weights = ray.put(np.frombuffer(checkpoint.read_bytes(), np.uint8))
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus = 1 if resources.get("GPU") else 0
            # A core is left for decoding, or captioning would wait for it for ever.
            cores = 0.0 if gpus else min(1.0, (resources["CPU"] - 1) / actors)
            sources = without_copies(sources, _digests)
            names = list(sources.values())
            items = [
                {"clip": number, "path": path, "cut": pickle.dumps(cut)} for number, (path, cut) in enumerate(sources)
            ]
            answers = (
                ray.data.from_items(items)
                # Its memory also keeps Ray from making one step of both: an actor would then decode by itself.
                .flat_map(partial(_decoded, resize_px=resize_px), num_cpus=1, memory=TASK_BYTES)
                .map_batches(
                    _Captions,
                    fn_constructor_args=([weights], options, details, segments_expected(len(items), options.cut)),
                    batch_size=GPU_BATCH_CLIPS if gpus else CPU_BATCH_CLIPS,
                    compute=ray.data.ActorPoolStrategy(size=actors),
                    num_cpus=cores,
                    num_gpus=gpus,
                )
            )
            parts: defaultdict[int, dict[int, Record]] = defaultdict(dict)
            parts_in_all: dict[int, int] = {}
            for row in answers.iter_rows():
                clip_number, part = row["clip"], row["part"]
                parts[clip_number][part] = pickle.loads(row["record"])
                if row["is_last"]:
                    parts_in_all[clip_number] = part + 1
                else:
                    reached(names[clip_number][0], row["said_until_s"], row["duration_s"])
                if len(parts[clip_number]) == parts_in_all.get(clip_number):
                    record = merged([answer for _, answer in sorted(parts.pop(clip_number).items())])
                    for video in names[clip_number]:
                        yield {"video": video, **record}
        except ray.exceptions.RayError as error:
            raise JobStopped(
                f"the cluster cannot go on: {str(error).splitlines()[-1]}; start this job once more"
            ) from error
        finally:
            ray.shutdown()

    return captions


def without_copies(
    sources: Mapping[tuple[str, Cut], list[str]], digests_of: Callable[[list[str]], Mapping[str, str]]
) -> dict[tuple[str, Cut], list[str]]:
    """The names by parts of files, of which only one is there where several hold the same bytes.

    Only files as long as another are read for it.
    """
    sizes = {path: size_of(path) for path, _ in sources}
    times = Counter(sizes.values())
    digests = digests_of([path for path, size in sizes.items() if size and times[size] > 1])
    first: dict[str, str] = {}
    original = {path: first.setdefault(digests[path], path) for path in sizes if path in digests}
    found: dict[tuple[str, Cut], list[str]] = {}
    for (path, cut), videos in sources.items():
        found.setdefault((original.get(path, path), cut), []).extend(videos)
    return found


def _digests(paths: list[str]) -> dict[str, str]:
    """By the cluster, which also reads the files for their captions."""
    if not paths:
        return {}
    rows = ray.data.from_items([{"path": path} for path in paths]).map(_digest).iter_rows()
    return {row["path"]: row["digest"] for row in rows}


def _digest(row: dict[str, Any]) -> dict[str, Any]:
    """Of what a file holds; of one that cannot be read, its path, which is no other's."""
    try:
        return {**row, "digest": sha256(Path(row["path"]))}
    except OSError:
        return {**row, "digest": row["path"]}


@cache
def _decoders(resize_px: int) -> Sandbox | InProcess:
    """One per process of Ray's, which has one task at a time."""
    if SANDBOX_EXISTS:
        return Sandbox(resize_px=resize_px, limits=JOB_LIMITS, processes=1)
    return InProcess(resize_px=resize_px, limits=JOB_LIMITS)


def _decoded(row: dict[str, Any], *, resize_px: int) -> Iterator[dict[str, Any]]:
    """The parts of a clip: its segments, some at a time, or the record that says what is wrong with it."""
    body, rest = read(row["path"], JOB_LIMITS.max_body_bytes), pickle.loads(row["cut"])
    for part in count():
        decoded: list[Clip] | Record
        cut, rest, said_until_s, duration_s = rest, None, 0.0, 0.0
        try:
            if isinstance(body, bytes):
                decoded = _decoders(resize_px).submit(body, cut).result()
                said_until_s, duration_s = decoded[-1].info.end_s, decoded[-1].info.duration_s
                rest = cut.rest(said_until_s, duration_s)
            else:
                decoded = body
        except CaptionError as error:
            decoded = dict(error.as_dict())
        yield {
            "clip": row["clip"],
            "part": part,
            "decoded": pickle.dumps(decoded, protocol=5),
            "is_last": rest is None,
            "said_until_s": said_until_s,
            "duration_s": duration_s,
        }
        if rest is None:
            return


class _Captions:
    """An actor that holds the network."""

    def __init__(self, weights: list[Any], options: CaptionOptions, details: bool, clips: int) -> None:
        """`weights` holds one reference: given bare, Ray would resolve it, and could not start the actor anew."""
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            file.write(ray.get(weights[0]).data)
            file.flush()
            self._captioner = local.load(Path(file.name), limits=JOB_LIMITS, clips=clips, sandboxed=False)
        self._options, self._details = options, details

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = [pickle.loads(decoded) for decoded in batch.pop("decoded")]
        segments = [segment for part in parts if isinstance(part, list) for segment in part]
        captions = iter(self._captioner.caption_decoded(segments, self._options))
        records = [part if isinstance(part, dict) else self._record([next(captions) for _ in part]) for part in parts]
        return {**batch, "record": [pickle.dumps(record) for record in records]}

    def _record(self, segments: Sequence[Caption | CaptionError]) -> Record:
        outcome = outcome_of(segments, self._options.cut)
        if isinstance(outcome, CaptionError):
            return dict(outcome.as_dict())
        return record_of(outcome.as_dict(), details=self._details)
