"""Batch captioning on a Ray cluster: tasks decode on all cores, and their frames stream to actors that caption.

Ray Data slows decoding down to the speed of captioning. It replaces an actor that died, and repeats the work that the
actor had. Every node needs this package, and the clips at the same paths. The checkpoint is sent to it.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from etenet.captioning.stream import JOB_DECODE_TRIES, OnProgress
from etenet.errors import CaptionError, JobStopped, Overloaded
from etenet.files import sha256
from etenet.jobs.engines import local
from etenet.jobs.engines.local import JOB_LIMITS
from etenet.jobs.inputs import JobClip
from etenet.jobs.journal import Record, merged, record_of
from etenet.jobs.remote import is_remote
from etenet.jobs.run import Engine, part_of, read, segments_expected, size_of
from etenet.linux import CORES_VARIABLE, cores, waiting_settings
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
    """On the cluster at `address`, or with None on this machine. Raises `CheckpointError` and `BadOption`."""
    loaded = checkpoints.load(checkpoint)
    resize_px = loaded.preprocessing.resize_px
    if refusal := options.refusal(loaded.confidence):
        raise refusal

    def captions(clips: Iterable[JobClip], on_progress: OnProgress[str]) -> Iterator[Record]:
        sources: dict[tuple[str, Cut], list[str]] = {}
        for clip in clips:
            path = clip.path if is_remote(clip.path) else os.path.abspath(clip.path)
            sources.setdefault((path, part_of(clip, options.cut)), []).append(clip.video)
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _settings(os.environ)},
            )
        except (ConnectionError, ValueError) as error:
            raise JobStopped(f"there is no Ray cluster at {address}: {error}; correct --ray-address") from error
        try:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            weights = ray.put(np.frombuffer(checkpoint.read_bytes(), np.uint8))
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus = 1 if resources.get("GPU") else 0
            # One core stays free for decoding: without it, captioning would wait for frames forever.
            reserved_cores = 0.0 if gpus else min(1.0, (resources["CPU"] - 1) / actors)
            sources = without_copies(sources, _digests)
            names = list(sources.values())
            items = [{"clip": number, "source": pickle.dumps(source)} for number, source in enumerate(sources)]
            captioned = (
                ray.data.from_items(items)
                # `memory` also keeps Ray from fusing the two steps: the actors would then decode, too.
                .flat_map(partial(_decoded, resize_px=resize_px), num_cpus=1, memory=TASK_BYTES)
                .map_batches(
                    _Captions,
                    fn_constructor_args=([weights], options, details, segments_expected(len(items), options.cut)),
                    batch_size=GPU_BATCH_CLIPS if gpus else CPU_BATCH_CLIPS,
                    compute=ray.data.ActorPoolStrategy(size=actors),
                    num_cpus=reserved_cores,
                    num_gpus=gpus,
                )
            )
            parts: defaultdict[int, dict[int, Record]] = defaultdict(dict)
            part_counts: dict[int, int] = {}
            for row in captioned.iter_rows():
                clip_number, part = row["clip"], row["part"]
                parts[clip_number][part] = pickle.loads(row["record"])
                if row["is_last"]:
                    part_counts[clip_number] = part + 1
                else:
                    on_progress(names[clip_number][0], row["captioned_until_s"], row["duration_s"])
                if len(parts[clip_number]) == part_counts.get(clip_number):
                    record = merged([of_part for _, of_part in sorted(parts.pop(clip_number).items())])
                    for video in names[clip_number]:
                        yield {"video": video, **record}
        except ray.exceptions.RayError as error:
            raise JobStopped(f"the cluster failed: {str(error).splitlines()[-1]}; start this job again") from error
        finally:
            ray.shutdown()

    return captions


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the processes on all nodes: what is set here, but not how many cores a node has."""
    chosen = {CORES_VARIABLE: environment[CORES_VARIABLE]} if CORES_VARIABLE in environment else {}
    return chosen | waiting_settings(environment)


def without_copies(
    sources: Mapping[tuple[str, Cut], list[str]], digests_of: Callable[[list[str]], Mapping[str, str]]
) -> dict[tuple[str, Cut], list[str]]:
    """`sources`, the names by parts of files, with files that have the same bytes merged into the first of them.

    Only files that are as long as another are read.
    """
    sizes = {path: size_of(path) for path, _ in sources}
    times = Counter(sizes.values())
    digests = digests_of([path for path, size in sizes.items() if size and times[size] > 1])
    first: dict[str, str] = {}
    original = {path: first.setdefault(digests[path], path) for path in sizes if path in digests}
    distinct: dict[tuple[str, Cut], list[str]] = {}
    for (path, cut), videos in sources.items():
        distinct.setdefault((original.get(path, path), cut), []).extend(videos)
    return distinct


def _digests(paths: list[str]) -> dict[str, str]:
    """Computed by the cluster, which is where the files are read."""
    if not paths:
        return {}
    rows = ray.data.from_items([{"path": pickle.dumps(path)} for path in paths]).map(_digest).iter_rows()
    return {pickle.loads(row["path"]): row["digest"] for row in rows}


def _digest(row: dict[str, Any]) -> dict[str, Any]:
    """The digest of a file's bytes, or its pickled path if it cannot be read, so that it equals no other file."""
    try:
        return {**row, "digest": sha256(Path(pickle.loads(row["path"])))}
    except (OSError, ValueError):
        return {**row, "digest": row["path"].hex()}


@cache
def _decoders(resize_px: int) -> Sandbox | InProcess:
    """One for each process of Ray, which runs one task at a time."""
    if SANDBOX_EXISTS:
        return Sandbox(resize_px=resize_px, limits=JOB_LIMITS, processes=1)
    return InProcess(resize_px=resize_px, limits=JOB_LIMITS)


def _decoded(row: dict[str, Any], *, resize_px: int) -> Iterator[dict[str, Any]]:
    """The parts of a clip: a few segments each, or one record of why it cannot be decoded."""
    path, rest = pickle.loads(row["source"])
    body = read(path, JOB_LIMITS.max_body_bytes)
    for part in count():
        decoded: list[Clip] | Record
        cut, rest, captioned_until_s, duration_s = rest, None, 0.0, 0.0
        try:
            if isinstance(body, bytes):
                decoded = _decoded_patiently(body, cut, resize_px)
                captioned_until_s, duration_s = decoded[-1].info.end_s, decoded[-1].info.duration_s
                rest = cut.rest(captioned_until_s, duration_s)
            else:
                decoded = body
        except CaptionError as error:
            decoded = dict(error.as_dict())
        yield {
            "clip": row["clip"],
            "part": part,
            "decoded": pickle.dumps(decoded, protocol=5),
            "is_last": rest is None,
            "captioned_until_s": captioned_until_s,
            "duration_s": duration_s,
        }
        if rest is None:
            return


def _decoded_patiently(body: bytes, cut: Cut, resize_px: int) -> list[Clip]:
    """As often as `JOB_DECODE_TRIES` where the machine was too busy."""
    for _ in range(JOB_DECODE_TRIES - 1):
        with suppress(Overloaded):
            return _decoders(resize_px).submit(body, cut).result()
    return _decoders(resize_px).submit(body, cut).result()


class _Captions:
    """An actor that holds the network."""

    def __init__(self, weights: list[Any], options: CaptionOptions, details: bool, clips: int) -> None:
        """`weights` has one reference. Ray would resolve a bare one, and then could not restart the actor."""
        os.environ["OMP_NUM_THREADS"] = str(cores())  # Ray lets an actor have one thread
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
