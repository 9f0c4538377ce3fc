"""Batch captioning on a Ray cluster: tasks decode on all cores, and their frames stream to actors that caption.

There is an actor for each GPU, or else for each node, and it computes on all cores of its node: decoding and captioning
share them, as they do on one machine. Ray Data slows decoding down to the speed of captioning. It replaces an actor
that died, and repeats the work that the actor had. Every node needs this package, and the clips at the same paths. The
checkpoint is sent to it, and for CPUs the encoder that one of them has compiled.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from etenet.captioning.captioner import SANDBOX_EXISTS
from etenet.captioning.captions import Caption, outcome_of
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import JOB_DECODE_TRIES
from etenet.errors import CaptionError, JobStopped, Overloaded
from etenet.jobs.engines import local
from etenet.jobs.engines.local import JOB_LIMITS
from etenet.jobs.inputs import JobClip, Source
from etenet.jobs.journal import Record, merged, record_of
from etenet.jobs.remote import is_remote
from etenet.jobs.run import Engine, OnSegments, part_of, read, segments_expected, size_of
from etenet.linux import CORES_VARIABLE, cores, waiting_settings
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS, GRAPH
from etenet.runtime.kept import kept_encoder
from etenet.sandbox.pool import InProcess, Sandbox
from etenet.video.clip import Clip
from etenet.video.segments import Cut

TASK_BYTES = 2**30  # what Ray reserves for decoding a clip
# Of a core, which Ray only counts: the actor of a node finds room beside as many tasks as the node has cores.
ACTOR_CORES, TASK_CORES = 0.01, 0.99
# A task costs Ray some 20 ms of a core, so there are few; but enough that no core waits long for the last one, and that
# little is repeated after one that failed.
TASKS_PER_CORE, MOST_CLIPS_OF_A_TASK = 8, 64
_CHECKPOINT = "checkpoint.pt"


def engine(
    checkpoint: Path, options: CaptionOptions, *, details: bool, address: str | None = None, actors: int | None = None
) -> Engine:
    """On the cluster at `address`, or with None on this machine, by so many actors. Raises `CheckpointError` and
    `BadOption`.
    """
    loaded = checkpoints.inspect(checkpoint)
    resize_px = loaded.preprocessing.resize_px
    if refusal := options.refusal(loaded.confidence):
        raise refusal

    def captions(clips: Iterable[JobClip], on_segments: OnSegments) -> Iterator[Record]:
        sources: dict[tuple[Source, Cut], list[str]] = {}
        for clip in clips:
            path = clip.path if is_remote(clip.path) else os.path.abspath(clip.path)
            source = replace(clip.source, path=path)
            sources.setdefault((source, part_of(clip, options.cut)), []).append(clip.video)
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
            sources = without_copies(sources, _digests if _all_is_here() else _digests_by_cluster)
            names = list(sources.values())
            items = [{"clip": number, "source": pickle.dumps(source)} for number, source in enumerate(sources)]
            expected = segments_expected(len(items), options.cut)
            workers, workers_per_node, placed = _placement(actors, most=len(items))
            on_gpu = "num_gpus" in placed
            graph = None if on_gpu else ray.remote(num_cpus=TASK_CORES)(_compiled).remote(weights)
            captioned = (
                ray.data.from_items(items, override_num_blocks=_decoding_tasks(len(items)))
                # `memory` also keeps Ray from fusing the two steps: the actors would then decode, too.
                .flat_map(partial(_decoded, resize_px=resize_px), num_cpus=TASK_CORES, memory=TASK_BYTES)
                .map_batches(
                    _Captions,
                    fn_constructor_args=([weights, graph], options, details, workers_per_node, expected),
                    batch_size=GPU_BATCH_CLIPS if on_gpu else CPU_BATCH_CLIPS,
                    compute=ray.data.ActorPoolStrategy(size=workers),
                    **placed,
                )
            )
            parts: defaultdict[int, dict[int, Record]] = defaultdict(dict)
            part_counts: dict[int, int] = {}
            for row in captioned.iter_rows():
                clip_number, part = row["clip"], row["part"]
                parts[clip_number][part] = record = pickle.loads(row["record"])
                if segments := record.get("segments"):
                    on_segments(names[clip_number][0], segments, row["duration_s"])
                if row["is_last"]:
                    part_counts[clip_number] = part + 1
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
    sources: Mapping[tuple[Source, Cut], list[str]], digests_of: Callable[[list[Source]], Mapping[Source, str]]
) -> dict[tuple[Source, Cut], list[str]]:
    """`sources`, the names by parts of files, with files that have the same bytes merged into the first of them.

    Only files that are as long as another are read.
    """
    sizes = {source: size_of(source) for source, _ in sources}
    times = Counter(sizes.values())
    digests = digests_of([source for source, size in sizes.items() if size and times[size] > 1])
    first: dict[str, Source] = {}
    original = {source: first.setdefault(digests[source], source) for source in sizes if source in digests}
    distinct: dict[tuple[Source, Cut], list[str]] = {}
    for (source, cut), videos in sources.items():
        distinct.setdefault((original.get(source, source), cut), []).extend(videos)
    return distinct


def _digests(sources: list[Source]) -> dict[Source, str]:
    with ThreadPoolExecutor(cores()) as threads:
        return dict(zip(sources, threads.map(_digest, sources), strict=True))


def _digests_by_cluster(sources: list[Source]) -> dict[Source, str]:
    """The files are read where clips will be read, which need not be here."""
    if not sources:
        return {}
    rows = ray.data.from_items([{"source": pickle.dumps(source)} for source in sources]).map(_with_digest).iter_rows()
    return {pickle.loads(row["source"]): row["digest"] for row in rows}


def _with_digest(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "digest": _digest(pickle.loads(row["source"]))}


def _digest(source: Source) -> str:
    """That of a clip's bytes, or its pickled source if they cannot be read, so that it equals no other clip."""
    body = read(source, JOB_LIMITS.max_body_bytes)
    return sha256(body).hexdigest() if isinstance(body, bytes) else pickle.dumps(source).hex()


def _placement(actors: int | None, *, most: int) -> tuple[int, int, dict[str, Any]]:
    """How many actors there are, how many of them on a node, and what each asks of Ray: a GPU, or a node.

    By default there is one for each GPU of the cluster, or for each of its nodes that has cores.
    """
    resources = _resources().values()
    on_gpus = any("GPU" in each for each in resources)
    kind = "GPU" if on_gpus else "CPU"
    nodes = [int(each[kind]) for each in resources if each.get(kind)]
    workers = min(actors or (sum(nodes) if on_gpus else len(nodes)), most)
    placed: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1}
    if not on_gpus:
        spread = placement_group([{"CPU": ACTOR_CORES}] * workers, strategy="SPREAD")
        placed = {"num_cpus": ACTOR_CORES, "scheduling_strategy": PlacementGroupSchedulingStrategy(spread)}
    return workers, math.ceil(workers / len(nodes)), placed


def _decoding_tasks(clips: int) -> int:
    """How many tasks decode so many clips."""
    of_cluster = sum(int(each.get("CPU", 0)) for each in _resources().values())
    return min(clips, max(TASKS_PER_CORE * of_cluster, math.ceil(clips / MOST_CLIPS_OF_A_TASK)))


def _share_of_node(actors: int) -> int:
    """How many threads an actor of so many on this node gets, of the cores that Ray has here."""
    of_node = int(_resources()[ray.get_runtime_context().get_node_id()].get("CPU", 1))
    return max(1, min(cores(), of_node) // actors)


def _all_is_here() -> bool:
    """Whether the cluster is this machine alone, so that its files are those of this process."""
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return False
    return _resources().keys() == {ray.get_runtime_context().get_node_id()}


def _resources() -> dict[str, dict[str, float]]:
    """What Ray has on each node that runs, by its id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def _compiled(weights: Any) -> dict[str, bytes]:
    """The files of the compiled encoder, which this node may have kept; empty if it cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _CHECKPOINT
        path.write_bytes(weights.data)
        with kept_encoder(path) as graph:
            return {file.name: file.read_bytes() for file in graph.parent.iterdir()} if graph else {}


@cache
def _decoders(resize_px: int) -> Sandbox | InProcess:
    """One for each process of Ray, which runs one task at a time."""
    if SANDBOX_EXISTS:
        return Sandbox(resize_px=resize_px, limits=JOB_LIMITS, processes=1)
    return InProcess(resize_px=resize_px, limits=JOB_LIMITS)


def _decoded(row: dict[str, Any], *, resize_px: int) -> Iterator[dict[str, Any]]:
    """The parts of a clip: a few segments each, or one record of why it cannot be decoded."""
    source, rest = pickle.loads(row["source"])
    body = read(source, JOB_LIMITS.max_body_bytes)
    for part in count():
        decoded: list[Clip] | Record
        cut, rest, duration_s = rest, None, 0.0
        try:
            if isinstance(body, bytes):
                decoded = _decoded_patiently(body, cut, resize_px)
                duration_s = decoded[-1].info.duration_s
                rest = cut.rest(decoded[-1].info.end_s, duration_s)
            else:
                decoded = body
        except CaptionError as error:
            decoded = dict(error.as_dict())
        yield {
            "clip": row["clip"],
            "part": part,
            "decoded": pickle.dumps(decoded, protocol=5),
            "is_last": rest is None,
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

    def __init__(self, model: list[Any], options: CaptionOptions, details: bool, actors_here: int, clips: int) -> None:
        """`model` has references to the checkpoint and to the compiled encoder, if there is one. Ray would resolve bare
        ones, and then could not restart the actor.
        """
        # Ray lets an actor have one thread.
        os.environ |= dict.fromkeys((CORES_VARIABLE, "OMP_NUM_THREADS"), str(_share_of_node(actors_here)))
        weights, graph = model
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, encoder = Path(folder) / _CHECKPOINT, Path(folder) / GRAPH
            checkpoint.write_bytes(ray.get(weights).data)
            for name, contents in (ray.get(graph) if graph else {}).items():
                (Path(folder) / name).write_bytes(contents)
            self._captioner = local.load(
                checkpoint,
                limits=JOB_LIMITS,
                clips=clips,
                sandboxed=False,
                encoder_graph=encoder if encoder.exists() else None,
            )
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
